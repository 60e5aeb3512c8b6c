"""TensorRT engines kept between runs, one folder for each content of a model.

ONNX Runtime names an engine by the names in the graph, not by its weights, attributes or shapes: a pruned model under
its original's name would run the original's engine. Here the folder and the prefix of the engine are the SHA-256 of
the model file, its data files, the options, the shapes fed and the version of ONNX Runtime, so that an engine is found
again only for what it was built from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcomp import io
from onnxcomp.cache import cache_folder

__all__ = ["Engine", "engine"]

_RECORD = "build.json"


@dataclass(frozen=True)
class Engine:
    """Where the engine of a model is kept. `options` are TensorRT's provider options that use it."""

    folder: Path
    options: dict[str, str]

    @property
    def build_ms(self) -> float | None:
        """What building it took, None if it has not been built yet."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))["build_ms"])
        return None

    def record(self, build_ms: float) -> None:
        """Remember that the engine has been built, and how long that took."""
        io.save_text(json.dumps({"build_ms": build_ms}), self.folder / _RECORD, overwrite=True)


def engine(
    model: Path, shapes: Mapping[str, Sequence[tuple[int, ...]]], *, version: str, root: Path | None = None
) -> Engine:
    """The place for the engine of the model file `model`; its folder is made where it is not there.

    `shapes` are those of each input in the feeds to come: an engine is built for the shapes that it has seen.
    `version` is that of ONNX Runtime. `root` is the cache, the user's by default.
    """
    options = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    digest = hashlib.sha256()
    for path in io.model_files(model):
        digest.update(io.sha256(path).encode())
    digest.update(json.dumps([options, version, shapes], sort_keys=True).encode())
    key = digest.hexdigest()
    base = (root or cache_folder()) / "tensorrt"
    folder = base / key
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # an engine is native code
    places = {
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": key[:16],
        "trt_timing_cache_path": str(base),  # what kernels take does not depend on the model
    }
    return Engine(folder, {**options, **places})
