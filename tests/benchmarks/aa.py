"""How often a model is called faster or slower than its own copy, and how often a real difference is found.

    python tests/benchmarks/aa.py [--runs 100] [--seconds 1] [--zoo ../shared/zoo]

Every run is a benchmark of its own with another seed, over small models of the zoo in turn; the copy is another file.
At most 5 of 100 may end in "faster" or "slower". Run it on a loaded machine too: that is where timing lies. Then, for a
tenth as many runs, ResNet-56 against ResNet-20, about three times as fast: "faster" is the true verdict.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import zoo

from onnxcomp.bench import benchmark
from onnxcomp.timing import FASTER, SAME

_MODELS = ("mnist_cntk", "hand_keypoint_mlp", "mlperf_kws_dscnn_fp32", "resnet20_cifar10", "sevenseg_cls_dith")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on after a break")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    args = parser.parse_args()
    false, ratios, floors = 0, [], []
    for run in range(args.first, args.first + args.runs):
        name = _MODELS[run % len(_MODELS)]
        model = args.zoo / "models" / f"{name}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(model, Path(folder) / "copy.onnx")
            found = compare(run, [model, copy], feeds(args.zoo, name), args.seconds)
        false += found.models[1].verdict != SAME
        ratios.append(abs(np.log(found.models[1].speedup)))
        floors.append(found.noise_floor)
    print(f"A/A: {false} false verdicts in {args.runs} runs, load average {os.getloadavg()[0]:.1f}")
    if ratios:
        largest, usual = np.quantile(ratios, [1.0, 0.5])
        print(f"measured differences: median {usual:.2%}, largest {largest:.2%}; median floor {np.median(floors):.1%}")
    real, data = args.runs // 10, feeds(args.zoo, "resnet20_cifar10")
    models = [args.zoo / "models" / f"{name}.onnx" for name in ("resnet56_cifar10", "resnet20_cifar10")]
    hits = sum(compare(run, models, data, args.seconds).models[1].verdict == FASTER for run in range(real))
    print(f"A/B: {hits} of {real} real differences found")


def feeds(folder: Path, name: str) -> list[dict[str, Any]]:
    """Four samples, one in each feed."""
    with np.load(zoo.feeds(folder / "feeds", name, "eval")) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "labels"}
    return [{key: value[i : i + 1] for key, value in arrays.items()} for i in range(4)]


def compare(run: int, models: list[Path], data: list[dict[str, Any]], seconds: float) -> Any:
    """One benchmark, in one line."""
    begin = perf_counter()
    found = benchmark(models, feeds=data, seconds=seconds, seed=run)
    rival = found.models[1]
    low, high = rival.ci
    print(
        f"{run:3d} {models[0].stem:22s} {rival.verdict:24s} {rival.speedup:.3f}x ({low:.3f} to {high:.3f}) "
        f"floor {found.noise_floor:.1%}, {found.rounds} processes, {perf_counter() - begin:.1f} s",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
