"""The editing graph: order, rewiring, names, scale."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, producer, sort
from onnxcomp.manager import Context
from onnxcomp.passes.dead import remove_dead
from onnxcomp.serde import from_proto
from tests import hostile


def chain(length, *, backwards=False):
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(length)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes[::-1] if backwards else nodes, "g", values[:1], values[1:])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def names(model):
    return [n.name for n in model.graph.nodes]


def test_20_000_nodes_are_read_cleaned_sorted_and_written_in_3_seconds():
    proto = chain(20_000)
    begin = time.process_time()

    model = from_proto(proto)
    remove_dead(model, Context())
    sort(model)
    written = model.to_bytes()

    assert time.process_time() - begin < 3
    assert written == proto.SerializeToString(deterministic=True)


def test_a_chain_of_20_000_nodes_in_reverse_order_is_sorted():
    model = from_proto(chain(20_000, backwards=True))

    sort(model)

    assert names(model) == [f"n{i}" for i in range(20_000)]


@pytest.mark.parametrize("seed", [None, 0])
def test_a_value_with_4_000_readers_is_redirected_in_a_tenth_of_a_second(seed):
    nodes = [helper.make_node("Relu", ["a"], [f"o{i}"]) for i in range(4000)]
    order = np.arange(4000) if seed is None else np.random.default_rng(seed).permutation(4000)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "o0")]
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["a"]), *(nodes[i] for i in order)], "g", values[:1], values[1:]
    )
    model = from_proto(helper.make_model(graph))
    begin = time.process_time()

    model.redirect(model.graph.nodes[0].outputs[0], model.graph.inputs[0])

    assert time.process_time() - begin < 0.1
    assert all(n.inputs[0] is model.graph.inputs[0] for n in model.graph.nodes[1:])
    assert len(model.graph.inputs[0].outputs) == 4001


def test_a_valid_order_stays():
    model = from_proto(hostile.CASES["outputs_are_in_another_order_than_the_nodes"]())
    before = list(model.graph.nodes)

    sort(model)

    assert model.graph.nodes == before


def test_a_node_stands_before_the_branch_that_reads_its_value():
    model = from_proto(hostile.CASES["branches_capture_a_weight"]())
    model.graph.nodes.reverse()

    sort(model)

    assert [n.op for n in model.graph.nodes] == ["Relu", "If"]


def test_a_cycle_is_refused_by_name():
    proto = chain(3)
    proto.graph.node[0].input[0] = "t2"
    with pytest.raises(ModelError, match="cycle through node 'n"):
        sort(from_proto(proto))


def test_a_node_that_reads_itself_is_a_cycle():
    proto = chain(1)
    proto.graph.node[0].input[0] = "t1"
    with pytest.raises(ModelError, match="cycle"):
        sort(from_proto(proto))


def test_each_place_of_a_reader_is_redirected():
    model = from_proto(hostile.CASES["the_value_is_used_twice_in_one_node"]())
    conv, mul = model.graph.nodes
    fresh = model.variable("fresh")

    model.redirect(conv.outputs[0], fresh)

    assert [t is fresh for t in mul.inputs] == [True, True]
    assert fresh.outputs == [mul, mul]
    assert conv.outputs[0].outputs == []


def test_readers_in_branches_are_redirected():
    model = from_proto(hostile.CASES["branches_capture_a_weight"]())
    relu = model.graph.nodes[0]

    model.redirect(relu.outputs[0], model.graph.inputs[0])

    assert all(scope.nodes[0].inputs[0] is model.graph.inputs[0] for scope in list(model.scopes())[1:])


def test_replacing_an_output_keeps_its_name_and_type():
    model = from_proto(hostile.CASES["concat_in_a_concat"]())
    identity = next(n for n in model.graph.nodes if n.op == "Identity")
    old, new = identity.outputs[0], identity.inputs[0]
    assert model.replaceable(model.graph, old, new)

    model.replace(model.graph, old, new)
    model.graph.remove([identity])

    proto = onnx.ModelProto.FromString(model.to_bytes())
    assert proto.graph.output == hostile.CASES["concat_in_a_concat"]().graph.output
    onnx.checker.check_model(proto)


@pytest.mark.parametrize("name", ["identity_from_input_to_output", "identity_of_a_weight_is_an_output"])
def test_an_output_cannot_become_an_input_or_a_weight(name):
    model = from_proto(hostile.CASES[name]())
    identity = next(n for n in model.graph.nodes if n.op == "Identity")

    assert not model.replaceable(model.graph, identity.outputs[0], identity.inputs[0])


def test_removed_nodes_are_disconnected_with_their_branches():
    model = from_proto(hostile.CASES["branches_capture_a_weight"]())
    relu, branch = model.graph.nodes

    model.graph.remove([branch])

    assert model.graph.nodes == [relu]
    assert relu.outputs[0].outputs == []
    assert model.graph.initializers[0].outputs == []


def test_fresh_names_are_free_in_all_scopes():
    model = from_proto(hostile.CASES["branches_reuse_names"]())

    assert model.fresh("t") == "t_1"
    assert model.fresh("t") == "t_2"
    assert model.fresh("new") == "new"


def test_constants_are_found_behind_all_forms_of_constant_nodes():
    body = """g () => (float y) { a = Constant<value_float=2.5>() b = Constant<value_ints=[1,2]>()
    c = Constant<value_string="s">() d = Constant<value=int8[1] {7}>() y = Identity(a) }"""
    model = from_proto(hostile.parse(body))

    found = [model.value(n.outputs[0]) for n in model.graph.nodes[:4]]

    assert [(v.dtype.kind, v.tolist()) for v in found] == [("f", 2.5), ("i", [1, 2]), ("O", "s"), ("i", [7])]
    assert [v.dtype.itemsize for v in (found[0], found[1])] == [4, 8]


def test_an_initializer_that_a_caller_may_override_is_no_constant():
    model = from_proto(hostile.CASES["overridable_weight"]())
    weight = next(t for t in model.graph.inputs if t.name == "w")

    assert model.weight(weight) is None
    assert not isinstance(weight, Constant)
    assert weight.default.shape == (4, 3, 3, 3)


def test_a_copy_is_independent():
    model = from_proto(hostile.CASES["conv_bn"]())
    copy = model.copy()
    copy.graph.remove(list(copy.graph.nodes))

    assert len(model.graph.nodes) == 2
    assert producer(model.graph.outputs[0]) is model.graph.nodes[1]


def test_importing_a_newer_operator_set_raises_the_ir_version_that_it_needs():
    model = from_proto(hostile.parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset=13, ir=7))

    model.import_domain("", 21)

    assert model.opset == 21
    assert model.header.ir_version == 10


def test_scopes_know_the_operator_version_of_their_function():
    model = from_proto(hostile.CASES["function_with_constants"]())
    model.functions[0].header.opset_import[0].version = 16

    assert [version for _, version in model.versions()] == [17, 16]
