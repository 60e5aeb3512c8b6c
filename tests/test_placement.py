from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxcomp.placement import Execution, KernelRun, fallback, read_profile

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RECORDED = Path(__file__).parent / "profiles"
_QDQ = {"QLinearConv": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 1}  # of Q, DQ, Conv, Q, DQ


def execution(*placed, ran=None):
    runs = tuple(KernelRun(name, op, where, 1.0, 5.0) for where, name, op in (placed if ran is None else ran))
    return Execution(runs, placed)


@pytest.mark.parametrize(
    ("name", "provider", "kernels"),
    [
        pytest.param("cpu_qdq", CPU, _QDQ, id="int8"),
        pytest.param("openvino", "OpenVINOExecutionProvider", {"OpenVINO-EP-subgraph_1": 1}, id="one subgraph"),
    ],
)
def test_kernels_are_read_from_recorded_profiles(name, provider, kernels):
    found = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    runs = read_profile(found["events"], found["runs"])

    assert {run.op: run.count for run in runs} == kernels
    assert {run.provider for run in runs} == {provider}
    assert [run.microseconds for run in runs] == sorted((run.microseconds for run in runs), reverse=True)


def test_the_runs_before_the_last_are_left_out_and_the_lower_median_counts():
    def node(ts, dur):
        return {"cat": "Node", "name": "a_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": "Conv"}}

    def run(ts, dur):
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}

    events = [node(10, 900), run(0, 1000), node(1010, 4), run(1005, 20), node(2010, 6), run(2005, 20)]

    (kernel,) = read_profile(events, 2)
    assert (kernel.count, kernel.microseconds) == (1.0, 4.0)


def test_a_provider_that_ran_every_weighted_operator_has_not_fallen_back():
    placed = ((CUDA, "conv", "Conv"), (CPU, "shape", "Shape"), (CUDA, "fc", "Gemm"))

    assert fallback(execution(*placed), CUDA) is None


def test_an_engine_counts_by_the_nodes_assigned_to_it():
    placed = ((TENSORRT, "conv", "Conv"), (TENSORRT, "fc", "Gemm"))
    engine = ((TENSORRT, "TRTKernel_graph_g_1_0", "TRTKernel_graph_g_1"),)

    assert fallback(execution(*placed, ran=engine), TENSORRT) is None


def test_a_provider_that_ran_nothing_is_told():
    text = fallback(execution((CPU, "conv", "Conv"), (CPU, "relu", "Relu")), CUDA)

    assert text == f"{CUDA} loaded but ran none of the 2 nodes; they ran on {CPU}"


def test_a_weighted_operator_elsewhere_is_named():
    text = fallback(execution((CUDA, "conv", "Conv"), (CPU, "slow", "ConvTranspose"), (CUDA, "r", "Relu")), CUDA)

    assert text is not None
    assert "1 of 2 weighted operators" in text
    assert "ConvTranspose 'slow', which ran on CPUExecutionProvider" in text


def test_without_an_assignment_the_profile_decides():
    ran = (KernelRun("conv", "Conv", CPU, 1.0, 9.0), KernelRun("relu", "Relu", CUDA, 1.0, 1.0))

    assert "1 of 1 weighted" in (fallback(Execution(ran), CUDA) or "")


def test_the_cpu_cannot_fall_back():
    assert fallback(execution(), CPU) is None


def test_the_json_counts_assigned_operators_and_lists_what_ran():
    found = execution((CUDA, "a", "Conv"), (CUDA, "b", "Conv"), (CPU, "c", "Shape")).to_json()

    assert found["assigned"] == {CUDA: {"Conv": 2}, CPU: {"Shape": 1}}
    assert found["nodes"][0] == {"name": "a", "op": "Conv", "provider": CUDA, "count": 1.0, "us": 5.0}
