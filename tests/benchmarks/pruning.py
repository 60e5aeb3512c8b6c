"""Channel removal: what can be reached on many architectures, and accuracy and speed on real networks.

    python tests/benchmarks/pruning.py coverage [--peers PYTHON] [--only NAME]
    python tests/benchmarks/pruning.py accuracy [--zoo FOLDER] [--only NAME] [--shares 0.75,0.6,0.5]
    python tests/benchmarks/pruning.py budget [--zoo FOLDER] [--only NAME] [--drop 0.01]

`coverage` removes 30 % of every group of networks with random weights and prints the share of weight elements in
reach, the largest difference from the original with those slices set to zero (and averages taken over what stays),
parameters that stay, and seconds of the analysis. `--peers` is a Python with
onnxsim, whose pruning at the same setting stands beside it: parameters that stay, and whether ONNX Runtime runs the
result on two samples.

`accuracy` prunes trained networks to shares of their multiplications and prints the share reached, top-1 before and
after repair, and the speed-up on one thread (best of interleaved runs). Unlabelled calibration data, labels only to
print.

`budget` lets the pass find how much may go at a drop, for each model with calibration data, and prints the shares of
multiplications and parameters that stay, what the pass saw on held-out samples, the drop and SQNR on evaluation
samples that it did not see, and the share of the time that stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zoo

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LOSSLESS = "cleanup,fold-constants,cleanup,fuse,cleanup"
TRAINED = (
    *("resnet20_cifar10", "resnet56_cifar10", "mlperf_pretrainedResnet_large_float"),
    *("mlperf_kws_dscnn_fp32", "mnist_cntk"),
)
PEER = """
import sys, onnx, onnxsim
from onnxsim.pruning import apply_structured_pruning
onnx.save(apply_structured_pruning(onnxsim.simplify(onnx.load(sys.argv[1]))[0], 0.3), sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("coverage", "accuracy", "budget"))
    parser.add_argument("--peers", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--shares", default="0.75,0.6,0.5")
    parser.add_argument("--options", default="", help="further options of the pass, such as price=macs")
    parser.add_argument("--drop", type=float, default=0.01)
    arguments = parser.parse_args()
    {"coverage": coverage, "accuracy": accuracy, "budget": budget}[arguments.what](arguments)


# --- coverage -----------------------------------------------------------------------------------------------


def coverage(arguments: Any) -> None:
    from tests.architectures import NAMES, build

    print(f"{'network':18s} {'reach':>6s} {'error':>8s} {'params':>7s} {'batch 2':>8s} {'seconds':>8s} | onnxsim")
    with tempfile.TemporaryDirectory() as folder:
        for name in (n for n in NAMES if arguments.only in n):
            proto = build(name)
            print(f"{name:18s} {ours(proto)} | {peer(proto, arguments.peers, Path(folder))}", flush=True)


def ours(proto: Any) -> str:
    from onnxcomp.manager import Context, Pipeline
    from onnxcomp.passes.dim_probe import plain_form
    from onnxcomp.passes.dim_proof import removal_error
    from onnxcomp.passes.dims import couple
    from onnxcomp.passes.surgery import remove
    from onnxcomp.runtime import open_session
    from onnxcomp.serde import from_proto

    model = from_proto(proto)
    Pipeline.parse(LOSSLESS).run(model, Context())
    begin = time.perf_counter()
    found = couple(plain_form(model))
    seconds = time.perf_counter() - begin
    feeds = [f for f in (found.probe.feeds, found.probe.larger) if f is not None]
    units = [u for g in found.groups for u in g.units[: int(0.3 * g.width)]]
    cut = remove(found, units)
    error = removal_error(found, units, cut.model, feeds)
    session = open_session(cut.model)
    runs = all(session.run(feed) for feed in feeds) and len(feeds) == 2
    stays = elements(cut.model) / elements(found.model)
    return f"{found.reachable():6.1%} {error:8.0e} {stays:7.1%} {'runs' if runs else 'no':>8s} {seconds:8.2f}"


def elements(model: Any) -> int:
    from onnxcomp.passes.dims import weights

    return sum(t.weight.size for t in weights(model))


def peer(proto: Any, python: str, folder: Path) -> str:
    import onnx

    if not python:
        return "-"
    source, target = folder / "in.onnx", folder / "out.onnx"
    onnx.save(proto, source)
    command = [python, "-W", "ignore", "-c", PEER, str(source), str(target)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "crash"
    sizes = [sum(i.ByteSize() for i in onnx.load(p).graph.initializer) for p in (source, target)]
    return f"{sizes[1] / sizes[0]:.1%} {runs_on_two(target)}"


def runs_on_two(path: Path) -> str:
    from onnxcomp.runtime import open_session
    from onnxcomp.synthesis import synthesize

    try:
        session = open_session(path)
        symbols = {d: 2 for spec in session.inputs for d in spec.shape or () if isinstance(d, str)}
        session.run(synthesize(session.inputs, None, seed=0, count=1, sizes=symbols)[0])
    except Exception as error:  # ONNX Runtime's exception types share no base class
        return f"does not run: {' '.join(str(error).split())[:60]}"
    return "runs"


# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy(arguments: Any) -> None:
    import numpy as np

    from onnxcomp import io
    from onnxcomp.calibration.data import open_data
    from onnxcomp.manager import Context, Pipeline
    from onnxcomp.runtime import open_session

    folder = arguments.zoo / "feeds"
    print(f"{'network':36s}   macs  params  float    cut repaired  faster     s")
    for name in (n for n in TRAINED if arguments.only in n):
        model = io.load(arguments.zoo / "models" / f"{name}.onnx")
        Pipeline.parse(LOSSLESS).run(model, Context())
        data = open_data(str(zoo.feeds(folder, name, "calib")), open_session(model).inputs)
        with np.load(zoo.feeds(folder, name, "eval")) as file:
            evaluation = dict(file)
        for share in arguments.shares.split(","):
            spec = ":".join([f"prune-channels:macs={share}", *filter(None, [arguments.options])])
            begin = time.perf_counter()
            pruned = model.copy()
            (record,) = Pipeline.parse(spec).run(pruned, Context(data=data))
            seconds = time.perf_counter() - begin
            bare = model.copy()
            kept = {(e["tensor"], e["axis"]): e["kept"] for e in record.details.get("prune_map", [])}
            cells = [top1(model, evaluation), top1(sliced(bare, kept), evaluation), top1(pruned, evaluation)]
            reached = f"{record.details['macs']:6.3f} {record.details['params']:7.3f}"
            quality = f"{cells[0]:6.2f} {cells[1]:6.2f} {cells[2]:8.2f}"
            faster = speedup(model, pruned, evaluation)
            print(f"{name:36s} {reached} {quality} {faster:6.2f}x {seconds:5.0f}", flush=True)


def budget(arguments: Any) -> None:
    from onnxcomp import io
    from onnxcomp.calibration.data import open_data
    from onnxcomp.calibration.split import limited
    from onnxcomp.manager import Context, Pipeline
    from onnxcomp.passes.judge import Judge
    from onnxcomp.runtime import open_session

    folder = arguments.zoo / "feeds"
    for path in sorted((arguments.zoo / "models").glob(f"*{arguments.only}*.onnx")):
        parts = [str(zoo.feeds(folder, path.stem, part)) for part in ("calib", "eval")]
        if not Path(parts[0]).exists():
            continue
        model = io.load(path)
        Pipeline.parse(LOSSLESS).run(model, Context())
        inputs = open_session(model).inputs
        calibration, evaluation = (open_data(part, inputs) for part in parts)
        begin = time.perf_counter()
        pruned = model.copy()
        context = Context(data=limited(calibration, 512), max_drop=arguments.drop)
        (record,) = Pipeline.parse("prune-channels").run(pruned, context)
        sqnr, drop, _ = Judge(model, evaluation, samples=3000).assess(pruned)
        found = record.details
        print(
            f"{path.stem:36s} macs {found['macs']:.3f} params {found['params']:.3f} held {found.get('after_repair')} "
            f"drop {drop:.4f} SQNR {sqnr:.1f} dB time {found.get('time')} {time.perf_counter() - begin:.0f} s",
            flush=True,
        )


def sliced(model: Any, kept: Any) -> Any:
    """The same removal without repair: the coupled plain form, cut to the units of the prune map."""
    from onnxcomp.passes.dim_probe import plain_form
    from onnxcomp.passes.dims import couple
    from onnxcomp.passes.surgery import remove

    found = couple(plain_form(model))
    gone = {
        int(label)
        for tensor in found.offsets
        for axis in range(len(found.probe.shapes[tensor]))
        if (tensor.name, axis) in kept
        for i, label in enumerate(found.label(tensor, axis))
        if i not in set(kept[tensor.name, axis])
    }
    return remove(found, gone).model


def top1(model: Any, evaluation: Any) -> float:
    import numpy as np

    from onnxcomp.calibration.data import open_data
    from onnxcomp.runtime import open_session

    session = open_session(model)
    right = [
        session.run(batch.feeds)[0].argmax(axis=1) == batch.labels
        for batch in open_data(evaluation, session.inputs).batches()
    ]
    return 100 * float(np.mean(np.concatenate(right)))


def speedup(before: Any, after: Any, evaluation: Any) -> float:
    from onnxcomp.runtime import open_session

    sessions = [open_session(m, threads=1) for m in (before, after)]
    feed = {spec.name: evaluation[spec.name][:1] for spec in sessions[0].inputs}
    best = [float("inf")] * 2
    for _ in range(400):
        for k, session in enumerate(sessions):
            begin = time.perf_counter()
            session.run(feed)
            best[k] = min(best[k], time.perf_counter() - begin)
    return best[0] / best[1]


if __name__ == "__main__":
    main()
