"""What callers of a model rely on: names, order, types and dimensions of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxcomp.runtime import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["interface_changes"]

Dim = int | str | None


def interface_changes(
    original: onnx.ModelProto, candidate: onnx.ModelProto, inputs: Sequence[Sequence[TensorSpec]]
) -> list[str]:
    """How the candidate's declared interface differs from the original's, one sentence each; empty if it does
    not.

    `inputs` are the required inputs of both sessions: initializers that are listed as inputs too do not
    count. Names, order, element types, ranks, fixed and symbolic dimensions have to be equal. Where the
    original leaves an output's shape or dimension open and unnamed, the candidate may say more.
    """
    changes: list[str] = []
    for what in ("input", "output"):
        sides = []
        for proto, required in zip((original, candidate), inputs, strict=True):
            values = proto.graph.input if what == "input" else proto.graph.output
            wanted = {spec.name for spec in required}
            sides.append([v for v in values if what == "output" or v.name in wanted])
        names = [[v.name for v in side] for side in sides]
        if names[0] != names[1]:
            changes.append(f"the {what}s are {_listed(names[1])}, but the original's are {_listed(names[0])}")
            continue
        for before, after in zip(*sides, strict=True):
            change = _type_change(before.type, after.type, strict=what == "input")
            if change:
                changes.append(f"{what} {before.name!r} {change}")
    return changes


def _type_change(before: onnx.TypeProto, after: onnx.TypeProto, strict: bool) -> str:
    kinds = before.WhichOneof("value"), after.WhichOneof("value")
    if kinds[0] is None and not strict:
        return ""
    if kinds[0] != kinds[1]:
        return f"is a {_kind(kinds[1])}, in the original a {_kind(kinds[0])}"
    if kinds[0] != "tensor_type":
        same = before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)
        return "" if same else f"is a {_kind(kinds[1])} of other elements than in the original"
    a, b = before.tensor_type, after.tensor_type
    if a.elem_type != b.elem_type:
        return f"has elements of type {_element(b.elem_type)}, in the original {_element(a.elem_type)}"
    old, new = _dims(a), _dims(b)
    if old is None:
        return "" if new is None or not strict else f"has the shape {_shown(new)}, in the original none"
    same = new is not None and len(old) == len(new) and all(
        x == y or (x is None and not strict) for x, y in zip(old, new, strict=True)
    )  # fmt: skip
    return "" if same else f"has the shape {_shown(new)}, in the original {_shown(old)}"


def _dims(tensor: onnx.TypeProto.Tensor) -> tuple[Dim, ...] | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)


def _element(number: int) -> str:
    from onnx import TensorProto

    return (
        TensorProto.DataType.Name(number).lower() if number in TensorProto.DataType.values() else str(number)
    )


def _kind(name: str | None) -> str:
    return (name or "value without type").removesuffix("_type").replace("_", " ")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names) or "none"


def _shown(dims: tuple[Dim, ...] | None) -> str:
    return "none" if dims is None else "[" + ", ".join("?" if d is None else str(d) for d in dims) + "]"
