"""Reading a model and writing it again without a pass loses nothing."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant
from onnxcomp.manager import Context
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.serde import export_model, from_proto, import_model
from tests import hostile
from tests.conformance import graphs

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
DTYPES = [
    *[
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ],
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2),
    *(
        ml_dtypes.float8_e5m2fnuz,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.float4_e2m1fn,
        ml_dtypes.int2,
        ml_dtypes.uint2,
    ),
]


def small():
    return hostile.parse(
        "g (float[N,3] x) => (float[N,4] y) { a = Relu(x) y = Gemm(a, w, b) }",
        w=np.ones((3, 4), "f4"),
        b=np.ones(4, "f4"),
    )


def again(proto):
    return onnx.ModelProto.FromString(from_proto(proto).to_bytes())


def assert_kept(proto):
    assert again(proto) == proto


@pytest.mark.parametrize("name", sorted(hostile.CASES))
def test_hostile_graphs_come_back_equal(name):
    assert_kept(hostile.CASES[name]())


@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator"])
def test_packaged_models_come_back_equal(kind):
    for path in sorted((DATA / kind).glob("*/model.onnx")):
        proto = onnx.load(path)
        for tensor in (t for g in graphs(proto) for t in g.initializer):
            if len(tensor.float_data) > 255:  # a large payload is written raw
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        assert again(proto) == proto, path


def add_metadata(proto):
    def add(message):
        message.metadata_props.add(key="names", value="{0: 'cat'}")

    for message in (proto, proto.graph, proto.graph.node[0], proto.graph.input[0], proto.graph.initializer[0]):
        add(message)
    proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 3]))
    add(proto.graph.value_info[0])


def add_doc_strings(proto):
    graph = proto.graph
    for message in (proto, graph, graph.node[0], graph.input[0], graph.output[0], graph.initializer[0]):
        message.doc_string = "what it is"
    graph.node[1].attribute.append(helper.make_attribute("alpha", 1.0))
    graph.node[1].attribute[0].doc_string = "a factor"


def add_model_fields(proto):
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "tool", "1.2", "org.example", 7


def add_quantization_annotation(proto):
    annotation = proto.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")


def add_unused_parts(proto):
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(2), "unused"))
    proto.graph.value_info.append(helper.make_tensor_value_info("nowhere", TensorProto.FLOAT, [1]))
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["dead"], name="dead"))


def add_dimension_denotation(proto):
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"


def add_training_info(proto):
    training = proto.training_info.add()
    training.algorithm.node.append(helper.make_node("Identity", ["w"], ["w_new"]))
    training.update_binding.add(key="w", value="w_new")


def add_overload(proto):
    proto.functions.append(
        helper.make_function("local", "F", ["p"], ["q"], [helper.make_node("Relu", ["p"], ["q"])], [])
    )
    proto.functions[0].overload = "v2"
    proto.functions[0].doc_string = "a function"
    proto.functions[0].metadata_props.add(key="k", value="v")
    proto.functions[0].value_info.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, None))
    proto.functions[0].attribute.append("alpha")
    proto.functions[0].attribute_proto.append(helper.make_attribute("beta", 2))
    proto.graph.node.append(helper.make_node("F", ["x"], ["f"], domain="local", overload="v2"))


def add_device_configuration(proto):
    proto.configuration.add(name="two", num_devices=2, device=["a", "b"])
    proto.graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)


def add_sparse_initializer(proto):
    sparse = proto.graph.sparse_initializer.add(dims=[3, 4])
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1, 2], [1, 2]))


def add_odd_attributes(proto):
    tensor = numpy_helper.from_array(np.arange(3), "inner")
    attributes = [
        helper.make_attribute("none", [], attr_type=AttributeProto.INTS),
        helper.make_attribute("no_floats", [], attr_type=AttributeProto.FLOATS),
        helper.make_attribute("bytes", b"\xff\xfe"),
        helper.make_attribute("strings", [b"\xff", b"ok"]),
        helper.make_attribute("tensor", tensor),
        helper.make_attribute("tensors", [tensor, tensor]),
        helper.make_attribute("type", helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"])),
        helper.make_attribute("graphs", [helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "h", [], [])]),
        helper.make_attribute("nan", float("nan")),
    ]
    sparse = AttributeProto(name="sparse", type=AttributeProto.SPARSE_TENSOR)
    sparse.sparse_tensor.dims.append(4)
    proto.graph.node.add(
        op_type="Odd", domain="org.example", input=["x"], output=["odd"], attribute=[*attributes, sparse]
    )


def add_other_types(proto):
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", None, 3])
    kinds = [
        helper.make_sequence_type_proto(tensor),
        helper.make_optional_type_proto(tensor),
        helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor)),
        helper.make_map_type_proto(TensorProto.INT64, tensor),
        helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [3, 4]),
    ]
    for number, kind in enumerate(kinds):
        proto.graph.input.append(helper.make_value_info(f"in{number}", kind))
        proto.graph.node.append(helper.make_node("Identity", [f"in{number}"], [f"out{number}"]))
        proto.graph.output.append(helper.make_value_info(f"out{number}", kind))


def add_opset_imports(proto):
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    proto.opset_import.add(domain="org.example", version=1)


ADDITIONS = [
    add_metadata, add_doc_strings, add_model_fields, add_quantization_annotation, add_unused_parts,
    add_dimension_denotation, add_training_info, add_overload, add_device_configuration, add_sparse_initializer,
    add_odd_attributes, add_other_types, add_opset_imports,
]  # fmt: skip


@pytest.mark.parametrize("add", ADDITIONS)
def test_a_field_is_kept(add):
    proto = small()
    add(proto)

    assert str(again(proto)) == str(proto)  # not the messages: NaN differs from itself


@pytest.mark.parametrize("add", [add_metadata, add_model_fields, add_dimension_denotation, add_doc_strings])
def test_a_field_is_kept_where_a_pass_changed_something_else(add):
    proto = small()
    add(proto)
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["dead"]))
    model = from_proto(proto)

    Cleanup().run(model, Context())

    del proto.graph.node[-1]
    assert onnx.ModelProto.FromString(model.to_bytes()) == proto


def test_the_message_that_is_read_is_not_changed():
    proto = small()
    before = proto.SerializeToString()
    model = from_proto(proto)
    model.graph.nodes[0].name = "other"
    model.graph.initializers[0].values = np.zeros((3, 4), np.float32)

    assert proto.SerializeToString() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 5000])
def test_an_edited_constant_has_the_new_values_in_its_element_type(dtype, size):
    model = from_proto(small())
    values = np.arange(size).astype(np.int64) % 2
    model.graph.initializers[0].values = values.astype(dtype)

    (tensor, _) = onnx.ModelProto.FromString(model.to_bytes()).graph.initializer

    assert tensor.data_type == helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert (numpy_helper.to_array(tensor) == values.astype(dtype)).all()


def test_an_edited_constant_can_hold_strings():
    model = from_proto(small())
    model.graph.initializers[0].values = np.array(["a", "ü"], object)

    tensor = onnx.ModelProto.FromString(model.to_bytes()).graph.initializer[0]

    assert numpy_helper.to_array(tensor).tolist() == ["a", "ü"]


def test_an_array_in_foreign_byte_order_is_stored_right():
    model = from_proto(small())
    model.graph.initializers[0].values = np.arange(3, dtype=">f4")

    assert numpy_helper.to_array(onnx.ModelProto.FromString(model.to_bytes()).graph.initializer[0]).tolist() == [
        0,
        1,
        2,
    ]


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.int8, np.bool_, np.float16]), arrays.array_shapes(min_dims=0, min_side=0)
    )
)
@settings(max_examples=50, deadline=None)
def test_any_array_comes_back_bit_for_bit(values):
    model = from_proto(small())
    model.graph.initializers[0].values = values

    found = numpy_helper.to_array(onnx.ModelProto.FromString(model.to_bytes()).graph.initializer[0])

    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_a_view_that_is_not_contiguous_is_stored_in_its_own_order():
    model = from_proto(small())
    model.graph.initializers[0].values = np.arange(4000, dtype=np.float32).reshape(50, 80).T

    tensor = onnx.ModelProto.FromString(model.to_bytes()).graph.initializer[0]

    assert numpy_helper.to_array(tensor)[3, 2] == 163


def test_a_weight_that_branches_capture_is_written_once():
    proto = again(hostile.CASES["branches_capture_a_weight"]())

    assert [len(g.initializer) for g in graphs(proto)] == [1, 0, 0]


def test_exported_messages_hold_no_large_payload():
    model = from_proto(small())
    model.graph.initializers[0].values = np.zeros((3, 4000), np.float32)

    proto, payloads = export_model(model)

    assert proto.ByteSize() < 2000
    assert [p.nbytes for p in payloads] == [48000]
    assert import_model(proto, payloads).graph.initializers[0].values.shape == (3, 4000)


def test_a_renamed_value_is_renamed_where_a_branch_reads_it():
    model = from_proto(hostile.CASES["branches_capture_a_weight"]())
    model.graph.nodes[0].outputs[0].name = "renamed"

    bodies = graphs(onnx.ModelProto.FromString(model.to_bytes()))[1:]

    assert all("renamed" in body.node[0].input for body in bodies)


def test_a_value_that_a_branch_would_hide_keeps_its_meaning():
    model = from_proto(hostile.CASES["branch_hides_a_weight"]())
    identity = model.graph.nodes[0]
    model.redirect(identity.outputs[0], identity.inputs[0])

    proto = onnx.ModelProto.FromString(model.to_bytes())

    branch = next(g for g in graphs(proto) if g.name == "t")
    assert branch.initializer[0].name != "w"
    assert [n.input[1] for n in branch.node] == [branch.initializer[0].name, "w"]


def test_a_value_that_nobody_provides_is_named():
    proto = small()
    proto.graph.node[0].input[0] = "missing"

    with pytest.raises(ModelError, match="'missing'"):
        from_proto(proto)


def test_a_value_that_two_nodes_compute_is_named():
    proto = small()
    proto.graph.node[1].output[0] = "a"

    with pytest.raises(ModelError, match="computes 'a'"):
        from_proto(proto)


def test_initializers_of_an_old_model_stay_listed_and_new_ones_are_listed():
    proto = hostile.CASES["inputs_list_the_weights_as_before_ir_4"]()
    model = from_proto(proto)
    fresh = model.constant(model.graph, "fresh", np.ones(1, np.float32))
    assert isinstance(fresh, Constant)

    written = onnx.ModelProto.FromString(model.to_bytes())

    assert [v.name for v in written.graph.input] == [*(v.name for v in proto.graph.input), "fresh"]
