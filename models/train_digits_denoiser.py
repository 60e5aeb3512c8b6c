"""A U-Net that takes noise off 16x16 digits: dense output, Concat skips, ConvTranspose and DepthToSpace."""

from __future__ import annotations

import numpy as np
import torch
from common import DIGITS_SOURCE, Description, add_noise, load_digit_images, preprocess, publish
from torch import Tensor, nn
from torch.nn import functional
from torch_training import export_traced, fit, jitter, normalize, seed_everything

SIZE = 16
NOISE = 40.0  # standard deviation in grey levels of 0..255
EVAL_SAMPLES = 256


class Denoiser(nn.Module):
    """Noisy image (N, 1, 16, 16) to clean image of the same shape; levels at 16x16, 8x8 and 4x4."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1)
        self.widen = nn.Conv2d(3 * width, 8 * width, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.middle = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.refine = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = functional.leaky_relu(self.enter(x), 0.1)
        coarse = functional.leaky_relu(self.down(fine), 0.1)
        y = functional.leaky_relu(self.bottom(coarse), 0.1)
        y = self.shuffle(functional.leaky_relu(self.widen(y), 0.1))
        y = functional.leaky_relu(self.middle(torch.cat([y, coarse], dim=1)), 0.1)
        y = functional.leaky_relu(self.up(y), 0.1)
        y = functional.leaky_relu(self.refine(torch.cat([y, fine], dim=1)), 0.1)
        return self.leave(y)


def main() -> None:
    seed_everything()
    pixels, _, split = load_digit_images(SIZE)
    clean = torch.from_numpy(pixels[split.train]).to(torch.float32).unsqueeze(1) / 255

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(clean), (64,), generator=generator)
        target = jitter(clean[rows], generator)
        noisy = target + NOISE / 255 * torch.randn(target.shape, generator=generator)
        return normalize(noisy.clamp(0.0, 1.0)), normalize(target)

    model = Denoiser()
    fit(model, draw, nn.MSELoss(), steps=3000, rate=4e-3)
    noisy = preprocess(add_noise(pixels, NOISE))[:, np.newaxis]
    target = preprocess(pixels)[:, np.newaxis]
    evaluation = split.evaluation[:EVAL_SAMPLES]
    about = Description(
        name="digits_denoiser",
        task=f"denoising of 1x16x16 digits (noise of {NOISE:.0f} grey levels), dense output",
        framework=f"PyTorch {torch.__version__}",
        exporter="torch.onnx.export(dynamo=False)",
        source=DIGITS_SOURCE,
        scores="clean",
    )
    print(
        publish(
            export_traced(model, torch.from_numpy(noisy[:2]), ("noisy", "clean")),
            about,
            {"noisy": noisy[split.calib]},
            {"noisy": noisy[evaluation]},
            target=target[evaluation],
        )
    )


if __name__ == "__main__":
    main()
