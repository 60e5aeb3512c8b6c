"""The structure of a model's graphs and functions: names, order, cycles, recursion, and size after expansion.

Each value is defined once per graph, and every value that is used is defined in its graph or in one around
it. A function body sees nothing from outside. Functions do not call themselves, not even through others, and
with every call replaced by its body the model stays within the limits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
)

from onnxcomp.bounds import Scope, check_loop, check_size, check_sparse, label
from onnxcomp.errors import ModelError
from onnxcomp.external import unsafe_location
from onnxcomp.limits import Limits

__all__ = ["RUNTIME_DOMAINS", "canonical", "check_structure", "subgraphs", "versions"]

Key = tuple[str, str, str]  # domain, name, overload of a function

# Domains that ONNX Runtime brings along; a model need not import them.
RUNTIME_DOMAINS = frozenset(
    (
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.microsoft.experimental",
        "com.ms.internal.nhwc",
        "ai.onnx.ml",
        "ai.onnx.training",
        "ai.onnx.preview.training",
    )
)
_MESSAGES_PER_GRAPH = 3  # a subgraph is a GraphProto in an AttributeProto in a NodeProto


def check_structure(proto: ModelProto, limits: Limits, scope: Scope) -> list[str]:
    """Check all graphs and functions of a model; returns remarks on what is unusual but harmless.

    `scope` gives the payload of external constants. Raises ModelError for the first thing that is wrong.
    """
    functions: dict[Key, FunctionProto] = {}
    for function in proto.functions:
        key = (canonical(function.domain), function.name, function.overload)
        if functions.setdefault(key, function) is not function:
            raise ModelError(f"function {function.name!r} of domain {function.domain!r} is defined twice")
    if not proto.graph.output:
        raise ModelError("the model has no outputs")
    walk = _Walk(limits, frozenset(functions))
    sizes: dict[Key | None, _Size] = {None: walk.owner(proto.opset_import)}
    _refuse_missing(walk.graph(proto.graph, scope, 1), "")
    for key, function in functions.items():
        sizes[key] = walk.owner(function.opset_import)
        where = f" of function {function.name!r}"
        walk.check_names(function.input, "input" + where)
        inner = scope.enter((), function.node)
        _refuse_missing(walk.body(function.node, function.input, function.output, inner, where, 1), where)
    _check_expansion(sizes, limits)
    return walk.notes()


def canonical(domain: str) -> str:
    """The domain of ONNX itself has two names."""
    return "" if domain == "ai.onnx" else domain


def versions(imports: Iterable[OperatorSetIdProto]) -> dict[str, int]:
    """Domain -> version. Raises ModelError if a domain is imported in two versions."""
    found: dict[str, int] = {}
    for entry in imports:
        domain = canonical(entry.domain)
        if found.setdefault(domain, entry.version) != entry.version:
            raise ModelError(
                f"versions {found[domain]} and {entry.version} of domain {domain!r} are both imported"
            )
    return found


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes."""
    found = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            found.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            found.extend(attribute.graphs)
    return found


@dataclass
class _Size:
    """Nodes of the model or of one function, subgraphs included, and how often it calls each function."""

    nodes: int = 0
    calls: Counter[Key] = field(default_factory=Counter)


