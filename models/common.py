"""What the training scripts share: data, splits, preprocessing, saving, measuring, and the manifest.

A script `train_NAME.py` trains one model and calls `publish`, which writes `NAME.onnx`, the sample data
`data/NAME.calib.npz` and `data/NAME.eval.npz`, and the entry of the model in `manifest.toml`. Every number of
the manifest is measured with ONNX Runtime on the file as written.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.runtime import open_session

Array = npt.NDArray[Any]

FOLDER = Path(__file__).resolve().parent
SEED = 20240
MAX_IR_VERSION = 10

# Preprocessing of pixels in 0..255: (pixel * SCALE - MEAN) / STD. All are sums of powers of two, so the
# result is exact in float32 and the same in whatever order a reader computes it.
SCALE, MEAN, STD = 1 / 256, 0.3125, 0.25

DIGITS_SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning "
    "Repository, doi 10.24432/C50P49; the 1,797 images that ship with scikit-learn (load_digits)"
)
CANCER_SOURCE = (
    "Breast Cancer Wisconsin (Diagnostic), W. Wolberg, O. Mangasarian, N. Street and W. Street, 1993, UCI "
    "Machine Learning Repository, doi 10.24432/C5DW2B; as shipped with scikit-learn (load_breast_cancer)"
)


@dataclass(frozen=True)
class Split:
    """Row numbers of the three disjoint parts of a data set, each int64 and in ascending order."""

    train: Array
    calib: Array
    evaluation: Array


@dataclass(frozen=True)
class Description:
    """What a manifest entry says about a model besides what is measured on the file."""

    name: str
    task: str
    framework: str
    exporter: str
    source: str
    scores: str  # the output that is compared with the labels or the target


def split_rows(labels: Array, *, calib: int, evaluation: int) -> Split:
    """Split at random into `calib`, `evaluation` and remaining rows, with equal class shares in each part."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        np.arange(len(labels)), test_size=evaluation, stratify=labels, random_state=SEED
    )
    train, calibration = train_test_split(rest, test_size=calib, stratify=labels[rest], random_state=SEED)
    return Split(np.sort(train), np.sort(calibration), np.sort(held_out))


def load_digit_images(size: int) -> tuple[Array, Array, Split]:
    """Pixels uint8 (1797, size, size), labels int64 (1797,) and the split that all digit models use.

    The 8x8 images with grey levels 0..16 are spread to 0..255 and enlarged bilinearly.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [
        np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BILINEAR)) for one in small
    ]
    labels = digits.target.astype(np.int64)
    return np.stack(enlarged), labels, split_rows(labels, calib=200, evaluation=800)


def preprocess(pixels: Array) -> Array:
    """Pixels in 0..255 of any shape to float32 model input of that shape: (pixel * SCALE - MEAN) / STD."""
    return ((pixels.astype(np.float32) * np.float32(SCALE)) - np.float32(MEAN)) / np.float32(STD)


def add_noise(pixels: Array, deviation: float) -> Array:
    """Pixels uint8 with seeded Gaussian noise of `deviation` grey levels, rounded and clipped to 0..255."""
    noise = np.random.default_rng(SEED).normal(0.0, deviation, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def publish(
    model: onnx.ModelProto,
    about: Description,
    calib: Mapping[str, Array],
    evaluation: Mapping[str, Array],
    *,
    labels: Array | None = None,
    target: Array | None = None,
) -> str:
    """Save the model and its data, measure it, update the manifest, and return the measured line.

    `calib` and `evaluation` hold one array per model input, samples on the first axis. A classifier has
    `labels` (int64, one per sample), a model with dense output has `target` (shape of the output
    `about.scores`, peak value 255 * SCALE / STD), which goes into `data/NAME.target.npz`.
    """
    path = FOLDER / f"{about.name}.onnx"
    data = FOLDER / "data"
    data.mkdir(exist_ok=True)
    clean = without_exporter_notes(model)
    onnx.checker.check_model(clean, full_check=True)
    if clean.ir_version > MAX_IR_VERSION:
        raise ValueError(f"{path.name}: IR version {clean.ir_version}, expected at most {MAX_IR_VERSION}")
    path.write_bytes(clean.SerializeToString(deterministic=True))
    extra = {} if labels is None else {"labels": labels.astype(np.int64)}
    np.savez_compressed(data / f"{about.name}.calib.npz", **calib)
    np.savez_compressed(data / f"{about.name}.eval.npz", **evaluation, **extra)
    (scores,) = open_session(path).run(evaluation, [about.scores])
    if target is None:
        metric, value = "accuracy", accuracy(scores, extra["labels"])
    else:
        np.savez_compressed(data / f"{about.name}.target.npz", **{about.scores: target})
        metric, value = "psnr", psnr(scores, target)
    entry = _entry(path, clean, about, metric, round(value, 3))
    entry |= {"calib_samples": _rows(calib), "eval_samples": _rows(evaluation)}
    _update_manifest(entry)
    return f"{path.name}: {metric} {value:.3f}, {entry['bytes']} bytes, {entry['parameters']} parameters"


def accuracy(scores: Array, labels: Array) -> float:
    """Top-1 accuracy in percent of class scores (N, classes) against labels (N,)."""
    return float(100.0 * np.mean(np.argmax(scores, axis=1) == labels))


def psnr(output: Array, target: Array) -> float:
    """Peak signal-to-noise ratio in dB: 10 * log10(peak² / mean squared error), peak = 255 * SCALE / STD."""
    error = np.mean(np.square(output.astype(np.float64) - target.astype(np.float64)))
    return float(10.0 * np.log10((255 * SCALE / STD) ** 2 / error))


def without_exporter_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without doc strings and metadata: exporters put stack traces and paths of the machine there."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _clear_notes(copy)
    return copy


def _clear_notes(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                _clear_notes(child)


def _rows(arrays: Mapping[str, Array]) -> int:
    return len(next(iter(arrays.values())))


def _entry(
    path: Path, model: onnx.ModelProto, about: Description, metric: str, value: float
) -> dict[str, str | int | float]:
    content = path.read_bytes()
    data = f"data/{about.name}"
    entry: dict[str, str | int | float] = {
        "name": about.name,
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "task": about.task,
        "framework": about.framework,
        "exporter": about.exporter,
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "parameters": sum(int(np.prod(i.dims)) for i in model.graph.initializer),
        "scores": about.scores,
        "metric": metric,
        metric: value,
        "calib": f"{data}.calib.npz",
        "eval": f"{data}.eval.npz",
        "script": f"train_{about.name}.py",
        "seed": SEED,
        "data_source": about.source,
        "data_licence": "CC-BY-4.0",
        "weights_licence": "Apache-2.0",
    }
    return entry | ({"target": f"{data}.target.npz"} if metric == "psnr" else {})


def _update_manifest(entry: Mapping[str, str | int | float]) -> None:
    path = FOLDER / "manifest.toml"
    known = tomllib.loads(path.read_text(encoding="utf-8"))["model"] if path.exists() else []
    entries = sorted([e for e in known if e["name"] != entry["name"]] + [entry], key=lambda e: str(e["name"]))
    lines = ["# Written by the training scripts (common.publish); accuracy in percent, psnr in dB."]
    for one in entries:
        lines += ["", "[[model]]", *(f"{key} = {_toml(value)}" for key, value in one.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: str | int | float) -> str:
    if not isinstance(value, str):
        return repr(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
