"""Checks a model before native code sees it: versions, tensors, structure, and what its constants demand.

Everything here is plain Python over the skeleton of `onnxcomp.wire`, linear in its size. What passes is a
graph in single static assignment form without cycles or dangling inputs, whose tensors hold what their shapes
say, whose external data lie where they may, and whose constants alone cannot exhaust memory or time. Whether
the operators get along with each other's types and shapes is left to ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, defs

from onnxcomp.bounds import Scope
from onnxcomp.errors import ModelError
from onnxcomp.external import Reference, Storage
from onnxcomp.limits import Limits
from onnxcomp.structure import RUNTIME_DOMAINS, canonical, check_structure, subgraphs, versions
from onnxcomp.tensors import check_tensor, tensors

__all__ = ["check", "custom_operators"]

_OLDEST_IR = 3  # the first version with initializers and opset imports as they are today
_OLDEST_OPSET = 7  # what ONNX Runtime promises to run
# Operators of the domain "" that are not ONNX: ONNX Runtime had them before its own domain, and runs them.
_LEGACY_OPERATORS = frozenset(
    (
        "Affine",
        "Crop",
        "DynamicSlice",
        "ImageScaler",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
        "ThresholdedRelu",
    )
)


def check(proto: ModelProto, storage: Storage | None, limits: Limits | None = None) -> list[str]:
    """Check the skeleton of a model; returns remarks on what is unusual but harmless.

    `storage` finds external data; without one, for a model that did not come from a file, they are refused.
    Raises ModelError, which names the node, tensor or function, for the first thing that is wrong.
    """
    limits = limits or Limits()
    notes = _check_versions(proto, limits)

    def locate(tensor: TensorProto) -> Reference:
        if storage is None:
            raise ModelError(
                f"tensor {tensor.name!r} has external data, but this model has no file that they could lie "
                "beside; give the path of the model file instead"
            )
        return storage.locate(tensor)

    for where, tensor in tensors(proto):
        check_tensor(tensor, where)
        if tensor.data_location == TensorProto.EXTERNAL:
            remark = locate(tensor).remark
            notes += [remark] if remark else []
    notes += check_structure(proto, limits, Scope(lambda tensor: locate(tensor).bytes().tobytes()))
    return list(dict.fromkeys(notes))


def custom_operators(proto: ModelProto) -> list[tuple[str, str]]:
    """The (domain, operator) pairs, sorted, that neither ONNX, ONNX Runtime nor the model itself defines."""
    local = {(canonical(function.domain), function.name) for function in proto.functions}
    found: set[tuple[str, str]] = set()
    stack: list[Any] = [proto.graph.node, *(function.node for function in proto.functions)]
    while stack:
        for node in stack.pop():
            found.add((canonical(node.domain), node.op_type))
            for graph in subgraphs(node):
                stack.append(graph.node)
    return sorted(
        (domain, name)
        for domain, name in found - local
        if domain not in RUNTIME_DOMAINS
        and not (domain == "" and name in _LEGACY_OPERATORS)
        and not defs.has(name, domain)
    )


def _check_versions(proto: ModelProto, limits: Limits) -> list[str]:
    if not _OLDEST_IR <= proto.ir_version <= limits.ir_version:
        raise ModelError(
            f"the model has IR version {proto.ir_version}; versions {_OLDEST_IR} to {limits.ir_version} are "
            "supported, so export it anew"
        )
    if not proto.opset_import:
        raise ModelError("the model imports no operator set, so the meaning of its operators is not known")
    notes = []
    newest = min(limits.opset, defs.onnx_opset_version())
    for imports in (proto.opset_import, *(function.opset_import for function in proto.functions)):
        imported = versions(imports)
        version = imported.get("", newest)
        if not 1 <= version <= newest:
            raise ModelError(
                f"the model uses opset {version}; 1 to {newest} are supported, so export it anew"
            )
        if version < _OLDEST_OPSET:
            notes.append(
                f"opset {version} is older than {_OLDEST_OPSET}, so ONNX Runtime does not promise to run it"
            )
    return notes
