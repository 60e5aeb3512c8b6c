"""Statistics of a model as one thing that can be merged and kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.calibration.statistics import Channels, Histogram, TensorStatistics
from onnxcomp.calibration.sums import ExactSum
from onnxcomp.errors import DataError
from onnxcomp.graph import Model

__all__ = ["Statistics", "model_hash"]

Array = npt.NDArray[Any]
_FORMAT = "onnxcomp statistics 1"


def _version() -> str:
    from onnxcomp import __version__

    return __version__


@dataclass
class Statistics:
    """What was seen of a model: `tensors` by value name, second moments (`grams`) by `Unit.key`.

    `model` is the `model_hash`, `samples` the number of samples seen, `version` that of the onnxcomp that saw them.
    Statistics of disjoint shards merge to the same numbers in any order, and to those of one pass over all of the data
    if that has the same batches.
    """

    model: str
    samples: int = 0
    tensors: dict[str, TensorStatistics] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)
    version: str = field(default_factory=_version)

    def merge(self, other: Statistics) -> None:
        """Take in those of another shard, which stay as they are. Raises DataError if they are of another model."""
        self._require(other.model, "the statistics to merge")
        self.samples += other.samples
        for name, statistics in other.tensors.items():
            self.tensors.setdefault(name, TensorStatistics()).merge(statistics)
        for key, gram in other.grams.items():
            self.grams.setdefault(key, Gram.empty(*gram.sum.digits.shape[1:])).merge(gram)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all as one .npz file (no pickle), whole or not at all. Raises RejectedError or ResourceError."""
        from onnxcomp import atomic

        target = Path(path)
        arrays: dict[str, Array] = {}
        head = {
            "format": _FORMAT,
            "model": self.model,
            "samples": self.samples,
            "version": self.version,
            "tensors": {
                name: _write_tensor(arrays, f"tensor{i}", statistics)
                for i, (name, statistics) in enumerate(self.tensors.items())
            },
            "grams": {key: _write_gram(arrays, f"gram{i}", gram) for i, (key, gram) in enumerate(self.grams.items())},
        }
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with atomic.explained(target), atomic.draft(target) as draft:
            with open(draft, "xb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            atomic.sync_folder(target.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: str) -> Statistics:
        """Read a file that `save` wrote, for the model of this hash. Raises DataError if it is none, or of another."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["format"] != _FORMAT:
                    raise DataError(f"{path} has the format {head['format']!r}, not {_FORMAT!r}; calibrate again")
                found = cls(head["model"], head["samples"], version=head["version"])
                found._require(model, str(path))
                found.tensors = {n: _read_tensor(arrays, entry) for n, entry in head["tensors"].items()}
                found.grams = {k: _read_gram(arrays, entry) for k, entry in head["grams"].items()}
        except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no statistics that can be read: {error}; calibrate again") from error
        return found

    def _require(self, model: str, what: str) -> None:
        if self.model != model:
            raise DataError(
                f"{what} and this model do not belong together, the hashes {self.model[:12]} and {model[:12]} of their "
                "models differ; calibrate again"
            )


def model_hash(model: Model) -> str:
    """SHA-256 in hexadecimal over the structure and all weights of a model."""
    from onnxcomp.serde import export_model

    proto, payloads = export_model(model)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for weight in payloads:
        digest.update(weight.digest())
    return digest.hexdigest()


def _write_tensor(arrays: dict[str, Array], key: str, statistics: TensorStatistics) -> dict[str, Any]:
    """Put arrays into `arrays`, and give the rest as what JSON can hold."""
    arrays[f"{key}.keys"], arrays[f"{key}.counts"] = statistics.histogram.sparse()
    channels = statistics.channels
    if channels is not None:
        arrays[f"{key}.peak"] = channels.peak
    return {
        "key": key,
        "minimum": float(statistics.minimum).hex(),
        "maximum": float(statistics.maximum).hex(),
        "count": statistics.count,
        "channels": None
        if channels is None
        else {"count": channels.count, "sums": _write_sum(arrays, f"{key}.sums", channels.sums)},
    }


def _read_tensor(arrays: Mapping[str, Array], entry: Mapping[str, Any]) -> TensorStatistics:
    key, part = entry["key"], entry["channels"]
    channels = None
    if part is not None:
        channels = Channels(_read_sum(arrays, part["sums"]), arrays[f"{key}.peak"], part["count"])
    return TensorStatistics(
        float.fromhex(entry["minimum"]),
        float.fromhex(entry["maximum"]),
        entry["count"],
        Histogram(arrays[f"{key}.keys"], arrays[f"{key}.counts"]),
        channels,
    )


def _write_gram(arrays: dict[str, Array], key: str, gram: Gram) -> dict[str, Any]:
    products = _write_sum(arrays, f"{key}.products", gram.sum_products)
    return {"rows": gram.rows, "products": products, "sum": _write_sum(arrays, f"{key}.sum", gram.sum)}


def _read_gram(arrays: Mapping[str, Array], entry: Mapping[str, Any]) -> Gram:
    return Gram(_read_sum(arrays, entry["products"]), _read_sum(arrays, entry["sum"]), entry["rows"])


def _write_sum(arrays: dict[str, Array], key: str, total: ExactSum) -> dict[str, Any]:
    arrays[key] = total.digits
    return {"key": key, "top": total.top, "finite": total.finite}


def _read_sum(arrays: Mapping[str, Array], entry: Mapping[str, Any]) -> ExactSum:
    digits = arrays[entry["key"]]
    total = ExactSum(digits.shape[1:], len(digits))
    total.digits, total.top, total.finite = digits, entry["top"], entry["finite"]
    return total
