"""A MobileNet-like network for digits at 24x24, Keras with NHWC data, exported by tf2onnx.

TensorFlow does not live with the extra `train`; an environment of its own takes
`pip install tensorflow-cpu==2.21.0 tf2onnx==1.17.0 scikit-learn pillow` besides onnxcomp.
"""

from __future__ import annotations

import keras
import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from common import DIGITS_SOURCE, SEED, Description, load_digit_images, preprocess, publish
from keras import layers

SIZE = 24
EPOCHS, BATCH = 40, 64


def normed(x: keras.KerasTensor, *, clip: bool = True) -> keras.KerasTensor:
    """Batch normalization, then ReLU6 where `clip`."""
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.ReLU(6.0)(x) if clip else x


def inverted_residual(x: keras.KerasTensor, channels: int, stride: int) -> keras.KerasTensor:
    """Widen, depthwise 3x3, narrow without activation, add where the shape stays (Sandler et al., 2018)."""
    before = x.shape[-1]
    y = normed(layers.Conv2D(4 * before, 1, use_bias=False)(x))
    y = normed(layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False)(y))
    y = normed(layers.Conv2D(channels, 1, use_bias=False)(y), clip=False)
    return layers.Add()([x, y]) if stride == 1 and before == channels else y


def network() -> keras.Model:
    """Images (N, 24, 24, 1) to class probabilities (N, 10)."""
    image = keras.Input((SIZE, SIZE, 1), name="image")
    x = normed(layers.Conv2D(16, 3, padding="same", use_bias=False)(image))
    for channels, stride in ((16, 1), (24, 2), (24, 1), (40, 2), (40, 1), (40, 1)):
        x = inverted_residual(x, channels, stride)
    x = normed(layers.SeparableConv2D(128, 3, padding="same", use_bias=False)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, activation="softmax")(x))


def augmentation() -> keras.Sequential:
    """Turn by up to 12 degrees, move and scale by up to 10 %, fill with preprocess(0), add noise."""
    background = float(preprocess(np.zeros(1))[0])
    fill = {"fill_mode": "constant", "fill_value": background, "seed": SEED}
    return keras.Sequential(
        [
            layers.RandomRotation(12 / 360, **fill),
            layers.RandomTranslation(0.1, 0.1, **fill),
            layers.RandomZoom(0.1, **fill),
            layers.GaussianNoise(0.3, seed=SEED),
        ]
    )


def train(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> None:
    """Adam with a cosine schedule on augmented batches."""
    steps = EPOCHS * (len(images) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(4e-4, steps, warmup_target=4e-3, warmup_steps=steps // 10)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    augment = augmentation()
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=SEED)
    batches = batches.batch(BATCH, drop_remainder=True).map(lambda x, y: (augment(x, training=True), y))
    model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0)


def export(model: keras.Model) -> onnx.ModelProto:
    """Through tf2onnx, with a dynamic batch axis, the input `image` and the output `probabilities`."""
    signature = [tf.TensorSpec((None, SIZE, SIZE, 1), tf.float32, name="image")]

    @tf.function(input_signature=signature)
    def probabilities(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": model(image, training=False)}

    exported, _ = tf2onnx.convert.from_function(probabilities, signature, opset=15)
    return exported


def main() -> None:
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    tf.config.threading.set_intra_op_parallelism_threads(2)
    pixels, labels, split = load_digit_images(SIZE)
    images = preprocess(pixels)[..., np.newaxis]
    model = network()
    train(model, images[split.train], labels[split.train])
    about = Description(
        name="digits_keras",
        task="handwritten digits, 10 classes, 24x24x1 (NHWC)",
        framework=f"Keras {keras.__version__}, TensorFlow {tf.__version__}",
        exporter=f"tf2onnx {tf2onnx.__version__}",
        source=DIGITS_SOURCE,
        scores="probabilities",
    )
    print(
        publish(
            export(model),
            about,
            {"image": images[split.calib]},
            {"image": images[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )


if __name__ == "__main__":
    main()