class _Walk:
    """Checks graphs one after another and keeps the totals of the whole model."""

    def __init__(self, limits: Limits, functions: frozenset[Key]) -> None:
        self.limits, self.functions = limits, functions
        self.nodes = self.attributes = self.late = 0
        self.node_names: Counter[str] = Counter()
        self.unimported: set[str] = set()

    def owner(self, imports: Iterable[OperatorSetIdProto]) -> _Size:
        """Begin with the model's graph or a function."""
        self.size, self.imports = _Size(), versions(imports)
        return self.size

    def graph(self, graph: GraphProto, outer: Scope, depth: int) -> dict[str, str]:
        """Check a graph; returns the values that it takes from outside, each with the node that wants it."""
        scope = outer.enter(graph.initializer, graph.node)
        where = f" of graph {graph.name!r}" if depth > 1 else ""
        weights = [tensor.name for tensor in graph.initializer]
        for sparse in graph.sparse_initializer:
            check_sparse(sparse, f"sparse initializer {sparse.values.name!r}", self.limits)
            weights.append(sparse.values.name)
        inputs = [value.name for value in graph.input]
        scope.declare(graph.input)
        for names, kind in ((weights, "initializer"), (inputs, "input")):
            self.check_names(names, kind + where)
        return self.body(graph.node, {*inputs, *weights}, [v.name for v in graph.output], scope, where, depth)

    def body(
        self,
        nodes: Sequence[NodeProto],
        given: Iterable[str],
        outputs: Iterable[str],
        scope: Scope,
        where: str,
        depth: int,
    ) -> dict[str, str]:
        """Check the nodes of a graph or function with its inputs and initializers; returns as `graph`."""
        known = set(given)
        producers = self.producers(nodes, known, where)
        missing: dict[str, str] = {}
        captured: dict[int, dict[str, str]] = {}
        ordered = True
        for index, node in enumerate(nodes):
            inner = self.node(node, scope, depth)
            if inner:
                captured[index] = inner
            for name in (*node.input, *inner):
                if name in known or not name:
                    continue
                if name in producers:
                    ordered = False
                else:
                    missing.setdefault(name, inner.get(name) or label(node))
            known.update(node.output)
        if not ordered:
            self.late += 1
            _check_cycles(nodes, producers, captured)
        for name in outputs:
            if name not in known:
                raise ModelError(
                    f"output {name!r}{where} is not produced by any node; the model is incomplete"
                )
        return missing

    def producers(self, nodes: Sequence[NodeProto], known: set[str], where: str) -> dict[str, int]:
        """Value -> index of its node; a value that is defined twice is refused."""
        producers: dict[str, int] = {}
        for index, node in enumerate(nodes):
            for name in node.output:
                if name in known or name in producers:
                    raise ModelError(f"{label(node)} defines {name!r}{where} again; names must be unique")
                if name:
                    producers[name] = index
        self.check_text(producers, "value" + where)
        return producers

    def node(self, node: NodeProto, scope: Scope, depth: int) -> dict[str, str]:
        """Check one node; returns the values that its subgraphs take from outside."""
        self.nodes += 1
        self.size.nodes += 1
        self.attributes += len(node.attribute)
        if self.nodes > self.limits.nodes or self.attributes > self.limits.attributes:
            raise ModelError(f"more than {self.limits.nodes} nodes or {self.limits.attributes} attributes")
        domain, op_type = canonical(node.domain), node.op_type
        self.check_text((node.name, domain, op_type), "the name")
        key = (domain, op_type, node.overload)
        if node.name:
            self.node_names[node.name] += 1
        if domain not in self.imports:
            if domain not in RUNTIME_DOMAINS:
                raise ModelError(
                    f"{label(node)} is of domain {domain!r}, but the model does not import that domain"
                )
            self.unimported.add(domain)
        if key in self.functions:
            self.size.calls[key] += 1
        if domain == "":  # also when a function has the name: ONNX Runtime may take the operator
            check_size(node, scope, self.limits)
            if op_type == "Loop":
                check_loop(node, scope, self.limits)
        elif op_type == "EPContext":
            _check_context(node)
        missing: dict[str, str] = {}
        for graph in subgraphs(node):
            if depth * _MESSAGES_PER_GRAPH > self.limits.depth:
                raise ModelError(
                    f"{label(node)} is nested too deep: more than {depth} graphs inside each other"
                )
            for name, user in self.graph(graph, scope, depth + 1).items():
                missing.setdefault(name, user)
        return missing

    def check_names(self, names: Sequence[str], kind: str) -> None:
        """Names of one kind must be there, be unique and be text."""
        self.check_text(names, kind)
        if len(set(names)) < len(names) or "" in names:
            twice = next(name for name, count in Counter(names).items() if count > 1 or not name)
            raise ModelError(
                f"the name {twice!r} is used for more than one {kind}, or is empty; names must be unique"
            )

    def check_text(self, names: Iterable[str], kind: str) -> None:
        """protobuf hands out bytes for a string that is not UTF-8."""
        for name in names:
            if not isinstance(name, str) or len(name) > self.limits.name_bytes:
                raise ModelError(
                    f"{kind} {name[:40]!r}... is not UTF-8 or longer than {self.limits.name_bytes}"
                )

    def notes(self) -> list[str]:
        """What was unusual but harmless."""
        notes = []
        if self.late:
            notes.append(f"in {self.late} graphs nodes came before their inputs; they were sorted")
        again = [name for name, count in self.node_names.items() if count > 1]
        if again:
            notes.append(f"{len(again)} node names are used more than once, such as {again[0]!r}")
        notes += [f"domain {domain!r} is used but not imported" for domain in sorted(self.unimported)]
        return notes


