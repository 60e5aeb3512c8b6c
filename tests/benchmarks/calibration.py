"""What calibration costs: time and peak memory beside plain inference and ONNX Runtime's calibrators.

    python tests/benchmarks/calibration.py [--samples 512] [--rounds 3] [MODEL.onnx DATA.npz ...]
    python tests/benchmarks/calibration.py --growth            # peak memory for 64 and 1,024 samples

All use one thread, the same samples in batches of 16, and the same graph, from which the lossless passes have removed
BatchNormalization. Time is CPU time of the process, the median of rounds in which the candidates take turns; for the
calibrators and for us it includes opening the session, for plain inference it does not. Peak memory is VmHWM of a
process of its own. Without arguments: the digits ResNet of models/, CIFAR ResNets of the zoo where it is there, and
MobileNetV2 with random weights (needs torch; 96 samples).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import io
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.calibration.runner import collect
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pipeline, run_pass
from onnxcomp.passes.placement import place
from onnxcomp.runtime import open_session
from onnxcomp.shapes import infer

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "zoo"
BATCH = 16


def prepared(path: str) -> Model:
    model = io.load(path)
    for one in Pipeline.parse("cleanup,fold-constants,fuse").passes:
        run_pass(one, model, Context())
    return model


def dataset(path: str, model: Model, samples: int) -> Dataset:
    """The samples of a file, repeated until there are enough; a batch at a time, so that they take no memory."""
    session = open_session(model)
    with np.load(path) as arrays:
        name = session.inputs[0].name
        array = arrays[name] if name in arrays else arrays[next(n for n in arrays if n != "labels")]

    def read() -> Iterator[dict[str, Any]]:
        for start in range(0, samples, BATCH):
            yield {name: array[np.arange(start, min(start + BATCH, samples)) % len(array)].astype(np.float32)}

    return open_data(read, session.inputs, batch=BATCH)


def plain(model: Model, data: Dataset) -> Callable[[], None]:
    session = open_session(model)

    def run() -> None:
        for batch in data.batches():
            session.run(batch.feeds)

    return run


def ours(model: Model, data: Dataset) -> Callable[[], None]:
    names = [t.name for t in place(model, model.graph, infer(model), Context()).quantized]
    return lambda: (collect(model, data, dict.fromkeys(names)), None)[1]


def peer(method: str, path: str, data: Dataset) -> Callable[[], None]:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    class Reader:
        def __init__(self) -> None:
            self.batches = data.batches()

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else dict(batch.feeds)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrator = create_calibrator(
                path, None, str(Path(folder) / "augmented.onnx"), calibrate_method=CalibrationMethod[method]
            )
            calibrator.set_execution_providers(["CPUExecutionProvider"])
            options_of(calibrator)
            calibrator.collect_data(Reader())
            calibrator.compute_data()

    return run


def options_of(calibrator: Any) -> None:
    """One thread for them as well: they open the session with default options."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    calibrator.infer_session = ort.InferenceSession(
        calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
    )


def candidates(path: str, data_path: str, samples: int) -> dict[str, Callable[[], Callable[[], None]]]:
    model = prepared(path)
    data = dataset(data_path, model, samples)
    fused = Path(tempfile.gettempdir()) / f"onnxcomp-calibration-{Path(path).stem}.onnx"
    io.save(model, fused, overwrite=True)
    return {
        "plain": lambda: plain(model, data),
        "onnxcomp": lambda: ours(model, data),
        **{f"ORT {m}": (lambda m=m: peer(m, str(fused), data)) for m in ("MinMax", "Entropy", "Percentile")},
    }


def peak(path: str, data_path: str, samples: int, name: str) -> float:
    """VmHWM in MB of a process that does one thing."""
    job = [path, data_path, str(samples), name]
    done = subprocess.run([sys.executable, __file__, "--child", *job], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def child(path: str, data_path: str, samples: str, name: str) -> None:
    candidates(path, data_path, int(samples))[name]()()
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith("VmHWM"))
    print(json.dumps(int(line.split()[1]) / 1024))


def compare(path: str, data_path: str, samples: int, rounds: int) -> None:
    runs = {name: make() for name, make in candidates(path, data_path, samples).items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    base = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        ratios = sorted(v / p for v, p in zip(values, seconds["plain"], strict=True))
        print(
            f"{Path(path).stem:24s} {name:16s} {statistics.median(values) * 1e3:8.0f} ms "
            f"{statistics.median(values) / base:6.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f}) "
            f"{peak(path, data_path, samples, name):8.0f} MB",
            flush=True,
        )


def growth(path: str, data_path: str) -> None:
    few, many = (peak(path, data_path, samples, "onnxcomp") for samples in (64, 1024))
    print(f"{Path(path).stem:24s} peak {few:.0f} MB at 64 samples, {many:.0f} MB at 1,024 ({many / few - 1:+.1%})")


def mobilenet(folder: str) -> tuple[str, str]:
    from architectures import export, feeds

    path, data = f"{folder}/mobilenet_v2.onnx", f"{folder}/mobilenet_v2.npz"
    export("mobilenet_v2", Path(path), 17, folded=True)
    np.savez(data, **feeds("mobilenet_v2", 32))
    return path, data


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    pairs = list(zip(options.files[::2], options.files[1::2], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        if not pairs:
            models = ROOT / "models"
            pairs = [(str(models / "digits_resnet.onnx"), str(models / "data" / "digits_resnet.calib.npz"))]
            cifar = ZOO / "feeds" / "cifar_nchw.calib.npz"
            names = ("resnet20_cifar10", "resnet56_cifar10")
            pairs += [(str(ZOO / "models" / f"{n}.onnx"), str(cifar)) for n in names if cifar.exists()]
            if not options.growth:
                pairs.append(mobilenet(folder))
        for path, data in pairs:
            if options.growth:
                growth(path, data)
            else:
                samples = min(options.samples, 96) if "mobilenet" in path else options.samples
                compare(path, data, samples, options.rounds)


if __name__ == "__main__":
    main()
