"""The hostile graphs keep outputs and interface, and are rewritten where they should be."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

from onnxcomp.manager import Context
from onnxcomp.serde import from_proto
from tests import hostile
from tests.conformance import EXACT, FLOAT, Case, check, graphs, run_passes


@pytest.mark.parametrize("name", sorted(hostile.CASES))
def test_outputs_and_interface_stay_and_a_second_run_does_nothing(name):
    proto = hostile.CASES[name]()

    check(Case(name, proto, hostile.feeds(proto)))


@pytest.mark.parametrize("name", sorted(hostile.CASES))
def test_the_same_input_gives_the_same_bytes(name):
    assert optimized(name).SerializeToString() == optimized(name).SerializeToString()


@pytest.mark.parametrize("name", sorted(hostile.CASES.keys() - {"output_without_a_shape"}))  # the checker wants one
def test_each_prefix_of_the_rewrites_leaves_a_whole_model(name):
    """Bisection stops after any number of rewrites."""
    proto = hostile.CASES[name]()
    total = Context()
    run_passes(from_proto(proto), EXACT + FLOAT, total)
    for limit in range(len(total.rewrites)):
        model = from_proto(proto)
        run_passes(model, EXACT + FLOAT, Context(limit=limit))
        onnx.checker.check_model(onnx.ModelProto.FromString(model.to_bytes()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_bn", "Conv"),
        ("conv_of_doubles_bn", "Conv"),
        ("conv_of_halves_bn", "Conv"),
        ("grouped_transposed_conv_bn", "ConvTranspose"),
        ("gemm_bn", "Gemm"),
        ("bn_before_a_conv", "Conv"),
        ("two_convs_share_a_weight", "BatchNormalization BatchNormalization Conv"),
        ("conv_value_is_also_an_output", "BatchNormalization Conv"),
        ("bn_in_training_mode", "BatchNormalization Conv"),
        ("bn_scale_is_an_input", "BatchNormalization Conv"),
        ("bn_behind_a_matmul_normalizes_another_axis", "BatchNormalization MatMul"),
        ("bn_before_a_padded_conv", "BatchNormalization Conv"),
        ("overridable_weight", "BatchNormalization Conv"),
        ("overridable_constants_are_not_folded", "Add Mul Mul"),
        ("inputs_list_the_weights_as_before_ir_4", "Conv"),
        ("conv_chain_of_arithmetic", "Conv"),
        ("division_by_a_conv", "Conv Div"),
        ("matmul_of_a_matrix_add", "Gemm"),
        ("matmul_of_a_vector_add", "Add MatMul"),
        ("matmul_add_grows", "Add MatMul"),
        ("relu_clip", "Clip"),
        ("expand_to_a_megabyte", "Add Expand"),
        ("quantized_weight", "Conv DequantizeLinear"),
        ("random_numbers", "Add RandomNormal RandomNormal Sub"),
        ("dropout_in_training_mode", "Dropout Dropout Sub"),
        ("constant_condition", "MatMul Relu"),
        ("constant_condition_of_nested_ifs", "Identity Neg Relu"),
        ("reshape_of_a_dynamic_batch", "Reshape"),
        ("expand_to_its_own_shape", "Relu"),
        ("expand_that_broadcasts", "Expand Relu Shape"),
        ("identity_from_input_to_output", "Identity Relu"),
        ("identity_of_a_value_with_two_roles", "Identity Relu"),
        ("equal_nodes_are_outputs", "Relu Relu"),
        ("scalar_one_adds_an_axis", "Mul"),
        ("ones_broadcast", "Mul"),
        ("cast_chain_that_rounds", "Cast Cast"),
        ("cast_chain_that_widens", "Cast Identity"),
        ("transpose_chain", "Identity Transpose"),
        ("transpose_without_perm", "Identity"),
        ("transpose_of_ones", "Reshape"),
        ("squeeze_unsqueeze", "Relu Squeeze"),
        ("unsqueeze_chain", "Unsqueeze"),
        ("squeeze_chain", "Squeeze"),
        ("reshape_that_copies_dimensions", "Reshape"),
        ("concat_in_a_concat", "Concat"),
        ("slices_of_two_axes", "Slice"),
        ("slice_backwards", "Slice"),
        ("pad_that_shifts", "Pad"),
        ("recurrent_state_of_zeros", "LSTM"),
        ("branch_repeats_outer_work", "Add Add If Neg Relu"),
        ("unused_output_of_an_if", "Abs If Neg"),
        ("unused_output_of_a_loop", "Identity Loop Neg"),
        ("unused_output_of_a_scan", "Add Neg Scan"),
        ("function_is_called_twice", "Add F"),
        ("function_draws_random_numbers", "Add F F Sub"),
    ],
)
def test_the_nodes_that_are_left(name, expected):
    proto = optimized(name)

    assert " ".join(sorted(n.op_type for g in graphs(proto) for n in g.node)) == expected


def test_an_expanded_constant_is_not_baked_in():
    assert optimized("expand_to_a_megabyte").ByteSize() < 10_000


def test_a_constant_made_of_a_large_one_is_folded_and_the_large_one_is_not_kept():
    proto = optimized("small_part_of_a_large_constant")

    assert [n.op_type for n in proto.graph.node] == ["Add"]
    assert proto.ByteSize() < 1_000


def test_equal_weights_are_stored_once():
    assert [list(t.dims) for t in optimized("duplicate_weights").graph.initializer] == [[64, 64]]
    assert Counter(len(g.initializer) for g in graphs(optimized("branches_hold_the_same_weight"))) == {1: 1, 0: 2}


def test_a_function_that_nobody_calls_is_removed():
    assert not optimized("function_is_not_called").functions
    assert optimized("function_is_called_twice").functions


def test_constants_of_a_function_are_folded_in_it():
    (function,) = optimized("function_with_constants").functions

    assert sorted(n.op_type for n in function.node) == ["Constant", "Mul"]


def optimized(name):
    model = from_proto(hostile.CASES[name]())
    run_passes(model, EXACT + FLOAT, Context())
    return onnx.ModelProto.FromString(model.to_bytes())
