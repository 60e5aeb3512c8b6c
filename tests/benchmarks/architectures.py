"""Compact torch definitions of the networks that the benchmarks export, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["NAMES", "export"]


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


NAMES = ("resnet50", "bert", "vit")


def export(name: str, path: Path, opset: int) -> None:
    """Export one of `NAMES` with a dynamic batch (and length), as the TorchScript exporter writes it."""
    torch.manual_seed(0)
    image = (torch.randn(2, 3, 224, 224),)
    text = (torch.randint(0, 5000, (2, 16)), torch.ones(2, 16, dtype=torch.long))
    model, arguments, inputs, outputs = {
        "resnet50": (resnet50, image, ["image"], ["scores"]),
        "bert": (Bert, text, ["tokens", "mask"], ["states", "pooled"]),
        "vit": (Vit, image, ["image"], ["scores"]),
    }[name]
    axes = {i: {0: "batch", **({1: "length"} if name == "bert" else {})} for i in inputs} | {outputs[0]: {0: "batch"}}
    torch.onnx.export(
        _randomized(model()), arguments, path, input_names=inputs, output_names=outputs, opset_version=opset,
        dynamic_axes=axes, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip


def _randomized(model: nn.Module) -> nn.Module:
    """Statistics of batch normalization as after training, and dropout off."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
