"""A perceptron of about a thousand weights on the breast cancer data: a file of 5 KB that must not grow."""

from __future__ import annotations

import numpy as np
import torch
from common import CANCER_SOURCE, Description, publish, split_rows
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch_training import export_traced, fit, seed_everything


def main() -> None:
    seed_everything()
    table = load_breast_cancer()
    labels = table.target.astype(np.int64)
    split = split_rows(labels, calib=128, evaluation=200)
    train = table.data[split.train]
    features = ((table.data - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    x, y = torch.from_numpy(features[split.train]), torch.from_numpy(labels[split.train])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (32,), generator=generator)
        return x[rows] + 0.2 * torch.randn(32, x.shape[1], generator=generator), y[rows]

    model = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 2))
    fit(model, draw, nn.CrossEntropyLoss(), steps=600, rate=5e-3)
    about = Description(
        name="cancer_mlp",
        task="tumour benign or malignant, 2 classes, 30 standardized features",
        framework=f"PyTorch {torch.__version__}",
        exporter="torch.onnx.export(dynamo=False)",
        source=CANCER_SOURCE,
        scores="logits",
    )
    print(
        publish(
            export_traced(model, x[:2], ("features", "logits")),
            about,
            {"features": features[split.calib]},
            {"features": features[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )


if __name__ == "__main__":
    main()
