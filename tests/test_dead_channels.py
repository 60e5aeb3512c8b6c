"""The pass dead-channels: what goes without loss, and what only looks as if it could."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.graph import Model
from onnxcomp.macs import count_macs
from onnxcomp.manager import Context, PassRecord, run_pass
from onnxcomp.passes.dead_channels import DeadChannels
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

Array = npt.NDArray[Any]
PADDED = "Conv <pads = [1, 1, 1, 1]> (b, w2)"


def planted(*edits: Any, middle: str = "b = Relu (a)", reader: str = PADDED) -> Model:
    """Two convolutions; `edits` change the weights w1 [16, 3, 1, 1], b1 [16], w2 [2, 16, 3, 3] in place."""
    rng = np.random.default_rng(1)
    shapes = (("w1", (16, 3, 1, 1)), ("b1", (16,)), ("w2", (2, 16, 3, 3)), ("map", (1, 1, 8, 8)))
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes if n in f"w1 b1 w2 {middle}"}
    for edit in edits:
        edit(weights)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 3, 8, 8] x) => (float[batch, 2, h, w] y) {{
            a = Conv (x, w1, b1)
            {middle}
            y = {reader}
        }}"""
    )
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return from_proto(proto)


def unread(w: dict[str, Array]) -> None:
    w["w2"][:, :4] = 0


def silent(w: dict[str, Array]) -> None:
    w["w1"][4:8], w["b1"][4:8] = 0, 0


def doubled(w: dict[str, Array]) -> None:
    w["w1"][8:11], w["b1"][8:11] = w["w1"][15], w["b1"][15]


def fixed(w: dict[str, Array]) -> None:
    w["w1"][11], w["b1"][11] = 0, 0.75


def all_fixed(w: dict[str, Array]) -> None:
    w["w1"][8:12], w["b1"][8:12] = 0, [0.75, -1, 2, 0.5]


def same(w: dict[str, Array]) -> None:
    w["w1"][8:12], w["b1"][8:12] = w["w1"][15], w["b1"][15]


def run(model: Model) -> tuple[Model, PassRecord]:
    copy = model.copy()
    return copy, run_pass(DeadChannels(), copy, Context())


def assert_same_outputs(pruned: Model, model: Model) -> None:
    x = {"x": np.random.default_rng(2).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    np.testing.assert_allclose(open_session(pruned).run(x)[0], open_session(model).run(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("edit", "kind"), [(unread, "unread"), (silent, "zero"), (same, "duplicate")])
def test_a_channel_without_effect_goes_without_loss(edit: Any, kind: str) -> None:
    model = planted(edit)
    pruned, record = run(model)
    assert record.details == {kind: 4}
    assert_same_outputs(pruned, model)
    assert count_macs(pruned).total * 4 == count_macs(model).total * 3


@pytest.mark.parametrize("middle", ["b = Relu (a)", "b = Sigmoid (a)"])
def test_a_constant_channel_goes_into_the_bias_of_a_reader_without_padding(middle: str) -> None:
    model = planted(all_fixed, middle=middle, reader="Conv (b, w2)")
    pruned, record = run(model)
    assert record.details == {"constant": 4}
    assert_same_outputs(pruned, model)


def test_a_constant_channel_stays_where_the_reader_pads() -> None:
    _, record = run(planted(all_fixed))
    assert record.details == {}


def test_a_constant_channel_stays_where_something_that_varies_is_added() -> None:
    _, record = run(planted(all_fixed, middle="m = ReduceMean <axes = [1]> (x) b = Add (a, m)", reader="Conv (b, w2)"))
    assert record.details == {}


def test_a_zero_channel_stays_where_something_else_is_added_to_it() -> None:
    model = planted(silent, middle="b = Add (a, map)")
    pruned, record = run(model)
    assert "zero" not in record.details
    assert_same_outputs(pruned, model)


def test_readers_without_a_bias_keep_none_if_nothing_is_absorbed() -> None:
    pruned, _ = run(planted(silent))
    assert [len(node.inputs) for node in pruned.graph.nodes if node.op == "Conv"] == [3, 2]


def test_all_kinds_at_once_go() -> None:
    model = planted(unread, silent, doubled, fixed, reader="Conv (b, w2)")
    pruned, record = run(model)
    assert record.details == {"unread": 4, "zero": 4, "constant": 1, "duplicate": 3}
    assert_same_outputs(pruned, model)


def test_a_width_that_runs_slower_is_not_made() -> None:
    _, record = run(planted(fixed, silent, reader="Conv (b, w2)"))
    assert record.details == {"zero": 4}
    assert [r.reason for r in record.refused] == ["1 slices without effect stay: other widths run slower"]


def test_a_model_without_such_channels_is_left_as_it_is() -> None:
    model = planted()
    untouched, record = run(model)
    assert record.rewrites == 0
    assert untouched.to_bytes() == model.to_bytes()
