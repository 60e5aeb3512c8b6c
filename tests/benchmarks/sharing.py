"""Weight sharing against plain k-means: the true metric at 4, 3 and 2 bits per weight.

    python tests/benchmarks/sharing.py [--zoo ../shared/zoo] [--bits 4 3 2] [--int8] [--drop 1%] [MODEL ...]

For each model and number of bits: k-means per tensor with weights to the nearest entry (what others do), and
`share-weights`. Both share the same tensors of the same model (after cleanup, fold-constants, fuse; with --int8 also
quantize). Metrics are those of the zoo's evaluate.py; the SQNR is that of the outputs on the evaluation samples against
the model before sharing. `x` is the ratio of the file before to the estimated file with indices of so many bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zoo

import onnxcomp
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pipeline
from onnxcomp.runtime import open_session

_SAMPLES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet20_cifar10", "mlperf_kws_dscnn_fp32"])
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--drop", help="also the bits that share-weights chooses for this drop")
    args = parser.parse_args()
    print(f"{'model':36s} {'pass':34s} {'bits':>5s} {'x':>5s} {'SQNR':>6s} {'s':>4s}  metric", flush=True)
    for name in args.models:
        compare(name, args)


def compare(name: str, args: argparse.Namespace) -> None:
    """Print one line per way to share."""
    from onnxcomp.calibration.split import limited

    model = onnxcomp.load(args.zoo / "models" / f"{name}.onnx")
    original = len(model.to_bytes())
    inputs = open_session(model).inputs
    calib = limited(open_data(zoo.feeds(args.zoo / "feeds", name, "calib"), inputs), _SAMPLES)
    evaluation = open_data(zoo.feeds(args.zoo / "feeds", name, "eval"), inputs)
    before = "cleanup,fold-constants,fuse" + (",quantize" if args.int8 else "")
    Pipeline.parse(before).run(model, Context(data=calib))
    metric = _metric(args.zoo, name)
    print(f"{name:36s} {before.rpartition(',')[2]:34s} {'':18s} {'':4s}  {metric(model)}", flush=True)
    specs = []
    for bits in args.bits:
        specs += [f"share-weights:bits={bits}:form=tensor:assignment=nearest", f"share-weights:bits={bits}"]
    specs += [f"share-weights:drop={args.drop}"] if args.drop else []
    for spec in specs:
        copy, begin = model.copy(), time.perf_counter()
        details: Mapping[str, Any] = Pipeline.parse(spec).run(copy, Context(data=calib))[0].details
        seconds = time.perf_counter() - begin
        if not details["shared"]:
            print(f"{name:36s} {spec:34s} {details}", flush=True)
            continue
        what = ("k-means" if "nearest" in spec else "share-weights") + " " + spec.split(":")[1]
        ratio, sqnr = original / details["estimated_bytes"], _sqnr(model, copy, evaluation)
        print(
            f"{name:36s} {what:34s} {details['bits_per_weight']:5.2f} {ratio:5.1f} {sqnr:6.1f} {seconds:4.0f}"
            f"  {metric(copy)}", flush=True,
        )  # fmt: skip


def _metric(folder_of_zoo: Path, name: str) -> Any:
    """The zoo's own metric of a model, as a function of the model."""
    module = zoo.load_evaluation(folder_of_zoo)

    def measure(model: Model) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnxcomp.save(model, path)
            return module.REG[name](str(path))

    return measure


def _sqnr(reference: Model, candidate: Model, data: Dataset) -> float:
    """dB, all float outputs together."""
    a, b = open_session(reference), open_session(candidate)
    signal = noise = 0.0
    for batch in data.batches(_SAMPLES):
        for x, y in zip(a.run(batch.feeds), b.run(batch.feeds), strict=True):
            if np.asarray(x).dtype.kind == "f":
                wide = np.asarray(x, np.float64)
                signal += float(np.square(wide).sum())
                noise += float(np.square(wide - y).sum())
    return float(10 * np.log10(signal / max(noise, 1e-30)))


if __name__ == "__main__":
    main()
