"""The codec: whatever goes in comes out bit for bit, from numpy's decoder and from ONNX Runtime's."""

import math

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxcomp.passes.codec import Encoded, Form, Plan, decode, encode
from onnxcomp.passes.codec_bits import pack_numbers, packed_shape, unpack_numbers
from onnxcomp.passes.codec_functions import decoder, form_of
from onnxcomp.passes.codec_plans import plans
from onnxcomp.runtime import open_session
from onnxcomp.storage import DOMAIN, VERSION

Array = npt.NDArray[np.generic]
KINDS = ("float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FORMS = [
    form
    for positions in (None, *range(9))
    for width in (None, *range(9))
    for ranks in (None, *range(8))
    for grouped in (False, True)
    if (form := Form(positions, width, grouped, ranks=ranks)) == Form.parse(form.name)
]


def call(encoded: Encoded, opset: int = 12) -> onnx.ModelProto:
    """A model that decodes one tensor."""
    table = encoded.streams["t"]
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    node = helper.make_node(
        encoded.form.name, list(encoded.streams), ["w"], domain=DOMAIN, **encoded.attributes
    )
    graph = helper.make_graph(
        [node],
        "decode",
        [],
        [helper.make_tensor_value_info("w", kind, encoded.attributes["shape"])],
        [numpy_helper.from_array(values, name) for name, values in encoded.streams.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(
        graph, opset_imports=imports, functions=[decoder(encoded.form, opset)], ir_version=8 if opset < 19 else 10
    )


def few(kind: str, different: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    """An array of so many different bit patterns, NaNs with payloads and -0.0 among them."""
    rng = np.random.default_rng(seed)
    size = np.dtype(kind).itemsize
    patterns = np.unique(np.frombuffer(rng.bytes(size * different * 2), f"u{size}"))[:different]
    return patterns[rng.integers(0, len(patterns), shape)].view(kind)


def sparse(values: Array, share: float, seed: int = 1) -> Array:
    keep = np.random.default_rng(seed).random(values.shape) >= share
    return np.where(keep, values, np.zeros((), values.dtype)).astype(values.dtype)


def even(spread: float, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Whole numbers around zero, of which large ones are rare."""
    return np.rint(np.random.default_rng(seed).laplace(0, spread, shape)).clip(-60, 60).astype(np.float32)


def form_sample(form: Form) -> Array:
    """A tensor with an encoding of that form."""
    different = 1 << (form.width or 0)
    rows = [few("float32", different, (40, 9), seed=s) for s in range(4)] if form.grouped else None
    values = np.stack(rows) if rows else few("float32", different, (4, 40, 9))
    if form.ranks is not None:
        values = even(2.0**form.ranks, (4, 40, 9))
    elif form.width is None:
        values = np.random.default_rng(2).standard_normal((4, 40, 9)).astype(np.float32)
    values = np.where(values.view(np.uint32) == 0, np.float32(1), values)
    if form.positions is None:
        return values
    return sparse(values, 0.5 if form.positions == 0 else 1 - 2.0**-form.positions, seed=3)


def plan_of(form: Form, values: Array) -> Plan:
    """A plan for a form, whether it pays or not."""
    bits = values.reshape(-1).view(np.uint32)
    kept = bits if form.positions is None else bits[bits != 0]
    zero = int(form.positions is not None)
    groups = (1, values.shape[0], bits.size // values.shape[0]) if form.grouped else None
    rows = len(np.unique(kept)) if form.coded else len(kept)
    if groups is not None:
        found = [r if form.positions is None else r[r != 0] for r in bits.reshape(groups[1], -1)]
        table: tuple[int, ...] = (groups[1], zero + max(len(np.unique(r)) for r in found))
    else:
        table = (zero + rows,)
    return Plan(form, {**dict.fromkeys(form.inputs, ()), "t": table}, 0, groups)


@given(st.integers(1, 8), st.data())
def test_numbers_of_any_width_come_back_and_take_no_more_than_their_bits(width: int, data: st.DataObject) -> None:
    numbers = np.asarray(data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=70)), np.uint8)

    packed = pack_numbers(numbers, width)

    assert packed.shape == packed_shape(len(numbers), width)
    assert packed.size <= math.ceil(len(numbers) * width / 8) + width
    np.testing.assert_array_equal(unpack_numbers(packed, width, len(numbers)), numbers)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_is_decoded_alike_by_numpy_and_by_onnx_runtime(form: Form) -> None:
    values = form_sample(form)

    encoded = encode(values, plan_of(form, values))

    assert decode(encoded).tobytes() == values.tobytes()
    proto = call(encoded)
    onnx.checker.check_model(proto, full_check=True)
    assert open_session(proto).run({})[0].tobytes() == values.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 300),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.sampled_from((0.0, 0.3, 0.8, 0.97, 1.0)),
    st.integers(0, 1 << 30),
)
def test_every_plan_gives_the_tensor_back_and_keeps_its_promise_of_bytes(
    kind: str, different: int, shape: tuple[int, ...], zeros: float, seed: int
) -> None:
    values = sparse(few(kind, different, shape, seed), zeros, seed)

    for plan in plans(values):
        encoded = encode(values, plan)

        decoded = decode(encoded)
        assert (decoded.dtype, decoded.shape, decoded.tobytes()) == (values.dtype, values.shape, values.tobytes())
        assert {n: s.shape for n, s in encoded.streams.items()} == plan.shapes
        assert sum(s.nbytes for s in encoded.streams.values()) == plan.nbytes


@pytest.mark.parametrize("kind", [*KINDS, "bool"])
def test_every_element_type_is_decoded_bit_for_bit_by_onnx_runtime(kind: str) -> None:
    values = few("uint8", 2, (32, 9)).astype(bool) if kind == "bool" else sparse(few(kind, 11, (32, 9)), 0.6)

    smallest = min(plans(values), key=lambda plan: plan.nbytes)
    found = open_session(call(encode(values, smallest))).run({})[0]

    assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes())


def test_only_the_zero_without_a_sign_counts_as_zero() -> None:
    values = np.zeros(1000, np.float32)
    values[::10] = -0.0
    values[5::10] = np.float32(1e-45)

    best = min((p for p in plans(values) if p.form.positions is not None), key=lambda p: p.nbytes)

    assert np.signbit(decode(encode(values, best))[::10]).all()
    assert decode(encode(values, best)).tobytes() == values.tobytes()


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.03, 0.01])
def test_places_of_random_zeros_take_at_most_four_percent_more_than_their_entropy(density: float) -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(200_000) < density, rng.standard_normal(200_000), 0).astype(np.float32)
    count = np.count_nonzero(values)
    share = count / values.size
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)

    best = min((p for p in plans(values) if not p.form.coded), key=lambda plan: plan.nbytes)
    places = best.nbytes - 4 * (count + 1)

    assert 8 * places / values.size <= 1.04 * entropy


@pytest.mark.parametrize(("spread", "most"), [(0.4, 1.06), (0.7, 1.05), (1.5, 1.04), (4.0, 1.04), (15.0, 1.04)])
def test_even_grids_take_a_few_percent_more_than_their_entropy(spread: float, most: float) -> None:
    values = even(spread, (200_000,)).astype(np.int8)
    _, counts = np.unique(values, return_counts=True)
    entropy = -(counts / values.size * np.log2(counts / values.size)).sum()

    best = min(plans(values), key=lambda plan: plan.nbytes)

    assert best.form.ranks is not None
    assert 8 * (best.nbytes - len(counts) - 1) / values.size <= most * entropy


def test_a_codebook_per_output_channel_is_found_and_beats_one_for_all() -> None:
    rng = np.random.default_rng(0)
    books = rng.standard_normal((32, 16)).astype(np.float32)
    values = np.take_along_axis(books, rng.integers(0, 16, (32, 900)), axis=1)

    best = min(plans(values), key=lambda plan: plan.nbytes)

    assert best.form == Form(None, 4, grouped=True)
    assert best.groups == (1, 32, 900)
    assert best.nbytes == 32 * 900 // 2 + 32 * 16 * 4


def test_neighbouring_channels_with_one_codebook_share_a_row_of_the_table() -> None:
    rng = np.random.default_rng(0)
    books = np.repeat(rng.standard_normal((4, 16)).astype(np.float32), 8, axis=0)
    values = np.take_along_axis(books, rng.integers(0, 16, (32, 900)), axis=1).T.copy()  # channels on the last axis

    best = min(plans(values), key=lambda plan: plan.nbytes)

    assert best.groups == (900, 4, 8)
    assert decode(encode(values, best)).tobytes() == values.tobytes()


def test_random_numbers_have_no_plan() -> None:
    assert plans(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)) == []


_WRONG = "Codes9 Values Rice0Codes4 Ranks8 Ranks2Grouped RowsRanks2 Codes4grouped BitmapValuesGrouped"


@pytest.mark.parametrize("name", [*_WRONG.split(), ""])
def test_names_of_no_form_are_not_taken_for_one(name: str) -> None:
    assert Form.parse(name) is None


def test_a_function_is_recognized_by_its_body_and_not_by_its_name() -> None:
    function = decoder(Form(2, 4), 17)
    assert form_of(function) == Form(2, 4)

    function.node[3].op_type = "Neg"

    assert form_of(function) is None


@pytest.mark.parametrize(("stream", "ranked"), [("b", False), ("r", False), ("c", False), ("u", True), ("c", True)])
def test_damaged_streams_are_an_error_and_no_other_tensor(stream: str, ranked: bool) -> None:
    values = sparse(few("float32", 5, (40, 40)), 0.9)
    plan = next(p for p in plans(values) if p.form.positions == 3 and (p.form.ranks if ranked else p.form.width))
    encoded = encode(values, plan)
    streams = {**encoded.streams, stream: np.full_like(encoded.streams[stream], 255)}

    with pytest.raises(ValueError, match=r"announced|outside|beyond"):
        decode(Encoded(encoded.form, streams, encoded.attributes))


def test_low_bits_that_are_cut_off_are_an_error() -> None:
    values = even(4.0, (40, 40))
    encoded = encode(values, next(p for p in plans(values) if p.form.positions is None and p.form.ranks))
    streams = {**encoded.streams, "c": encoded.streams["c"][:1]}

    with pytest.raises(ValueError, match="low bits for fewer"):
        decode(Encoded(encoded.form, streams, encoded.attributes))
