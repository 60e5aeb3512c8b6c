"""Coupling of dimensions: which slices go together, which must stay, and why."""

from __future__ import annotations

import time

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.passes.dim_atoms import RULES, Atoms, components
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dims import Coupling, couple
from onnxcomp.serde import from_proto


def coupled(text: str, **shapes: tuple[int, ...]) -> Coupling:
    """Coupling of a textual graph; weights of the given shapes are added with random values."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return couple(plain_form(from_proto(model)))


def axes(coupling: Coupling) -> list[tuple[int, set[tuple[str, int]]]]:
    """Width and (weight, axis) of each group."""
    return [(g.width, {(t.name, k) for t, k in g.axes}) for g in coupling.groups]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_those_of_a_search(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = case
    expected = list(range(count))
    for _ in range(count):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    a, b = (np.array([e[k] for e in edges], np.int64) for k in (0, 1))
    assert components(count, a, b).tolist() == expected


def test_components_of_a_long_chain_take_few_rounds() -> None:
    order = np.random.default_rng(0).permutation(200_000)
    begin = time.process_time()
    assert not components(len(order), order[:-1], order[1:]).any()
    assert time.process_time() - begin < 5


CHAIN = """
net (float[batch, 3, 8, 8] x) => (float[batch, 5, 8, 8] y) {
    a = Conv (x, w1)
    b = Relu (a)
    y = Conv (b, w2)
}
"""


def test_output_channels_go_with_the_input_channels_of_the_reader() -> None:
    found = coupled(CHAIN, w1=(4, 3, 1, 1), w2=(5, 4, 1, 1))
    assert axes(found) == [(4, {("w1", 0), ("w2", 1)})]
    assert found.reachable() == 1.0


def test_axes_of_inputs_and_outputs_stay_and_say_why() -> None:
    found = coupled(CHAIN, w1=(4, 3, 1, 1), w2=(5, 4, 1, 1))
    reasons = {(t.name, k): why for (t, k), why in found.reasons.items()}
    assert reasons[("w1", 1)] == "a model input"
    assert reasons[("w2", 0)] == "a model output"


def test_operands_of_an_addition_are_one_group() -> None:
    text = """
    net (float[batch, 3, 8, 8] x) => (float[batch, 2, 8, 8] y) {
        a = Conv (x, w1)
        b = Conv (a, w2)
        c = Add (a, b)
        y = Conv (c, w3)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(4, 4, 1, 1), w3=(2, 4, 1, 1))
    assert axes(found) == [(4, {("w1", 0), ("w2", 0), ("w2", 1), ("w3", 1)})]


def test_concatenated_channels_keep_their_own_groups() -> None:
    text = """
    net (float[batch, 3, 8, 8] x) => (float[batch, 2, 8, 8] y) {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, b)
        y = Conv (c, w3)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(6, 3, 1, 1), w3=(2, 10, 1, 1))
    assert axes(found) == [(4, {("w1", 0), ("w3", 1)}), (6, {("w2", 0), ("w3", 1)})]


def test_a_flattened_channel_is_a_run_of_features() -> None:
    text = """
    net (float[batch, 3, 4, 4] x) => (float[batch, 2] y) {
        a = Conv (x, w1)
        b = Flatten (a)
        y = MatMul (b, w2)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(64, 2))
    (group,) = found.groups
    assert {(t.name, k): n for (t, k), n in group.axes.items()} == {("w1", 0): 1, ("w2", 0): 16}
    rows = [np.flatnonzero(found.label(next(iter(group.axes))[0], 0) == u).tolist() for u in group.units]
    assert sorted(rows) == [[0], [1], [2], [3]]


def test_whole_heads_go_where_the_softmax_axis_leaves_no_other_choice() -> None:
    text = """
    net (float[batch, 6, 12] x) => (float[batch, 6, 5] y)
    <int64[4] split = {0, 6, 4, 3}, int64[3] merge = {0, 6, 12}> {
        q = MatMul (x, w1)
        heads = Reshape (q, split)
        soft = Softmax <axis = 3> (heads)
        flat = Reshape (soft, merge)
        y = MatMul (flat, w2)
    }
    """
    found = coupled(text, w1=(12, 12), w2=(12, 5))
    (group,) = found.groups
    assert group.width == 4
    assert set(group.axes.values()) == {3}


def test_the_batch_is_in_no_group() -> None:
    text = """
    net (float[batch, 4] x) => (float[batch, 2] y) {
        a = MatMul (x, w1)
        b = Add (a, table)
        y = MatMul (b, w2)
    }
    """
    found = coupled(text, w1=(4, 6), table=(1, 6), w2=(6, 2))
    assert axes(found) == [(6, {("w1", 1), ("w2", 0)})]


