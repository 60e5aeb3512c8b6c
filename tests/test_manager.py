"""Pipelines as text and data, ordering, counting of rewrites."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcomp.errors import OnnxcompError, UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass, Pipeline, run_pass
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.quantize import Quantize
from onnxcomp.serde import from_proto, to_bytes

GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y) {
  a = Identity (x)
  b = Identity (a)
  unused = Relu (b)
  y = Relu (b)
}"""


def model() -> Model:
    return from_proto(onnx.parser.parse_model(GRAPH))


NAMES = st.text(st.sampled_from("abcxyz/_.0123"), min_size=1, max_size=8)
PASSES = st.one_of(
    st.just(Cleanup()),
    st.builds(FoldConstants, growth=st.integers(0, 10**6)),
    st.builds(
        Quantize,
        mode=st.sampled_from(["static", "weights"]),
        ranges=st.sampled_from(["auto", "minmax", "mse"]),
        islands=st.booleans(),
        island_cost=st.floats(0, 1),
        skip=st.lists(NAMES, max_size=3).map(tuple),
    ),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine, not of the data
@given(st.lists(PASSES, max_size=4))
def test_the_text_of_a_pipeline_parses_back_to_an_equal_pipeline(passes: list[Pass]) -> None:
    quantize_last = sorted(passes, key=lambda p: p.name == "quantize")
    pipeline = Pipeline(tuple(quantize_last))

    assert Pipeline.parse(str(pipeline)) == pipeline


def test_tables_of_a_recipe_and_texts_mean_the_same() -> None:
    from_text = Pipeline.parse("cleanup,quantize:ranges=mse:skip=a+b:island-cost=3%")
    from_data = Pipeline.parse(
        ["cleanup", {"name": "quantize", "ranges": "mse", "skip": ["a", "b"], "island_cost": 0.03}]
    )

    assert from_text == from_data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cleenup", r"unknown pass 'cleenup' \(did you mean 'cleanup'\?\)"),
        ("cleanup:speed=3", "pass 'cleanup' has no option 'speed'; it has: no options"),
        ("quantize:range=mse", r"has no option 'range' \(did you mean 'ranges'\?\)"),
        ("quantize:ranges=best", "it can be auto, minmax, percentile, mse, entropy"),
        ("quantize:islands=maybe", "it can be true or false"),
        ("fold-constants:growth=big", "it must be of type int"),
        ("quantize,cleanup", "pass 'quantize' must come after 'cleanup'"),
    ],
)
def test_a_bad_pipeline_says_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(text)


def test_a_value_may_hold_a_colon_before_a_number() -> None:
    text = "prune-weights:ratio=0.5:pattern=2:4:skip=head"
    (one,) = Pipeline.parse(text).passes
    assert one.options()["pattern"] == "2:4"
    assert str(one) == text


def test_rewrites_are_counted_and_named() -> None:
    context = Context()

    record = run_pass(Cleanup(), model(), context)

    assert record.rewrites == len(context.rewrites) == 3
    assert any("unused" in what for what in context.rewrites)


def test_rewrites_past_the_limit_are_not_made_and_the_prefix_is_a_valid_model() -> None:
    for limit in range(4):
        subject = model()
        run_pass(Cleanup(), subject, Context(limit=limit))
        onnx.checker.check_model(onnx.load_from_string(to_bytes(subject)), full_check=True)


@dataclass(frozen=True)
class Fails(Pass):
    """A pass with a defect."""

    name: ClassVar[str] = "fails"
    effect: ClassVar[Effect] = "exact"
    mode: Literal["a", "b"] = "a"

    def run(self, model: Model, ctx: Context) -> None:
        raise KeyError("oops")


def test_a_defect_of_a_pass_names_the_pass() -> None:
    with pytest.raises(OnnxcompError, match="pass 'fails:mode=b' failed: KeyError"):
        run_pass(Fails(mode="b"), model(), Context())


def test_passes_are_values() -> None:
    assert Quantize(ranges="mse") == Quantize(ranges="mse")
    with pytest.raises(AttributeError):
        Quantize().ranges = "mse"  # type: ignore[misc]


def test_the_same_refusal_is_recorded_once() -> None:
    context = Context()
    for _ in range(3):
        context.refuse("node", "reason")

    assert len(context.refusals) == 1


def test_options_of_a_record_are_plain_data() -> None:
    record: dict[str, Any] = run_pass(FoldConstants(), model(), Context()).to_json()

    assert record["options"] == {"growth": 16384}
    assert record["refused"] == []


def test_types_are_inferred_again_only_after_a_rewrite() -> None:
    one, ctx = model(), Context()
    first = ctx.shapes(one)
    assert ctx.shapes(one) is first
    assert ctx.allow("a rewrite")
    assert ctx.shapes(one) is not first
    assert ctx.shapes(model()) is not ctx.shapes(one)
