"""What is there twice: equal initializers of any size, and nodes that compute the same from the same. Bit-exact."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable

from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.manager import Context

__all__ = ["RANDOM", "merge_initializers", "merge_nodes"]

# Two runs, or two equal nodes, give different values.
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
_HOISTED_BYTES = 1024
_SKETCHED_BYTES = 256


def merge_initializers(model: Model, ctx: Context) -> int:
    """Equal initializers become one: same type, same shape, same bytes.

    One in a subgraph gives way to an equal one outside; a large one in several branches moves to the main graph.
    """
    outputs = model.outputs()
    pinned = {
        p.value
        for s in model.scopes()
        for a in s.header.quantization_annotation
        for p in a.quant_parameter_tensor_names
    }
    groups: dict[Hashable, list[tuple[Graph, Constant]]] = {}
    for scope in model.graph.scopes():
        for item in scope.initializers:
            if isinstance(item, Constant) and item.sparse is None and item not in outputs and item.name not in pinned:
                groups.setdefault(_sketch(item), []).append((scope, item))
    ancestors = _ancestors(model.graph)
    gone: set[Constant] = set()
    for group in groups.values():
        if len(group) == 1:
            continue
        equal: dict[bytes, list[tuple[Graph, Constant]]] = {}
        for scope, item in group:
            equal.setdefault(item.weight.digest(), []).append((scope, item))
        for same in equal.values():
            gone |= _merge(model, same, ancestors, ctx)
    for scope in model.graph.scopes() if gone else ():
        scope.initializers = [i for i in scope.initializers if i not in gone]
    return len(gone)


def _sketch(item: Constant) -> Hashable:
    """What is quick to compare: only constants with equal sketches are read as a whole."""
    weight = item.weight
    head = weight.head(_SKETCHED_BYTES) if weight.nbytes > _SKETCHED_BYTES else b""
    return weight.data_type, weight.shape, head


def _merge(
    model: Model, same: list[tuple[Graph, Constant]], ancestors: dict[Graph, list[Graph]], ctx: Context
) -> set[Constant]:
    """Merge constants that are equal; `same` lists outer scopes first."""
    home, first = same[0]
    apart = any(home not in ancestors[scope] for scope, _ in same[1:])
    if apart and first.weight.nbytes >= _HOISTED_BYTES and ctx.allow(f"{first.name} is in several subgraphs"):
        home.initializers.remove(first)
        first.name = model.fresh(first.name)
        model.graph.initializers.append(first)
        home = model.graph
    kept: list[tuple[Graph, Constant]] = [(home, first)]
    gone: set[Constant] = set()
    for scope, item in same[1:]:
        target = next((k for where, k in kept if where in ancestors[scope]), None)
        if target is None:
            kept.append((scope, item))
        elif ctx.allow(f"{item.name} equals {target.name}"):
            model.redirect(item, target)
            gone.add(item)
    return gone


def _ancestors(root: Graph) -> dict[Graph, list[Graph]]:
    """Each scope with the scopes whose values it sees, itself included."""
    found = {root: [root]}
    for scope in root.scopes():
        for body in (b for node in scope.nodes for b in node.bodies()):
            found[body] = [*found[scope], body]
    return found


def merge_nodes(model: Model, ctx: Context) -> int:
    """Nodes that compute the same from the same become one, those of subgraphs with those outside as well."""
    pure = _pure_functions(model)
    merged = 0
    for root in (model.graph, *(f.body for f in model.functions)):
        stack: list[tuple[Graph, ChainMap[Hashable, Node]]] = [(root, ChainMap())]
        while stack:
            scope, outer = stack.pop()
            seen = outer.new_child()
            merged += _merge_scope(model, scope, seen, pure, ctx)
            stack.extend((body, seen) for node in scope.nodes for body in node.bodies())
    return merged


def _merge_scope(
    model: Model, scope: Graph, seen: ChainMap[Hashable, Node], pure: set[tuple[str, str]], ctx: Context
) -> int:
    gone: list[Node] = []
    home = set(scope.nodes)
    for node in scope.nodes:
        key = _key(node, pure)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node or len(first.outputs) < len(node.outputs):
            continue
        pairs = list(zip(node.outputs, first.outputs, strict=False))
        if any(b.name and not a.name for b, a in pairs):
            continue
        if not all(model.replaceable(scope, old, new, home) for old, new in pairs):
            continue
        if ctx.allow(f"{node.label} repeats {first.label}"):
            for old, new in pairs:
                model.replace(scope, old, new)
            gone.append(node)
    scope.remove(gone)
    return len(gone)


def _key(node: Node, pure: set[tuple[str, str]]) -> Hashable:
    """Equal keys: equal results. None where that cannot be known."""
    if node.op in RANDOM or node.bodies() or (node.op == "Dropout" and _trains(node)):
        return None
    if (node.domain or "") not in _STANDARD and (node.domain or "", node.op) not in pure:
        return None
    attrs: list[Hashable] = []
    for name in sorted(node.attrs):
        value = node.attrs[name]
        if isinstance(value, Constant):
            attrs.append((name, value.weight.digest()))
        elif isinstance(value, (int, float, str, bytes, list)):
            attrs.append((name, repr(value)))  # 0.0 and -0.0 differ, as they do in arithmetic
        else:
            return None
    inputs = tuple(id(t) if t.name else None for t in node.inputs)
    # Before opset 14 the number of outputs of a BatchNormalization says whether it is training.
    arity = len(node.outputs) if node.op == "BatchNormalization" else 0
    overload = "" if node.proto is None else getattr(node.proto, "overload", "")
    return (node.domain or "", node.op, overload, inputs, tuple(attrs), arity)


def _trains(node: Node) -> bool:
    return (len(node.inputs) > 2 and bool(node.inputs[2].name)) or "is_test" in node.attrs


def _pure_functions(model: Model) -> set[tuple[str, str]]:
    """Local functions that draw no random numbers and call nothing unknown, themselves and in what they call."""
    known = {(f.header.domain, f.header.name) for f in model.functions}
    waiting: dict[tuple[str, str], set[tuple[str, str]]] = {}
    callers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for function in model.functions:
        key = (function.header.domain, function.header.name)
        called = {c for s in function.body.scopes() for n in s.nodes if (c := _unsure(n)) is not None}
        if called <= known:  # what is called must turn out pure first
            waiting[key] = called
            for callee in called:
                callers.setdefault(callee, []).append(key)
    pure: set[tuple[str, str]] = set()
    ready = [key for key, called in waiting.items() if not called]
    while ready:
        key = ready.pop()
        pure.add(key)
        for caller in callers.get(key, ()):
            waiting[caller].discard(key)
            if not waiting[caller]:
                ready.append(caller)
    return pure


def _unsure(node: Node) -> tuple[str, str] | None:
    """None for a standard operator that always gives the same; else what would have to be a pure function."""
    standard = (node.domain or "") in _STANDARD and node.op not in RANDOM
    if standard and not (node.op == "Dropout" and _trains(node)):
        return None
    return (node.domain or "", node.op)
