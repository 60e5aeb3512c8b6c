"""unpack: give packed weights back as plain initializers, bit for bit. The inverse of `pack`.

A decoder is recognized by what it does: its name says which form it is of, and its body has to be that of this form,
node by node. So a file is unpacked from itself alone, whoever packed it. What is not recognized is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.pack_nodes import forms, restore, restore_versions, swap
from onnxcomp.storage import DOMAIN, decoded_bytes, is_packed

__all__ = ["Unpack"]


@dataclass(frozen=True)
class Unpack(Pass):
    """Give packed weights back as plain initializers; what `pack` changed besides is undone as well."""

    name: ClassVar[str] = "unpack"
    effect: ClassVar[Effect] = "exact"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if not is_packed(model):
            return {}
        known = forms(model)
        lazy = decoded_bytes(model) > ctx.memory
        count, left = 0, 0
        for scope in list(model.scopes()):
            calls = [n for n in scope.nodes if n.domain == DOMAIN]
            chosen = [n for n in calls if ctx.allow(f"{n.outputs[0].name} from {n.op}")]
            unpack_nodes(model, scope, {n: restore(model, scope, n, known[n.op], lazy=lazy) for n in chosen})
            count, left = count + len(chosen), left + len(calls) - len(chosen)
        if not left:
            restore_versions(model)
        return {"unpacked": count}


def unpack_nodes(model: Model, scope: Graph, restored: Mapping[Node, Constant]) -> None:
    """Take calls out of a scope, and their streams, in whose place the constants go."""
    places: dict[Any, list[Constant]] = {}
    for node, constant in restored.items():
        streams = [t for t in dict.fromkeys(node.inputs) if all(reader in restored for reader in t.outputs)]
        listed = set(scope.initializers)
        for stream in streams:
            places.setdefault(stream, [])
        first = next((t for t in streams if t in listed), None)
        if first is None:
            scope.initializers.append(constant)
        else:
            places[first] = [*places[first], constant]
    scope.remove(restored)
    swap(scope, places)
