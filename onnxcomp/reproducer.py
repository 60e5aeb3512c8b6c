"""A folder that shows a guilty rewrite: a model as small as still shows it, inputs, and a script that runs it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp import io
from onnxcomp.blame import Clock
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.calibration.runner import expose
from onnxcomp.calibration.split import limited
from onnxcomp.environment import environment
from onnxcomp.errors import OnnxcompError
from onnxcomp.extract import extract
from onnxcomp.graph import Constant, Graph, Model, Node, producer
from onnxcomp.manager import Pass
from onnxcomp.options import Options
from onnxcomp.rollback import Step
from onnxcomp.runtime import open_session
from onnxcomp.samples import Samples

__all__ = ["Reproducer", "Trial", "Try", "reproduce"]

Array = npt.NDArray[Any]
_SAMPLES = 16
_HOPS = (1, 3)  # nodes around what the rewrite changed
_WEIGHT = 64  # elements from which a float constant counts as a weight

_SCRIPT = '''\
"""{sentence}

Runs the pass on the model of this folder and says which rewrite is guilty: python run.py
"""

from pathlib import Path

import numpy as np

from onnxcomp.bisection import bisect

here = Path(__file__).parent
inputs = dict(np.load(here / "inputs.npz"))
calib = here / "calib.npz"
found = bisect(
    here / "model.onnx",
    passes={passes!r},
    calib=[dict(np.load(calib))] if calib.exists() else None,
    eval=[inputs],
    max_drop={max_drop!r},
    tolerance={tolerance!r},
    seed={seed!r},
)
print(found.sentence)
for culprit in found.culprits:
    print(f"rewrite {{culprit.number}}: error {{culprit.before:.3g}} without, {{culprit.after:.3g}} with it")
'''


@dataclass(frozen=True)
class Trial:
    """The error of a changed model (noise power / signal power), and why it is too large; no reason: it is not."""

    error: float
    reason: str


@dataclass(frozen=True)
class Try:
    """What a reproducer has to show: the pass on its model, the rewrites that are guilty, and the judge.

    `verdict`(pass, reference, changed model, data) is the one that found them guilty.
    """

    step: Step
    texts: frozenset[str]
    samples: Samples
    options: Options
    verdict: Callable[[Pass, Any, Any, Any], Trial]

    def shows(self, model: Model, feeds: Mapping[str, Array], calib: Mapping[str, Array] | None) -> bool:
        """Whether the pass spoils this model on one batch of inputs."""
        try:
            inputs = open_session(model).inputs
            data = None if calib is None else open_data([dict(calib)], inputs)
            step = Step(self.step.one, model, lambda: replace(self.step.context(), data=data))
            changed = step.run().model
            return bool(self.verdict(self.step.one, model, changed, open_data([dict(feeds)], inputs)).reason)
        except OnnxcompError:
            return False


@dataclass(frozen=True)
class Reproducer:
    """What was written: `weights` are the model's own or random ones, `part` the number of its nodes."""

    folder: str
    weights: str
    nodes: int
    of_nodes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reproduce(attempt: Try, folder: Path, tolerance: float | None, clock: Clock) -> Reproducer:
    """Write model.onnx, inputs.npz, calib.npz (if the pass needs calibration), run.py and reproducer.json.

    The model is the one before the pass: the part around the guilty rewrites if the fault shows on it, and with random
    weights (seeded) if it shows with them as well.
    """
    base = attempt.step.before()
    fit = attempt.samples.calibration if attempt.step.one.needs_data else None
    held = attempt.samples.verification or attempt.samples.calibration
    feeds, calib = _first(held, attempt), None if fit is None else _first(fit, attempt)
    model, weights = base, "original"
    for hops in _HOPS:
        if clock.up:
            break
        part = _part(attempt, base, hops, feeds, calib)
        if part is not None and attempt.shows(*part):
            model, feeds, calib = part
            break
    random = _randomized(model, attempt.options.seed)
    if not clock.up and attempt.shows(random, feeds, calib):
        model, weights = random, f"random, seed {attempt.options.seed}"
    made = Reproducer(str(folder), weights, len(model.graph.nodes), len(base.graph.nodes))
    _write(folder, model, feeds, calib, made, attempt, tolerance)
    return made


