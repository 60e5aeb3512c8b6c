"""A scikit-learn pipeline for digits, StandardScaler and MLPClassifier, exported by skl2onnx."""

from __future__ import annotations

import numpy as np
import skl2onnx
import sklearn
from common import DIGITS_SOURCE, SEED, Description, load_digit_images, publish
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main() -> None:
    pixels = load_digits().data.astype(np.float32)
    _, labels, split = load_digit_images(8)
    # Copies with noise stand in for augmentation, which scikit-learn does not have.
    noise = np.random.default_rng(SEED).normal(0.0, 1.0, (8, len(split.train), pixels.shape[1]))
    train = (pixels[split.train] + noise).astype(np.float32).reshape(-1, pixels.shape[1])
    classifier = MLPClassifier((128, 64), alpha=1e-3, max_iter=400, random_state=SEED)
    pipeline = make_pipeline(StandardScaler(), classifier).fit(train, np.tile(labels[split.train], 8))
    model = skl2onnx.to_onnx(
        pipeline,
        name="digits_mlp",  # a random name otherwise
        initial_types=[("pixels", FloatTensorType([None, pixels.shape[1]]))],
        options={id(pipeline): {"zipmap": False}},
        target_opset={"": 17, "ai.onnx.ml": 3},
    )
    about = Description(
        name="digits_mlp",
        task="handwritten digits, 10 classes, 64 pixels with grey levels 0..16",
        framework=f"scikit-learn {sklearn.__version__}",
        exporter=f"skl2onnx {skl2onnx.__version__}, zipmap off",
        source=DIGITS_SOURCE,
        scores="probabilities",
    )
    print(
        publish(
            model,
            about,
            {"pixels": pixels[split.calib]},
            {"pixels": pixels[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )


if __name__ == "__main__":
    main()
