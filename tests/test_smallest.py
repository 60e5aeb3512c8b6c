"""`--goal size`: ways to store the weights compete, and the smallest verified file stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onnxcomp import io, optimize
from onnxcomp import smallest as module
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.report import Report
from onnxcomp.runtime import open_session
from onnxcomp.serde import stored_bytes

MODELS = Path(__file__).resolve().parents[1] / "models"
NAME = "digits_mlp"


def small(tmp_path: Path, **options: Any) -> Report:
    data = {"calib": MODELS / "data" / f"{NAME}.calib.npz", "eval": MODELS / "data" / f"{NAME}.eval.npz"}
    model = MODELS / f"{NAME}.onnx"
    return optimize(model, tmp_path / "small.onnx", goal="size", samples=128, bench_seconds=0, **{**data, **options})


def compete(monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]) -> None:
    monkeypatch.setattr(module, "_WAYS", ways)
    monkeypatch.setattr(module, "_TINY_BYTES", 0)


def kept(report: Report) -> list[str]:
    return [r.name for r in report.passes if r.rewrites and r.reverted is None]


def test_the_smallest_file_is_packed_and_within_the_budget(tmp_path: Path) -> None:
    report = small(tmp_path)
    assert "share-weights" in kept(report)
    assert kept(report)[-1] == "pack"
    assert report.verification is not None
    assert report.verification.quality is not None
    assert report.verification.quality.drop <= 0.01
    assert report.original["file_bytes"] > 5 * report.optimized["file_bytes"]
    open_session(tmp_path / "small.onnx")


@pytest.mark.parametrize(("bits", "smallest"), [((3, 8), 3), ((8, 4), 4)])
def test_a_larger_way_is_taken_back_and_named_before_and_after_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: tuple[int, ...], smallest: int
) -> None:
    compete(monkeypatch, tuple(f"share-weights:bits={b}" for b in bits))
    report = small(tmp_path, max_drop=0.2)
    assert [r.options["bits"] for r in report.passes if r.name == "share-weights"] == [smallest]
    assert any("share-weights:bits=8" in note for note in report.notes)


def test_a_search_is_run_once_however_strict_the_check_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = ShareWeights.run
    monkeypatch.setattr(ShareWeights, "run", lambda self, model, ctx: (runs.append(self), run(self, model, ctx))[1])
    compete(monkeypatch, ("share-weights",))
    report = small(tmp_path, max_drop=0.0005)
    assert len(runs) == 1
    assert "share-weights" in kept(report)
    assert report.verification is not None
    assert report.verification.quality is not None
    assert report.verification.quality.drop <= 0.0005


def test_in_tiny_files_codes_of_one_width_compete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = small(tmp_path)
    monkeypatch.setattr(module, "_TINY_BYTES", 0)
    alone = small(tmp_path, force=True)
    assert best.optimized["file_bytes"] < alone.optimized["file_bytes"]
    assert any("zeros=true" in note for note in best.notes)


@pytest.mark.parametrize(("way", "competes"), [("share-weights:bits=2:assignment=nearest", True), (None, False)])
def test_int8_codes_compete_only_where_they_could_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str | None, competes: bool
) -> None:
    compete(monkeypatch, (way or "share-weights:bits=4",))
    report = small(tmp_path, max_drop=0.001 if competes else 0.5)
    assert competes == ("quantize" in {r.name for r in report.passes} or any("quantize" in n for n in report.notes))


def test_a_defect_in_one_way_is_told_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ShareWeights, model: Any, ctx: Any) -> None:
        raise IndexError("index 0 is out of bounds")

    monkeypatch.setattr(ShareWeights, "run", broken)
    report = small(tmp_path)
    assert "quantize" in kept(report)
    assert report.original["file_bytes"] > 3 * report.optimized["file_bytes"]
    assert any("index 0 is out of bounds" in note and "report" in note for note in report.notes)


def test_a_size_that_was_asked_for_is_reached(tmp_path: Path) -> None:
    report = small(tmp_path, size="5x", max_drop=0.05)
    assert not report.unmet
    assert report.original["file_bytes"] >= 5 * report.optimized["file_bytes"]


def test_a_plan_of_the_size_asked_for_ends_the_contest() -> None:
    """Another way would trade what the budget leaves for bytes that nobody asked for."""
    source = io.load(MODELS / f"{NAME}.onnx")
    job: Any = SimpleNamespace(source=source, options=SimpleNamespace(size=4.0))
    size = stored_bytes(source) // 4
    contest = module._Contest(job, None, module._Found("a way", None, size))
    assert contest.reached
    contest.best = module._Found("a way", None, size + 2)
    assert not contest.reached


def test_without_data_weights_are_packed_without_loss(tmp_path: Path) -> None:
    report = small(tmp_path, calib=None, eval=None)
    assert not [r for r in report.passes if r.effect == "lossy"]


def test_bytes_of_a_model_are_those_of_its_file(tmp_path: Path) -> None:
    model = io.load(MODELS / f"{NAME}.onnx")
    saved = io.save(model, tmp_path / "m.onnx")
    assert stored_bytes(model) == pytest.approx(io.model_bytes(saved.path), rel=0.02)
