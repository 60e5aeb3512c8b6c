"""Inner names are short, attributes that say the default are gone, and the model is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp import io, optimize
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto, to_bytes
from onnxcomp.short_form import shortened

TEXT = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
main (float[N, 4] a, bool condition) => (float[N, 4] the_result)
<float[4] a_long_weight = {1, 2, 3, 4}, float[4] b = {4, 3, 2, 1}>
{
  first_value = Mul (a, a_long_weight)
  second_value = If (condition) <
    then_branch = yes () => (float[N, 4] inner_result) { inner_result = Add (first_value, b) },
    else_branch = no () => (float[N, 4] other_result) {
      passed_on = Clip (first_value, , )
      other_result = Sub (passed_on, a_long_weight)
    }
  >
  third_value = local.twice (second_value)
  the_result = Add (third_value, b)
}
<domain: "local", opset_import: ["" : 17]>
twice (argument) => (doubled) { doubled = Add (argument, argument) }
"""
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize("condition", [True, False])
def test_the_model_computes_the_same(condition: bool) -> None:
    model = from_proto(onnx.parser.parse_model(TEXT))
    feeds = {"a": X, "condition": np.array(condition)}

    short = shortened(model)

    assert np.array_equal(open_session(model).run(feeds)[0], open_session(short).run(feeds)[0])


def test_inputs_and_outputs_keep_their_names_and_no_inner_one_takes_them() -> None:
    short = onnx.load_from_string(to_bytes(shortened(from_proto(onnx.parser.parse_model(TEXT)))))

    assert [i.name for i in short.graph.input] == ["a", "condition"]
    assert [o.name for o in short.graph.output] == ["the_result"]
    inner = {t.name for t in short.graph.initializer} | {o for n in short.graph.node for o in n.output}
    assert "a" not in inner
    assert max(map(len, inner - {"the_result"})) == 1
    assert not any(n.name for n in short.graph.node)
    onnx.checker.check_model(short, full_check=True)


def test_the_model_that_is_shortened_stays_as_it_is() -> None:
    model = from_proto(onnx.parser.parse_model(TEXT))
    before = to_bytes(model)

    shortened(model)

    assert to_bytes(model) == before


def test_only_files_for_which_size_is_the_goal_have_short_names(tmp_path: Path, root: Path) -> None:
    model = root / "models" / "digits_mlp.onnx"
    data = {part: root / "models" / "data" / f"digits_mlp.{part}.npz" for part in ("calib", "eval")}
    named = {}
    for goal in ("size", "balanced"):
        report = optimize(model, tmp_path / f"{goal}.onnx", goal=goal, samples=64, bench_seconds=0, **data)
        named[goal] = [n for n in io.load(tmp_path / f"{goal}.onnx").graph.nodes if n.name]
        assert any(row["name"] for row in report.to_json()["layers"])
    assert not named["size"]
    assert named["balanced"]


def test_attributes_that_hold_anyway_are_left_out_and_others_stay() -> None:
    v = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
            g (float[1, 2, 9, 9] x) => (float[1, 8] y) <float[2, 2, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9,
              1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 3, 1, 3, 1, 3, 1, 3, 1, 3}>
            {
              a = Conv <kernel_shape = [3, 3], dilations = [1, 1], strides = [2, 1], pads = [0, 0, 0, 0], group = 1,
                        auto_pad = "NOTSET"> (x, w)
              b = MaxPool <kernel_shape = [3, 3], strides = [1, 1], pads = [1, 0, 0, 0], ceil_mode = 0> (a)
              c = AveragePool <kernel_shape = [2, 4], strides = [2, 2]> (b)
              d = Flatten <axis = 1> (c)
              y = Gemm <alpha = 1.0, beta = 0.5, transA = 0, transB = 1> (d, v)
            }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(v, "v"))
    model = from_proto(proto)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 2, 9, 9)).astype(np.float32)}

    short = shortened(model)

    assert [sorted(n.attrs) for n in short.graph.nodes] == [
        ["kernel_shape", "strides"], ["kernel_shape", "pads"], ["kernel_shape", "strides"], [], ["beta", "transB"]
    ]  # fmt: skip
    assert np.array_equal(open_session(model).run(feeds)[0], open_session(short).run(feeds)[0])
