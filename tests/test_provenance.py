"""What values of an optimized model stand for: composition, storage in the model, and what passes write down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx.parser import parse_model

from onnxcomp import io
from onnxcomp.graph import Model
from onnxcomp.provenance import KEY, Origin, forget, note, origins
from onnxcomp.serde import from_proto

TEXT = '<ir_version: 10, opset_import: ["" : 17]> m (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) y = Neg(a) }'


def model() -> Model:
    return from_proto(parse_model(TEXT))


def steps(rng: np.random.Generator) -> list[Origin]:
    """Passes that each cut or scale a value of shape [2, 8], one after the other."""
    width, made = 8, []
    for _ in range(rng.integers(1, 5)):
        if rng.random() < 0.5:
            kept = np.sort(rng.permutation(width)[: rng.integers(1, width + 1)])
            made.append(Origin("v", keep=((1, tuple(kept.tolist())),)))
            width = len(kept)
        else:
            made.append(Origin("v", scale=(1, tuple(rng.choice([0.5, 1.0, 2.0, 4.0], width).tolist()))))
    return made


@pytest.mark.parametrize("seed", range(30))
def test_changes_compose_as_they_were_made(seed: int) -> None:
    made = steps(np.random.default_rng(seed))
    array = np.random.default_rng(0).standard_normal((2, 8))
    expected = array
    for step in made:
        expected = step.apply(expected)

    subject = model()
    for step in made:
        note(subject, {"v": step})

    assert (origins(subject)["v"].apply(array) == expected).all()


def test_notes_travel_through_copies_and_files(tmp_path: Path) -> None:
    subject = model()
    written = {"a": Origin("a", keep=((1, (0, 3, 5)),)), "b": Origin("b", scale=(1, (2.0, 0.25)))}
    note(subject, written)

    io.save(subject.copy(), tmp_path / "m.onnx")

    assert origins(io.load(tmp_path / "m.onnx")) == written


def test_forgetting_leaves_other_metadata_alone() -> None:
    subject = model()
    subject.header.metadata_props.add(key="author", value="me")
    note(subject, {"a": Origin("a", keep=((1, (0,)),))})

    forget(subject)

    assert [p.key for p in subject.header.metadata_props] == ["author"]


def test_notes_that_would_take_too_much_room_are_left_out() -> None:
    subject = model()
    rng = np.random.default_rng(0)
    many = {f"v{i}": Origin("a", scale=(1, tuple(rng.random(64).tolist()))) for i in range(200)}

    note(subject, many)

    assert origins(subject) == {}
    assert not subject.header.metadata_props


@pytest.mark.parametrize("text", ["", "no base64!", "aGVsbG8=", "eJyrVkpUsqpWSgRiAFsdBAs="])
def test_damaged_notes_are_no_notes(text: str) -> None:
    subject = model()
    subject.header.metadata_props.add(key=KEY, value=text)

    assert origins(subject) == {}
