"""Sparse weights on models trained by others: the task's own metric by pattern, method, and with and without update.

    python tests/benchmarks/sparsity.py [--zoo FOLDER] [--ratios 0.5,0.7,0.8] [--variants default,wanda] [MODEL ...]

Calibration data are unlabelled and disjoint from what is evaluated; labels are only used to print. Every variant has
the same share of zeros in all weights that can be pruned:

    magnitude   the smallest weights of each layer, nothing else changes (what exporters and toolkits call pruning)
    wanda       |w| times the norm of its input, per layer, nothing else changes
    +update     the same masks, the weights that stay solved once, all layers with the same share
    obs         masks of SparseGPT, solved likewise
    admm        masks by splitting, solved likewise
    global      admm, shares by sensitivity
    default     the pass as it is: global, layer by layer on the pruned model's activations
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zoo as files

from onnxcomp import io
from onnxcomp.calibration.data import open_data
from onnxcomp.manager import Context, Pipeline
from onnxcomp.runtime import open_session

LOSSLESS = "cleanup,fold-constants,cleanup,fuse,cleanup"
MODELS = (
    "resnet20_cifar10 resnet56_cifar10 mlperf_pretrainedResnet_large_float mlperf_kws_dscnn_fp32 ppocr_cls "
    "ppocr_en_number_rec magika_standard_v3_3 nnsplit_en espcn_x3_d2s_op18 squeezenet_winml_fp32"
).split()
PLAIN = "allocation=uniform:sequential=false:sensitivity=false"
VARIANTS = {
    "magnitude": f"method=magnitude:update=false:{PLAIN}",
    "wanda": f"method=wanda:update=false:{PLAIN}",
    "magnitude+update": f"method=magnitude:{PLAIN}",
    "wanda+update": f"method=wanda:{PLAIN}",
    "obs+update": f"method=obs:{PLAIN}",
    "admm+update": f"method=admm:{PLAIN}",
    "global": "sequential=false",
    "uniform": "allocation=uniform",
    "default": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--zoo", type=Path, default=files.FOLDER)
    parser.add_argument("--ratios", default="0.5,0.7,0.8")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--options", default="", help="further options of the pass, such as pattern=2:4")
    arguments = parser.parse_args()
    for name in arguments.models:
        compare(name, arguments)


def compare(name: str, arguments: Any) -> None:
    """Print a line per variant and share of zeros."""
    zoo = files.load_evaluation(arguments.zoo)
    model = io.load(arguments.zoo / "models" / f"{name}.onnx")
    Pipeline.parse(LOSSLESS).run(model, Context())
    session = open_session(model)
    data = open_data(calibration(name, arguments.zoo, zoo), session.inputs)
    print(f"{name}: float {quality(name, model, arguments.zoo, zoo)}", flush=True)
    for ratio in arguments.ratios.split(","):
        for variant in arguments.variants.split(","):
            spec = ":".join(filter(None, [f"prune-weights:ratio={ratio}", VARIANTS[variant], arguments.options]))
            begin = time.perf_counter()
            pruned = model.copy()
            (record,) = Pipeline.parse(spec).run(pruned, Context(data=data))
            seconds = time.perf_counter() - begin
            found = record.details
            print(
                f"{name[:22]:22s} {ratio:>5s} {variant:17s} {quality(name, pruned, arguments.zoo, zoo):>9s} "
                f"zeros {found['sparsity']:.3f}  SQNR {found.get('sqnr_db', float('nan')):5.1f} dB {seconds:5.0f} s",
                flush=True,
            )


def calibration(name: str, folder: Path, zoo: Any) -> Any:
    if name != "ppocr_en_number_rec":
        return str(files.feeds(folder / "feeds", name, "calib"))
    return {"x": np.concatenate([picture for picture, _ in lines(zoo)[::4]])}


def lines(zoo: Any) -> list[tuple[Any, str]]:
    """Pictures of text lines, [1, 3, 32, 320], and what they say; every fourth is for calibration."""
    from PIL import Image

    rows = zoo.ocr_rows()
    return [(zoo.ocr_x(Image.open(zoo.d("ocr_render", r["file"])).convert("RGB"), 32, 320), r["text"]) for r in rows]


def quality(name: str, model: Any, folder: Path, zoo: Any) -> str:
    """The task's metric: accuracy in percent, F1, exact lines, PSNR; agreement for SqueezeNet, which has no labels."""
    if name == "ppocr_en_number_rec":
        return f"{100 * exact_lines(model, zoo):.2f}"
    evaluation = files.feeds(folder / "feeds", name, "eval")
    with np.load(evaluation) as file:
        labelled = "labels" in file
    if labelled or name.startswith("squeezenet"):
        session = open_session(model)
        reference = None if labelled else open_session(folder / "models" / f"{name}.onnx")
        right: list[Any] = []
        for batch in open_data(str(evaluation), session.inputs).batches():
            scores = session.run(batch.feeds)[0].reshape(batch.count, -1)
            wanted = batch.labels
            if reference is not None:
                wanted = reference.run(batch.feeds)[0].reshape(batch.count, -1).argmax(axis=1)
            right.append(scores.argmax(axis=1) == wanted)
        return f"{100 * float(np.mean(np.concatenate(right))):.2f}"
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        path.write_bytes(model.to_bytes())
        return str(next(iter(zoo.REG[name](str(path)).values())))


def exact_lines(model: Any, zoo: Any) -> float:
    session, right, count = open_session(model), 0, 0
    for number, (picture, text) in enumerate(lines(zoo)):
        if number % 4 == 0:
            continue
        best = session.run({"x": picture})[0][0].argmax(axis=1)
        said = "".join(zoo.DIC[c] for k, c in enumerate(best) if c and (k == 0 or best[k - 1] != c))
        right, count = right + (said == text), count + 1
    return right / count


if __name__ == "__main__":
    main()
