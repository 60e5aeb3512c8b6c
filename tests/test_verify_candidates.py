"""Many candidates against one original, as a search asks for them: the original runs once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model
from onnxcomp.quality import Metric
from onnxcomp.reference import Reference
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import from_proto
from onnxcomp.verification import verify

RNG = np.random.default_rng(1)
DATA = {"x": RNG.standard_normal((50, 3, 8)).astype(np.float32)}


def network(change: float = 0.0, output: str = "y") -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8] x) => (float[N, 3, 4] {output}) {{ {output} = MatMul (x, w) }}"""
    )
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight * np.float32(1 + change), "w"))
    return from_proto(proto)


def data() -> Any:
    return open_data(DATA, open_session(network()).inputs)


def reference(keep: int = 1 << 20) -> Reference:
    return Reference(network(), keep=keep)


def stands(original: Any, candidate: Model, metric: Metric | None = None) -> bool:
    return verify(original, candidate, data(), max_drop=0.01, metric=metric, edges=False).verdict != "failed"


@pytest.mark.parametrize("change", [0.0, 0.05, 0.099, 0.101, 0.5, float("nan")])
def test_the_answer_is_that_of_a_single_verification(change: float) -> None:
    ours = reference()
    stands(ours, network(0.02))  # fills the memory of the original

    assert stands(ours, network(change)) == stands(network(), network(change))


def test_the_original_runs_once_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = reference()
    runs = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, *a: (runs.append(self), run(self, *a))[1])

    answers = [stands(ours, network(c)) for c in (0.0, 0.5, 0.05)]

    assert answers == [True, False, True]
    batches = sum(1 for _ in data().batches())
    own = ours.session(optimize=True).session
    assert sum(s is own for s in runs) == batches + 1  # once more for what is random in it


def test_outputs_that_are_too_many_to_keep_are_computed_again() -> None:
    ours = reference(keep=1)

    assert [stands(ours, network(c)) for c in (0.0, 0.5, 0.05, 0.5)] == [True, False, True, False]


def test_a_candidate_with_another_output_does_not_stand() -> None:
    assert not stands(reference(), network(output="z"))


def test_a_metric_of_the_user_decides() -> None:
    def positive(outputs: dict[str, np.ndarray], labels: Any) -> float:
        return float(outputs["y"].mean() > 0)

    assert stands(reference(), network(0.5), positive)
