"""Training with PyTorch: seeded, deterministic, on the CPU, with augmented digit images."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
import torch
from common import MEAN, SCALE, SEED, STD, Array
from torch import Tensor, nn
from torch.nn import functional

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def seed_everything() -> None:
    """Make weights, batches and kernels the same in every run on the same machine and version of PyTorch."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)


def fit(model: nn.Module, draw: Draw, loss: Loss, *, steps: int, rate: float, decay: float = 0.01) -> None:
    """Minimize loss(model(x), y) over `steps` mini-batches (x, y) = draw(generator).

    AdamW under a one-cycle schedule (Smith and Topin, 2017) with peak learning rate `rate`; leaves the model
    in eval mode.
    """
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        x, y = draw(generator)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    model.eval()


def digit_batches(pixels: Array, labels: Array, *, batch: int = 64, noise: float = 0.08) -> Draw:
    """Batches of augmented images, float32 (batch, 1, size, size), and labels, int64 (batch,).

    `pixels` is uint8 (N, size, size). Each image is turned, moved and scaled a little, and gets Gaussian
    noise of `noise` times the grey range.
    """
    images = torch.from_numpy(pixels).to(torch.float32).unsqueeze(1) / 255
    classes = torch.from_numpy(labels)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (batch,), generator=generator)
        moved = jitter(images[rows], generator)
        noisy = moved + noise * torch.randn(moved.shape, generator=generator)
        return normalize(noisy.clamp(0.0, 1.0)), classes[rows]

    return draw


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, move by up to 10 % of the width, scale by up to 10 %; keeps (N, 1, H, W)."""
    uniform = torch.rand((4, len(images)), generator=generator) * 2 - 1
    angle, scale, shift = uniform[0] * 0.21, 1 + 0.1 * uniform[1], 0.2 * uniform[2:]
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    matrices = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def normalize(images: Tensor) -> Tensor:
    """Grey values in 0..1 to model input, the same map as common.preprocess has for pixels in 0..255."""
    return (images * (255 * SCALE) - MEAN) / STD


def export_traced(
    model: nn.Module, example: Tensor, names: tuple[str, str], *, opset: int = 17
) -> onnx.ModelProto:
    """The TorchScript exporter: dynamic batch axis, BatchNormalization kept, nothing folded."""
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(),
        (example,),
        buffer,
        dynamo=False,
        opset_version=opset,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=[names[0]],
        output_names=[names[1]],
        dynamic_axes={names[0]: {0: "batch"}, names[1]: {0: "batch"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def export_dynamo(
    model: nn.Module, example: Tensor, names: tuple[str, str], *, opset: int = 18
) -> onnx.ModelProto:
    """The torch.export based exporter: dynamic batch axis; names[0] is the argument of `forward`."""
    program = torch.onnx.export(
        model.eval(),
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=[names[0]],
        output_names=[names[1]],
        dynamic_shapes={names[0]: {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise RuntimeError("the exporter returned no program")
    return program.model_proto
