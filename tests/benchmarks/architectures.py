"""Compact torch definitions of the networks that the benchmarks export, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

__all__ = ["NAMES", "export", "feeds"]


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.shortcut = shortcut if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, 64 << stage, 2 if block == 0 and stage > 0 else 1))
            inputs = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, *, act: bool = True) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else [])]


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        width = inputs * factor
        self.shortcut = stride == 1 and inputs == outputs
        expand = _unit(inputs, width, 1, 1) if factor > 1 else []
        self.body = nn.Sequential(
            *expand, *_unit(width, width, 3, stride, width), *_unit(width, outputs, 1, 1, act=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


def mobilenet_v2() -> nn.Module:
    layers, inputs = _unit(3, 32, 3, 2), 32
    for factor, outputs, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            layers.append(Inverted(inputs, outputs, stride if repeat == 0 else 1, factor))
            inputs = outputs
    return nn.Sequential(*layers, *_unit(320, 1280, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), x.size(1), self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        if mask is not None:
            scores = scores + mask
        context = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
        return self.out(context.view(x.size(0), x.size(1), self.heads * self.size))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.attention, self.first = Attention(width, heads), first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.first:  # normalization in front, as in ViT
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    def __init__(self, width: int = 256, layers: int = 6) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (
            nn.Embedding(5000, width),
            nn.Embedding(512, width),
            nn.Embedding(2, width),
        )
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 8, first=False) for _ in range(layers))
        self.pool = nn.Linear(width, width)
        self.register_buffer("ids", torch.arange(512).expand(1, -1))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = tokens.size()
        kinds = torch.zeros(batch, length, dtype=torch.long)
        x = self.words(tokens) + self.places(self.ids[:, :length]) + self.kinds(kinds)
        x = self.norm(x)
        extended = (1.0 - mask[:, None, None, :].expand(batch, 1, length, length).to(x.dtype)) * -10000.0
        for block in self.blocks:
            x = block(x, extended)
        return x, torch.tanh(self.pool(x[:, 0]))


class Vit(nn.Module):
    def __init__(self, width: int = 192, layers: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 197, width))
        self.blocks = nn.ModuleList(Block(width, 3, first=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


_MAKE = {"resnet50": resnet50, "mobilenet_v2": mobilenet_v2, "bert": Bert, "vit": Vit}
NAMES = tuple(_MAKE)


def feeds(name: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up samples: tokens without padding, or blobs with noise."""
    rng = np.random.default_rng(seed)
    if name == "bert":
        return {"tokens": rng.integers(0, 5000, (count, 64)), "mask": np.ones((count, 64), np.int64)}
    blobs = np.kron(rng.standard_normal((count, 3, 28, 28)), np.ones((1, 1, 8, 8)))
    return {"image": (blobs + 0.3 * rng.standard_normal(blobs.shape)).astype(np.float32)}


def export(name: str, path: Path, opset: int, *, folded: bool = False) -> None:
    """Export one of `NAMES` with a dynamic batch (and length), as the TorchScript exporter writes it.

    With `folded` that exporter may fold batch normalization, as it does by default.
    """
    torch.manual_seed(0)
    model = _as_trained(_MAKE[name](), [torch.from_numpy(v) for v in feeds(name, 16, seed=1).values()])
    inputs = ["tokens", "mask"] if name == "bert" else ["image"]
    outputs = ["states", "pooled"] if name == "bert" else ["scores"]
    axes = {i: {0: "batch", **({1: "length"} if name == "bert" else {})} for i in inputs} | {outputs[0]: {0: "batch"}}
    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    torch.onnx.export(
        model, tuple(torch.from_numpy(v) for v in feeds(name, 2).values()), path, input_names=inputs,
        output_names=outputs, opset_version=opset, dynamic_axes=axes, dynamo=False, **({} if folded else kept),
    )  # fmt: skip


def _as_trained(model: nn.Module, samples: list[torch.Tensor]) -> nn.Module:
    """The model with what training leaves: channels of different norm, statistics of batch normalization as measured,
    outliers in layer normalization.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                spread = torch.exp(0.4 * torch.randn(len(module.weight)))
                module.weight.mul_(spread.reshape(-1, *[1] * (module.weight.dim() - 1)))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.momentum = None  # the mean of all batches
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.weight[torch.randperm(len(module.weight))[:4]] *= 8
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        model(*samples)
    return model.eval()
