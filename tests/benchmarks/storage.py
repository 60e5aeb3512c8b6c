"""What `pack` makes of models whose weights have few values: bytes, load time, memory and run time, against unpacked.

    python tests/benchmarks/storage.py [--models FOLDER] [--only NAME] [--values 16] [--zeros 0.8] [--seconds 2]

Weights (float initializers and Constant nodes of two axes and 256 elements or more) are set to zero below a quantile of
their magnitude; the others become their nearest of `values` means (Lloyd's algorithm, per tensor). That is a storage
test: the outputs mean nothing. Both files are then timed side by side in the same processes. "equal" says that the
outputs are bit-equal, "folded" that no kernel ran more often (packed look-up tables add a few: "rows"), "back" that the
unpacked file is the plain one byte by byte, "left" how many tensors were left alone for a reason.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnxcomp
from onnxcomp import io
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context, run_pass
from onnxcomp.passes.pack import Pack
from onnxcomp.passes.unpack import Unpack
from onnxcomp.runtime import open_session
from onnxcomp.serde import export_model
from onnxcomp.storage import DOMAIN
from onnxcomp.synthesis import usable_inputs

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("model", "plain kB", "packed kB", "ratio", "pack s", "load", "peak MB", "run (95 %)", "equal", "folded",
           "back", "left")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "zoo" / "models")
    parser.add_argument("--only", default="")
    parser.add_argument("--values", type=int, default=16)
    parser.add_argument("--zeros", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    print(" | ".join(COLUMNS), flush=True)
    paths = [*sorted((ROOT / "models").glob("*.onnx")), *sorted(arguments.models.glob("*.onnx"))]
    for path in paths:
        if arguments.only in path.stem:
            with tempfile.TemporaryDirectory() as folder:
                print(" | ".join(row(path, Path(folder), arguments)), flush=True)


def row(path: Path, folder: Path, arguments: Any) -> tuple[str, ...]:
    """One line of the table."""
    model = io.load(path)
    simplify(model, arguments.values, arguments.zeros)
    plain = io.save(model, folder / "plain.onnx")
    model = io.load(plain.path)
    record = run_pass(Pack(), model, Context())
    packed = io.save(model, folder / "packed.onnx")
    again = io.load(packed.path)
    run_pass(Unpack(), again, Context())
    back = io.save(again, folder / "again.onnx").path.read_bytes() == plain.path.read_bytes()
    found = onnxcomp.benchmark(plain.path, packed.path, seconds=arguments.seconds)
    before, after = found.models
    run = "-" if after.speedup is None or after.ci is None else f"{1 / after.speedup:.2f}x"
    if after.ci is not None:
        run += f" ({1 / after.ci[1]:.2f}-{1 / after.ci[0]:.2f})"
    counts = {k.op: k.count for k in before.kernels}
    folded = "yes" if all(k.count <= counts.get(k.op, 0) for k in after.kernels) else "NO"
    if any(n.domain == DOMAIN and n.op.startswith("Rows") for n in model.nodes()):
        folded = "rows"
    return (
        path.stem,
        f"{plain.bytes / 1e3:.1f}",
        f"{packed.bytes / 1e3:.1f}",
        f"{plain.bytes / packed.bytes:.2f}x",
        f"{record.seconds:.1f}",
        f"{before.load_ms:.0f} -> {after.load_ms:.0f} ms",
        f"{before.peak_memory_bytes / 1e6:.0f} -> {after.peak_memory_bytes / 1e6:.0f}",
        run,
        "yes" if equal(plain.path, packed.path) else "NO",
        folded,
        "yes" if back else "no",
        str(len(record.refused)),
    )


def simplify(model: Model, values: int, zeros: float) -> None:
    """Few values in the weights, and most of them zero, in place."""
    for scope in model.graph.scopes():
        held = [n.attrs["value"] for n in scope.nodes if n.kind == "Constant" and "value" in n.attrs]
        for item in (*scope.initializers, *held):
            wide = isinstance(item, Constant) and len(item.shape) > 1 and item.weight.size >= 256
            if wide and item.dtype in (np.float32, np.float16):
                item.values = simplified(item.values, values, zeros)


def simplified(weight: npt.NDArray[Any], values: int, zeros: float) -> npt.NDArray[Any]:
    """A weight with at most so many values besides zero."""
    flat = weight.reshape(-1).astype(np.float64)
    kept = np.abs(flat) > np.quantile(np.abs(flat), zeros) if zeros else np.ones(flat.shape, bool)
    if not kept.any():
        return np.zeros_like(weight)
    means = np.unique(np.quantile(flat[kept], (np.arange(values) + 0.5) / values))
    for _ in range(10):
        owner = np.searchsorted((means[1:] + means[:-1]) / 2, flat[kept])
        counts = np.bincount(owner, minlength=len(means))
        sums = np.bincount(owner, flat[kept], minlength=len(means))
        means = np.unique(np.where(counts > 0, sums / np.maximum(counts, 1), means))
    result = np.zeros_like(flat)
    result[kept] = means[np.searchsorted((means[1:] + means[:-1]) / 2, flat[kept])]
    return result.astype(weight.dtype).reshape(weight.shape)


def equal(first: Path, second: Path) -> bool:
    """Whether both give the same bits."""
    sessions = [open_session(p) for p in (first, second)]
    feeds = next(iter(usable_inputs(sessions[0], export_model(io.load(first))[0], seed=0, count=1)))
    outputs = [s.run(feeds) for s in sessions]
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*outputs, strict=True))


if __name__ == "__main__":
    main()