def _write(
    folder: Path, model: Model, feeds: Mapping[str, Array], calib: Mapping[str, Array] | None, made: Reproducer,
    attempt: Try, tolerance: float | None,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    force, passes, o = attempt.options.force, str(attempt.step.one), attempt.options
    io.save(model, folder / "model.onnx", overwrite=force)
    np.savez_compressed(folder / "inputs.npz", **feeds)  # type: ignore[arg-type]
    if calib is not None:
        np.savez_compressed(folder / "calib.npz", **calib)  # type: ignore[arg-type]
    listed = ", ".join(sorted(attempt.texts))
    sentence = f"pass {passes}: guilty is {listed}".replace("\\", "/").replace('"""', "'''")
    script = _SCRIPT.format(
        sentence=sentence, passes=passes, max_drop=o.max_drop, tolerance=tolerance, seed=o.seed
    )
    io.save_text(script, folder / "run.py", overwrite=force)
    facts = {
        "pass": passes,
        "rewrites": sorted(attempt.texts),
        "command": "python run.py",
        "options": {"max_drop": o.max_drop, "tolerance": tolerance, "seed": o.seed, "threads": o.threads},
        "weights": made.weights,
        "nodes": made.nodes,
        "of_nodes": made.of_nodes,
        "environment": environment(),
    }
    io.save_text(json.dumps(facts, indent=2) + "\n", folder / "reproducer.json", overwrite=force)


def _first(data: Dataset | None, attempt: Try) -> dict[str, Array]:
    if data is None:
        return dict(attempt.samples.feeds[0])
    return dict(next(iter(limited(data, _SAMPLES).batches())).feeds)


# --- the part around the rewrites ---


def _part(
    attempt: Try, base: Model, hops: int, feeds: Mapping[str, Array], calib: Mapping[str, Array] | None
) -> tuple[Model, dict[str, Array], dict[str, Array] | None] | None:
    """The nodes within `hops` of what the guilty rewrites changed, and the values that go in; None if that is all."""
    good, bad = attempt.step.run(deny=frozenset(attempt.texts)), attempt.step.run()
    changed = {name for name, _ in set(_signatures(good.model)) ^ set(_signatures(bad.model))}
    near = _around(base.graph, changed, hops)
    if not near or len(near) == len(base.graph.nodes):
        return None
    made = {t for node in near for t in node.outputs if t.name}
    read = [t for node in base.graph.nodes if node in near for t in node.reads()]
    enter = {t.name for t in read if t not in made and (t.inputs or t in base.graph.inputs)}
    enter -= {t.name for t in read if (p := producer(t)) is not None and p.kind == "Constant"}
    leave = [t.name for t in made if t in base.graph.outputs or any(n not in near for n in t.outputs)]
    names = sorted(enter)
    session = expose(base, [n for n in names if n not in feeds])
    taken = [_values(session, names, given) for given in (feeds, calib) if given is not None]
    if any(v.dtype == object for v in taken[0].values()):
        return None
    part, _ = extract(base, {n: (v.dtype, v.shape) for n, v in taken[0].items()}, sorted(leave))
    used = {t.name for t in part.graph.inputs}
    kept = [{n: v for n, v in values.items() if n in used} for values in taken]
    return part, kept[0], kept[1] if calib is not None else None


def _values(session: Any, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    asked = [n for n in names if n not in feeds]
    found = dict(zip(asked, session.run(feeds, asked) if asked else [], strict=True))
    return {n: np.asarray(feeds[n] if n in feeds else found[n]) for n in names}


def _signatures(model: Model) -> Iterator[tuple[str, str]]:
    """Each computed value of the main graph with what computes it: operator, attributes, inputs."""
    for node in model.graph.nodes:
        inputs = [t.weight.digest().hex() if isinstance(t, Constant) else t.name for t in node.inputs]
        attrs = [(k, "graph" if isinstance(v, Graph) else repr(v)) for k, v in sorted(node.attrs.items())]
        for output in node.outputs:
            yield output.name, repr((node.kind, attrs, inputs))


def _around(graph: Graph, names: set[str], hops: int) -> set[Node]:
    home = set(graph.nodes)
    near = {n for n in graph.nodes if any(t.name in names for t in (*n.outputs, *n.inputs) if t.name)}
    for _ in range(hops - 1):
        before = {p for n in near for t in n.reads() for p in t.inputs}
        near |= (before | {r for n in near for t in n.outputs for r in t.outputs}) & home
    return near


def _randomized(model: Model, seed: int) -> Model:
    """A copy whose float weights are drawn anew, with the mean and the spread of the old ones."""
    copy = model.copy()
    for scope in copy.graph.scopes():
        for constant in scope.initializers:
            if isinstance(constant, Constant) and constant.dtype.kind == "f" and constant.weight.size >= _WEIGHT:
                values = constant.values.astype(np.float64)
                rng = np.random.default_rng([seed, zlib.crc32(constant.name.encode())])
                drawn = rng.normal(values.mean(), values.std(), values.shape)
                positive = bool((values >= 0).all())  # variances have to stay what they are
                constant.values = (np.abs(drawn) if positive else drawn).astype(constant.dtype)
    return copy
