"""A recurrent classifier that reads a 16x16 digit row by row: two bidirectional GRU layers."""

from __future__ import annotations

import torch
from common import DIGITS_SOURCE, Description, load_digit_images, preprocess, publish
from torch import Tensor, nn
from torch_training import digit_batches, export_traced, fit, seed_everything

SIZE = 16


class RowReader(nn.Module):
    """Rows (N, 16, 16), one time step each, to logits (N, 10) by the mean of the outputs over time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(SIZE, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        steps, _ = self.gru(rows)
        return self.head(steps.mean(dim=1))


def main() -> None:
    seed_everything()
    pixels, labels, split = load_digit_images(SIZE)
    model = RowReader()
    draw = digit_batches(pixels[split.train], labels[split.train])
    on_images = nn.Sequential(nn.Flatten(1, 2), model)
    fit(on_images, draw, nn.CrossEntropyLoss(label_smoothing=0.05), steps=2000, rate=4e-3)
    rows = preprocess(pixels)
    about = Description(
        name="digits_gru",
        task="handwritten digits, 10 classes, 16 rows of 16 pixels as a sequence",
        framework=f"PyTorch {torch.__version__}",
        exporter="torch.onnx.export(dynamo=False)",
        source=DIGITS_SOURCE,
        scores="logits",
    )
    print(
        publish(
            export_traced(model, torch.from_numpy(rows[:1]), ("rows", "logits")),
            about,
            {"rows": rows[split.calib]},
            {"rows": rows[split.evaluation]},
            labels=labels[split.evaluation],
        )
    )


if __name__ == "__main__":
    main()
