"""If with a constant condition: the nodes of the branch that it takes go in its place. Bit-exact."""

from __future__ import annotations

from typing import Any

from onnxcomp.graph import Constant, Graph, Model, Variable, producer
from onnxcomp.manager import Context

__all__ = ["take_branches"]


def take_branches(model: Model, scope: Graph, ctx: Context) -> int:
    """Replace each If of the scope whose condition is constant; returns how many there were."""
    taken = 0
    for node in list(scope.nodes):
        condition = model.value(node.inputs[0]) if node.kind == "If" and node.plain and node.inputs else None
        if condition is None or condition.size != 1:
            continue
        body = node.attrs["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"]
        if not isinstance(body, Graph) or not ctx.allow(f"{node.label}: the condition is constant"):
            continue
        _rename_apart(model, body)
        scope.initializers.extend(body.initializers)
        for old, new in zip(node.outputs, body.outputs, strict=True):
            if isinstance(new, Constant) or producer(new) is None or any(o is old for o in scope.outputs):
                scope.add("Identity", [new], [_take_over(model, scope, old)])
            else:
                model.redirect(old, new)
        moved = list(body.nodes)
        body.nodes.clear()
        place = next(i for i, n in enumerate(scope.nodes) if n is node)
        scope.nodes[place:place] = moved
        scope.remove([node])
        taken += 1
    return taken


def _take_over(model: Model, scope: Graph, old: Any) -> Variable:
    """A variable in the place of `old`, with its name, its readers and its role as an output."""
    new = Variable(old.name, dtype=old.dtype, shape=old.shape)
    new.info = old.info
    model.redirect(old, new)
    scope.outputs = [new if o is old else o for o in scope.outputs]
    old.name = model.fresh(old.name)
    return new


def _rename_apart(model: Model, body: Graph) -> None:
    """Names in a branch may repeat those of other branches; outside they must be unique."""
    own = [t for t in (*body.initializers, *(o for n in body.nodes for o in n.outputs)) if t.name]
    mine = set(own)
    taken = {t.name for s in model.scopes() for t in (*s.inputs, *s.initializers) if t not in mine}
    taken |= {t.name for n in model.nodes() for t in n.outputs if t not in mine}
    for tensor in own:
        if tensor.name in taken:
            tensor.name = model.fresh(tensor.name)
