"""A residual CNN for digits at 32x32, exported with BatchNormalization nodes; also writes data/digits_png."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from common import (
    DIGITS_SOURCE,
    FOLDER,
    MEAN,
    SCALE,
    STD,
    Array,
    Description,
    load_digit_images,
    preprocess,
    publish,
)
from torch import Tensor, nn
from torch_training import digit_batches, export_traced, fit, seed_everything

SIZE = 32
PNG_PER_CLASS = 6


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 projection where the shape changes (He et al., 2015)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet(widths: tuple[int, int, int] = (24, 48, 96)) -> nn.Sequential:
    """Stem, three stages of two blocks (stride 2 from the second on), global average pool, linear layer."""
    before = widths[0]
    stem = nn.Conv2d(1, before, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(before), nn.ReLU()]
    for stage, width in enumerate(widths):
        layers += [Block(before, width, 1 if stage == 0 else 2), Block(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def write_png_folder(pixels: Array, labels: Array, rows: Array) -> None:
    """Some held-out digits as data/digits_png/CLASS/ROW.png, and the preprocessing to model input."""
    from PIL import Image

    folder = FOLDER / "data" / "digits_png"
    shutil.rmtree(folder, ignore_errors=True)
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for row in rows[labels[rows] == digit][:PNG_PER_CLASS]:
            Image.fromarray(pixels[row]).save(folder / str(digit) / f"{row:04}.png", optimize=True)
    lines = [
        "# digits_png to the input of digits_resnet: (pixel * scale - mean) / std, exact in float32.",
        f"size = [{SIZE}, {SIZE}]",
        f"crop = [{SIZE}, {SIZE}]",
        'layout = "NCHW"',
        'color = "gray"',
        f"scale = {SCALE}",
        f"mean = [{MEAN}]",
        f"std = [{STD}]",
    ]
    folder.with_suffix(".toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    seed_everything()
    pixels, labels, split = load_digit_images(SIZE)
    model = resnet()
    draw = digit_batches(pixels[split.train], labels[split.train])
    fit(model, draw, nn.CrossEntropyLoss(label_smoothing=0.05), steps=500, rate=4e-3, decay=0.05)
    images = preprocess(pixels)[:, np.newaxis]
    about = Description(
        name="digits_resnet",
        task="handwritten digits, 10 classes, 1x32x32",
        framework=f"PyTorch {torch.__version__}",
        exporter="torch.onnx.export(dynamo=False), BatchNormalization kept",
        source=DIGITS_SOURCE,
        scores="logits",
    )
    print(
        publish(
            export_traced(model, torch.from_numpy(images[:2]), ("image", "logits")),
            about,
            {"image": images[split.calib]},
            {"image": images[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )
    write_png_folder(pixels, labels, split.evaluation)


if __name__ == "__main__":
    main()
