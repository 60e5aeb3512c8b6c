"""A small vision transformer for digits at 16x16, 64 patches and a class token, by torch.export."""

from __future__ import annotations

import numpy as np
import torch
from common import DIGITS_SOURCE, Description, load_digit_images, preprocess, publish
from torch import Tensor, nn
from torch.nn import functional
from torch_training import digit_batches, export_dynamo, fit, seed_everything

SIZE, PATCH = 16, 2


class Encoder(nn.Module):
    """Pre-norm encoder: x + attention(norm(x)), then x + mlp(norm(x)) with GELU; keeps (N, tokens, width)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def attention(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        split = self.qkv(x).reshape(samples, tokens, 3, self.heads, width // self.heads)
        qkv = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.projection(mixed.transpose(1, 2).reshape(samples, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Convolutions to patches, class token, learned positions, encoders, linear layer on the class token."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 256, layers: int = 3) -> None:
        super().__init__()
        stem = nn.Conv2d(1, width // 2, 3, padding=1)
        self.embedding = nn.Sequential(stem, nn.GELU(), nn.Conv2d(width // 2, width, PATCH, PATCH))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIZE // PATCH) ** 2 + 1, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.embedding(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.encoders(tokens))[:, 0])


def main() -> None:
    seed_everything()
    pixels, labels, split = load_digit_images(SIZE)
    model = Transformer()
    draw = digit_batches(pixels[split.train], labels[split.train])
    fit(model, draw, nn.CrossEntropyLoss(label_smoothing=0.05), steps=900, rate=2e-3, decay=0.05)
    images = preprocess(pixels)[:, np.newaxis]
    about = Description(
        name="digits_transformer",
        task="handwritten digits, 10 classes, 1x16x16",
        framework=f"PyTorch {torch.__version__}",
        exporter="torch.onnx.export(dynamo=True)",
        source=DIGITS_SOURCE,
        scores="logits",
    )
    print(
        publish(
            export_dynamo(model, torch.from_numpy(images[:2]), ("image", "logits")),
            about,
            {"image": images[split.calib]},
            {"image": images[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )


if __name__ == "__main__":
    main()
