"""What a pass did wrong is taken back alone; the rest of its work stays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import onnxcomp
from onnxcomp import rollback
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass

MODELS = Path(__file__).parent.parent / "models"
DATA = MODELS / "data"


@dataclass(frozen=True)
class Touch(Pass):
    """Copies every constant of the model; those named in `broken` are damaged by it."""

    name: ClassVar[str] = "touch"
    effect: ClassVar[Effect] = "float"

    broken: tuple[int, ...] = ()

    def run(self, model: Model, ctx: Context) -> None:
        for number, constant in enumerate(model.graph.initializers):
            if ctx.allow(f"copy {constant.name}"):
                values = np.array(constant.values)
                constant.values = values * -3 if number in self.broken else values


@dataclass(frozen=True)
class LossyTouch(Touch):
    name: ClassVar[str] = "lossy-touch"
    effect: ClassVar[Effect] = "lossy"


def optimized(one: Pass, tmp_path: Path, **options: Any) -> onnxcomp.Report:
    return onnxcomp.optimize(
        MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", passes=["cleanup", one, "fuse"],
        calib=DATA / "cancer_mlp.calib.npz", bench_seconds=0.0, goal="latency", **options,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "broken"), [(Touch, (1,)), (Touch, (0, 3)), (LossyTouch, (0,))])
def test_only_the_guilty_rewrites_are_dropped(kind: type[Touch], broken: tuple[int, ...], tmp_path: Path) -> None:
    names = [i.name for i in onnxcomp.load(MODELS / "cancer_mlp.onnx").graph.initializers]

    report = optimized(kind(broken), tmp_path)

    record = report.passes[1]
    assert [d.where for d in record.dropped] == [f"copy {names[i]}" for i in broken]
    assert record.dropped[0].reason
    assert record.reverted is None
    assert record.rewrites == len(names) - len(broken)
    assert report.verification is not None
    assert report.verification.passed


def test_where_everything_is_guilty_the_whole_pass_is_taken_back(tmp_path: Path) -> None:
    record = optimized(Touch(tuple(range(50))), tmp_path).passes[1]

    assert record.reverted is not None
    assert record.dropped == ()


def test_where_no_few_are_to_blame_the_first_rewrites_of_a_lossy_pass_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "guilty", lambda *a: None)
    names = [i.name for i in onnxcomp.load(MODELS / "cancer_mlp.onnx").graph.initializers]

    lossy, lossless = (optimized(kind((2,)), tmp_path, force=True).passes[1] for kind in (LossyTouch, Touch))

    assert lossy.rewrites == 2
    assert [d.where for d in lossy.dropped] == [f"copy {name}" for name in names[2:]]
    assert lossless.reverted is not None


def test_what_was_dropped_is_in_the_json_of_the_report(tmp_path: Path) -> None:
    passes = optimized(Touch((1,)), tmp_path).to_json()["passes"]

    assert [set(d) for d in passes[1]["dropped"]] == [{"where", "reason"}]
    assert passes[0]["dropped"] == []


def test_denied_rewrites_stay_denied_in_every_round() -> None:
    ctx = Context(deny=frozenset({"b", 4}))

    assert [ctx.allow(w) for w in ("a", "b", "c", "d", "b")] == [True, False, True, False, False]
    assert ctx.rewrites == ["a", "c"]
