"""unpack: give packed weights back as plain initializers, bit for bit. The inverse of `pack`.

A decoder is recognized by what it does: its name says which form it is of, and its body has to be that of this form,
node by node. So a file is unpacked from itself alone, whoever packed it. What is not recognized is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxcomp.errors import ModelError
from onnxcomp.graph import Model, Node
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.codec import Form
from onnxcomp.passes.pack_nodes import forms, restore
from onnxcomp.passes.pack_versions import restore_versions
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
            chosen = [n for n in calls if ctx.allow(f"{n.label} from {n.op}")]
            restore(model, scope, {n: _form(known, n) for n in chosen}, lazy=lazy)
            count, left = count + len(chosen), left + len(calls) - len(chosen)
        if not left:
            restore_versions(model)
        return {"unpacked": count}


def _form(known: Mapping[str, Form], node: Node) -> Form:
    if node.op not in known or len(node.outputs) != 1:
        raise ModelError(f"node {node.label!r} calls {node.kind}, which the model does not define: it is damaged")
    return known[node.op]