def test_a_stretched_axis_is_not_coupled() -> None:
    text = """
    net (float[batch, 3, 8, 8] x) => (float[batch, 2, 8, 8] y) {
        a = Conv (x, w1)
        gate = Conv (x, w2)
        b = Mul (a, gate)
        y = Conv (b, w3)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(1, 3, 1, 1), w3=(2, 4, 1, 1))
    assert axes(found) == [(4, {("w1", 0), ("w3", 1)})]


def test_an_operator_without_a_rule_pins_and_is_named() -> None:
    text = """
    net (float[batch, 4, 4] x) => (float[batch, 4, 2] y) {
        a = MatMul (x, w1)
        b = com.microsoft.Inverse (a)
        y = MatMul (b, w2)
    }
    """
    found = coupled(text, w1=(4, 4), w2=(4, 2))
    assert found.unknown == {"com.microsoft.Inverse": 1}
    assert found.groups == ()
    assert "com.microsoft.Inverse" in next(why for (t, k), why in found.reasons.items() if (t.name, k) == ("w1", 1))


def test_a_third_party_can_add_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def columns_follow_rows(atoms: Atoms, node: object) -> None:
        x, y = node.inputs[0], node.outputs[0]  # type: ignore[attr-defined]
        atoms.same_axes(x, y)

    monkeypatch.setitem(RULES, "com.microsoft.Gelu", columns_follow_rows)
    text = """
    net (float[batch, 4] x) => (float[batch, 2] y) {
        a = MatMul (x, w1)
        b = com.microsoft.Gelu (a)
        y = MatMul (b, w2)
    }
    """
    assert axes(coupled(text, w1=(4, 6), w2=(6, 2))) == [(6, {("w1", 1), ("w2", 0)})]


def test_a_rule_that_fails_pins_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(atoms: Atoms, node: object) -> None:
        raise KeyError("missing")

    monkeypatch.setitem(RULES, "Relu", broken)
    found = coupled(CHAIN, w1=(4, 3, 1, 1), w2=(5, 4, 1, 1))
    assert found.groups == ()
    assert len(found.failed) == 1


def test_small_constants_that_two_nodes_share_do_not_couple_them() -> None:
    text = """
    net (float[batch, 3, 8, 8] x) => (float[batch, 2, 8, 8] y) {
        a = Conv (x, w1, zero)
        b = Conv (x, w2, zero)
        c = Concat <axis = 1> (a, b)
        y = Conv (c, w3)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(4, 3, 1, 1), zero=(4,), w3=(2, 8, 1, 1))
    assert [width for width, _ in axes(found)] == [4, 4]


def test_a_weight_that_two_nodes_share_ties_them() -> None:
    text = """
    net (float[batch, 4] x) => (float[batch, 2] y) {
        a = MatMul (x, w1)
        b = MatMul (a, tied)
        c = MatMul (b, tied)
        y = MatMul (c, w2)
    }
    """
    found = coupled(text, w1=(4, 6), tied=(6, 6), w2=(6, 2))
    assert axes(found) == [(6, {("w1", 1), ("tied", 0), ("tied", 1), ("w2", 0)})]


def test_a_unit_that_is_all_of_an_axis_stays() -> None:
    text = """
    net (float[batch, 3, 8, 8] x) => (float[batch, 2, 8, 8] y) {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, b)
        y = Conv (c, w3)
    }
    """
    found = coupled(text, w1=(4, 3, 1, 1), w2=(1, 3, 1, 1), w3=(2, 5, 1, 1))
    assert axes(found) == [(4, {("w1", 0), ("w3", 1)})]


def test_normalized_groups_are_marked() -> None:
    text = """
    net (float[batch, 4] x) => (float[batch, 2] y) {
        a = MatMul (x, w1)
        b = LayerNormalization (a, scale)
        y = MatMul (b, w2)
    }
    """
    (group,) = coupled(text, w1=(4, 6), scale=(6,), w2=(6, 2)).groups
    assert group.averaged


def test_a_sequence_of_any_length_is_in_no_group() -> None:
    text = """
    net (float[batch, time, 4] x) => (float[batch, time, 2] y)
    <int64[3] all = {0, -1, 6}> {
        a = MatMul (x, w1)
        b = Reshape (a, all)
        y = MatMul (b, w2)
    }
    """
    assert axes(coupled(text, w1=(4, 6), w2=(6, 2))) == [(6, {("w1", 1), ("w2", 0)})]
