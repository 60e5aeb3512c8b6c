"""Times of nodes from a real profile; how kernels are told apart is tested with layers (test_layer_table.py)."""

import numpy as np
import onnx

from onnxcomp.node_times import node_times
from onnxcomp.serde import from_proto


def test_fused_and_nameless_nodes_get_the_time_of_their_kernels_and_layouts_belong_to_none() -> None:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[1, 16, 12, 12] x) => (float[1, 16, 12, 12] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w)
          r = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (r, w)
          t = Erf (b)
          y = Conv <pads = [1, 1, 1, 1]> (t, w)
        }"""
    )
    w = (rng.standard_normal((16, 16, 3, 3)) * 0.1).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    model = from_proto(proto)

    times = node_times(model, {"x": rng.standard_normal((1, 16, 12, 12)).astype(np.float32)}, threads=1, runs=2)

    assert {"a", "b", "t", "y"} <= {node.outputs[0].name for node in times.by_node}
    assert set(times.by_node) <= set(model.graph.nodes)
    assert 0 < sum(times.by_node.values()) <= times.total
    assert not model.graph.nodes[0].name  # the model itself keeps its names
