"""Which execution provider got which node, which kernels ran, and whether that is what was asked for.

The list of a session's providers proves nothing: a provider may be there and run nothing. Two things do. The
assignment (ONNX Runtime 1.24 and newer) tells the provider of each node of the graph before layouts and int8 fusions;
the profile tells the kernels that ran, among them whether a quantized Conv ran as QLinearConv or as float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from onnxcomp.providers import CPU

__all__ = ["FLOAT_KERNELS", "INT8_KERNELS", "Execution", "Kernel", "KernelRun", "fallback", "read_profile"]

# Kernels of ONNX Runtime that multiply 8-bit integers, or stay in the 8-bit domain between such kernels.
INT8_KERNELS = frozenset(
    "QLinearConv QLinearMatMul QLinearAdd QLinearMul QLinearGlobalAveragePool QLinearAveragePool QLinearConcat "
    "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearWhere QLinearReduceMean ConvInteger MatMulInteger "
    "MatMulIntegerToFloat DynamicQuantizeMatMul DynamicQuantizeLSTM QGemm QAttention NhwcMaxPool MatMulNBits".split()
)
# Their float counterparts: the kernels that take the time of a float model.
FLOAT_KERNELS = frozenset(
    "Conv FusedConv MatMul Gemm FusedMatMul FusedGemm ConvTranspose Attention MultiHeadAttention LSTM GRU RNN".split()
)
# Operators that take the time of a model. What a provider leaves to the CPU besides (shapes, control flow) is normal.
_WEIGHTED = FLOAT_KERNELS | frozenset("QLinearConv QLinearMatMul ConvInteger MatMulInteger QGemm QAttention".split())


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel that ran: how often per run of the model, and how many microseconds per run in all."""

    provider: str
    op: str
    count: float
    microseconds: float


@dataclass(frozen=True)
class KernelRun:
    """One node of the graph as ONNX Runtime executes it; `microseconds` per run of the model, over `count` calls."""

    name: str
    op: str
    provider: str
    count: float
    microseconds: float


@dataclass(frozen=True)
class Execution:
    """Proof of what ran. `assigned` lists (provider, name, op) of the nodes, None where this ONNX Runtime is too old
    to tell; `runs` the nodes that ran, most expensive first.
    """

    runs: tuple[KernelRun, ...]
    assigned: tuple[tuple[str, str, str], ...] | None = None

    @property
    def kernels(self) -> list[Kernel]:
        """What ran by provider and kind of kernel, most expensive first."""
        found: dict[tuple[str, str], list[float]] = {}
        for run in self.runs:
            entry = found.setdefault((run.provider, run.op), [0.0, 0.0])
            entry[0] += run.count
            entry[1] += run.microseconds
        kernels = [Kernel(where, op, n, us) for (where, op), (n, us) in found.items()]
        return sorted(kernels, key=lambda k: (-k.microseconds, k.op))

    def to_json(self) -> dict[str, Any]:
        """{"assigned": {provider: {op: nodes}} or None, "nodes": [{name, op, provider, count, us}]}."""
        assigned: dict[str, dict[str, int]] | None = None
        if self.assigned is not None:
            assigned = {}
            for (provider, op), n in Counter((provider, op) for provider, _, op in self.assigned).items():
                assigned.setdefault(provider, {})[op] = n
        nodes = [
            {"name": r.name, "op": r.op, "provider": r.provider, "count": r.count, "us": r.microseconds}
            for r in self.runs
        ]
        return {"assigned": assigned, "nodes": nodes}


def read_profile(events: Sequence[Mapping[str, Any]], runs: int) -> tuple[KernelRun, ...]:
    """The nodes that ran in the last `runs` runs of a profile, most expensive first.

    `events` is the content of the profile. The runs before are left out: the first one allocates and packs. A node's
    time is the lower median of its runs: of four, two that lost the core would spoil the median itself.
    """
    done = sorted(e["ts"] + e["dur"] for e in events if e.get("name") == "model_run")
    begin = done[-runs - 1] if len(done) > runs else 0
    found: dict[tuple[str, str, str], list[int]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and event["ts"] >= begin:
            op, provider = event["args"]["op_name"], event["args"].get("provider", "?")
            found.setdefault((name.removesuffix("_kernel_time"), op, provider), []).append(event["dur"])
    made = [KernelRun(*key, len(us) / runs, median_low(us) * len(us) / runs) for key, us in found.items()]
    return tuple(sorted(made, key=lambda r: (-r.microseconds, r.name)))


def fallback(execution: Execution, provider: str) -> str | None:
    """What `provider` was to run and did not, in one sentence; None if it ran every weighted operator.

    A model without weighted operators has to run at least one node there.
    """
    if provider == CPU:
        return None
    placed = execution.assigned
    if placed is None:
        placed = tuple((run.provider, run.name, run.op) for run in execution.runs)
    ran = {where for where, _, _ in placed} | {run.provider for run in execution.runs}
    others = ", ".join(sorted(ran - {provider})) or "nothing"
    if provider not in ran:
        return f"{provider} loaded but ran none of the {len(placed)} nodes; they ran on {others}"
    weighted = [(where, name, op) for where, name, op in placed if op in _WEIGHTED]
    away = [(where, name, op) for where, name, op in weighted if where != provider]
    if not away:
        return None
    where, name, op = away[0]
    return (
        f"{provider} did not run {len(away)} of {len(weighted)} weighted operators; "
        f"the first is {op} {name!r}, which ran on {where}"
    )