def _check_cycles(
    nodes: Sequence[NodeProto], producers: Mapping[str, int], captured: Mapping[int, Mapping[str, str]]
) -> None:
    """Kahn's algorithm: what cannot be put in order is in a cycle or behind one."""
    wants = [
        {producers[name] for name in (*node.input, *captured.get(index, ())) if name in producers}
        for index, node in enumerate(nodes)
    ]
    users: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(wants):
        for producer in needed:
            users[producer].append(index)
    open_inputs = [len(needed) for needed in wants]
    ready = deque(index for index, count in enumerate(open_inputs) if count == 0)
    while ready:
        for user in users[ready.popleft()]:
            open_inputs[user] -= 1
            if open_inputs[user] == 0:
                ready.append(user)
    stuck = next((index for index, count in enumerate(open_inputs) if count), None)
    if stuck is None:
        return
    passed: set[int] = set()
    while stuck not in passed:  # backwards from a stuck node every path ends in a cycle
        passed.add(stuck)
        stuck = next(producer for producer in wants[stuck] if open_inputs[producer])
    raise ModelError(f"{label(nodes[stuck])} needs its own output; the graph has a cycle")


def _check_expansion(sizes: Mapping[Key | None, _Size], limits: Limits) -> None:
    """expanded(f) = nodes(f) + sum over callees g of calls(f, g) * expanded(g); None is the main graph."""
    callers: dict[Key, list[Key | None]] = {}
    for owner, size in sizes.items():
        for callee in size.calls:
            callers.setdefault(callee, []).append(owner)
    waiting = {owner: len(size.calls) for owner, size in sizes.items()}
    ready = deque(owner for owner, count in waiting.items() if count == 0)
    expanded: dict[Key | None, int] = {}
    while ready:
        owner = ready.popleft()
        size = sizes[owner]
        total = size.nodes + sum(count * expanded[callee] for callee, count in size.calls.items())
        expanded[owner] = min(total, limits.expanded_nodes + 1)
        for caller in callers.get(owner, ()) if owner is not None else ():
            waiting[caller] -= 1
            if waiting[caller] == 0:
                ready.append(caller)
    stuck = [owner[1] for owner, count in waiting.items() if count and owner is not None]
    if stuck:
        raise ModelError(
            f"function {stuck[0]!r} calls itself, directly or through others; ONNX has no recursion"
        )
    if expanded[None] > limits.expanded_nodes:
        raise ModelError(f"with its functions expanded the model has more than {limits.expanded_nodes} nodes")


def _check_context(node: NodeProto) -> None:
    """An EPContext node may name a file with a compiled model; it must lie beside the model."""
    values = {attribute.name: attribute for attribute in node.attribute}
    if "embed_mode" in values and values["embed_mode"].i == 0 and "ep_cache_context" in values:
        location = values["ep_cache_context"].s.decode("utf-8", "replace")
        reason = unsafe_location(location)
        if reason is not None:
            raise ModelError(f"{label(node)} loads the file {location[:200]!r}: {reason}; it is not followed")


def _refuse_missing(missing: Mapping[str, str], where: str) -> None:
    for name, user in missing.items():
        raise ModelError(f"{user}{where} reads {name!r}, which nothing defines; the model is incomplete")
