"""pack: store weights as sparse bitmaps, low-bit codes and codebooks. Exact; the file gets smaller, nothing else.

Each initializer that gets smaller is stored as packed initializers and one node, a call of a local function of domain
`onnxcomp.storage`, that makes the tensor of them (codec.py has the encodings, codec_functions.py the functions). ONNX
Runtime inlines and folds it when it loads the model, so that the same kernels run on the same constants. That is
proven for every tensor: the decoder has to give the tensor bit for bit, and nothing of it may be left in the model that
ONNX Runtime has loaded. Otherwise the tensor goes back, with the reason.

Tensors are encoded one at a time. `unpack` gives the plain model back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onnx import TensorProto

from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, Graph, Model, Node, Variable, sort
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.codec import MAX_ELEMENTS, MAX_RANKED, Form, Plan
from onnxcomp.passes.codec_plans import plans
from onnxcomp.passes.pack_choice import Site, choose, plain_bytes, stored_bytes
from onnxcomp.passes.pack_nodes import (
    add_decoders,
    forms,
    plain_proto,
    restore,
    store,
    store_node,
    store_rows,
    swap,
)
from onnxcomp.passes.pack_proof import inexact, unfolded
from onnxcomp.passes.pack_versions import drop_original, raise_versions, restore_versions
from onnxcomp.storage import DOMAIN

__all__ = ["Pack"]

# Element types of which ONNX Runtime's Gather makes tensors.
_TYPES = frozenset(
    getattr(TensorProto, name)
    for name in "FLOAT FLOAT16 DOUBLE BFLOAT16 INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 BOOL".split()
)
_SMALLEST = 64  # bytes of a tensor; the node alone takes more
_ORIGINAL_SHARE = 0.05  # of the bytes that are saved, for what makes an upgrade reversible
_TABLE_BYTES = 1 << 20  # of a table that stays packed at run time; below, the memory saved is not worth slower look-ups


@dataclass(frozen=True)
class Pack(Pass):
    """Store weights in fewer bytes, to be decoded by ONNX Runtime when it loads the model.

    A model of an opset before 12 is raised to it. `reversible` keeps the nodes as they were, compressed, where that
    rewrites some, so that `unpack` gives back the file of the old opset and not one of opset 12.
    """

    name: ClassVar[str] = "pack"
    effect: ClassVar[Effect] = "exact"
    after: ClassVar[tuple[str, ...]] = (
        "cleanup", "fold-constants", "fuse", "equalize", "prune-channels", "prune-weights", "factorize",
        "share-weights", "quantize", "convert-fp16", "distill",
    )  # fmt: skip

    reversible: bool = True

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        draft = model.copy()
        there = forms(draft)
        try:
            notes = raise_versions(draft)
        except ModelError as error:
            ctx.refuse("model", f"the decoders need a newer opset: {error}")
            return {}
        sites = _sites(draft, ctx)
        chosen = [c for c in choose(sites, there.values()) if ctx.allow(f"{c[0].constant.name} as {c[1].form.name}")]
        if not chosen:
            return {}
        saved = sum(site.bytes - size for site, _, size in chosen)
        notes += drop_original(draft, budget=int(saved * _ORIGINAL_SHARE) if self.reversible else -1)
        lazy = sum(site.bytes for site, _, _ in chosen) > ctx.memory
        packed = _store(draft, chosen, ctx, lazy=lazy)
        kept = _proven(draft, packed, ctx, lazy=lazy)
        if not kept:
            return {}
        sort(draft)
        model.become(draft)
        return _account(kept, notes)


def _sites(model: Model, ctx: Context) -> list[Site]:
    """The constants that some encoding makes smaller."""
    outputs = model.outputs()
    pinned = {
        p.value
        for s in model.graph.scopes()
        for a in s.header.quantization_annotation
        for p in a.quant_parameter_tensor_names
    }
    items = list(_constants(model))
    ranks = sum(item.weight.size for _, item, _ in items if isinstance(item, Constant)) <= MAX_RANKED
    found: list[Site] = []
    for position, (scope, item, node) in enumerate(items):
        ctx.progress(0.5 * position / len(items), "trying encodings")
        if isinstance(item, Variable):
            if item.default is not None and item.default.nbytes >= _SMALLEST:
                ctx.refuse(item.name, "callers may override it, so ONNX Runtime does not fold what is made of it")
            continue
        value = item if node is None else node.outputs[0]
        used = value.outputs or value in outputs
        if item.weight.nbytes < _SMALLEST or not used or value.name in pinned:
            continue
        reason = _unfit(item, value in outputs, node)
        if reason is not None:
            ctx.refuse(value.name, reason)
            continue
        rows = node is None and _is_looked_up(scope, item)
        if item.weight.size > MAX_ELEMENTS and not rows:
            ctx.refuse(value.name, f"ONNX Runtime does not fold decoders of more than {MAX_ELEMENTS:,} elements")
            continue
        options = [(p, stored_bytes(item, p, len(found))) for p in plans(item.values, rows=rows, ranks=ranks)]
        options = [(plan, size) for plan, size in options if size < plain_bytes(item)]
        if options:
            found.append(Site(scope, item, node, len(found), tuple(options)))
    return found


def _is_looked_up(scope: Graph, constant: Constant) -> bool:
    """Whether a constant is a large table of which nodes of its own scope take rows, and nothing else."""
    plain = constant.proto is None or not (constant.proto.doc_string or constant.proto.metadata_props)
    return (
        plain
        and constant.weight.nbytes >= _TABLE_BYTES
        and all(
            n.kind == "Gather" and n.inputs[0] is constant and n.inputs[1] is not constant and not n.attrs.get("axis")
            for n in constant.outputs
        )
        and not set(constant.outputs) - set(scope.nodes)
    )


def _constants(model: Model) -> Iterator[tuple[Graph, Any, Node | None]]:
    """Initializers, and the tensors of Constant nodes with their nodes, that are no streams of packed ones."""
    streams = {t for n in model.nodes() if n.domain == DOMAIN for t in n.inputs}
    roots = [model.graph, *(f.body for f in model.functions if f.header.domain != DOMAIN)]
    for scope in (scope for root in roots for scope in root.scopes()):
        yield from ((scope, item, None) for item in scope.initializers if item not in streams)
        for node in scope.nodes:
            held = node.attrs.get("value") if node.kind == "Constant" else None
            if isinstance(held, Constant) and node.outputs[0] not in streams:
                yield scope, held, node


def _unfit(constant: Constant, is_output: bool, node: Node | None) -> str | None:
    """Why a constant cannot be packed, None if it can."""
    if is_output:
        return "it is an output of its graph"
    if constant.sparse is not None:
        return "it is a sparse tensor already"
    if constant.weight.data_type not in _TYPES:
        return f"ONNX Runtime has no Gather for elements of type {TensorProto.DataType.Name(constant.weight.data_type)}"
    remarks = constant.proto is not None and (constant.proto.doc_string or constant.proto.metadata_props)
    if plain_proto(constant.weight) is None or (node is not None and remarks):
        return "its message is written in an unusual way that could not be given back bit for bit"
    return None


@dataclass(frozen=True)
class _Packed:
    scope: Graph
    nodes: tuple[Node, ...]
    form: Form
    constant: Constant
    before: int
    after: int

    @property
    def name(self) -> str:
        first = self.nodes[0]
        return self.constant.name if self.form.rows else str(first.outputs[0].name)


def _store(model: Model, chosen: list[tuple[Site, Plan, int]], ctx: Context, *, lazy: bool) -> list[_Packed]:
    """Put the calls in, and take back those that the runtime decodes to something else."""
    add_decoders(model, {plan.form for _, plan, _ in chosen}, {site.scope for site, _, _ in chosen})
    packed: list[_Packed] = []
    wrong: dict[Node, str] = {}
    places: dict[Graph, dict[Any, list[Constant]]] = {}
    for position, (site, plan, size) in enumerate(chosen):
        ctx.progress(0.5 + 0.4 * position / len(chosen), f"packing {site.constant.name}")
        if plan.form.rows:
            nodes = list(site.constant.outputs)
            store_rows(model, site.constant, plan, site.number, lazy=lazy)
            places.setdefault(site.scope, {})[site.constant] = nodes[0].inputs[: len(plan.form.streams)]
        elif site.node is None:
            node = store(model, site.scope, site.constant, plan, site.number, lazy=lazy)
            places.setdefault(site.scope, {})[site.constant] = list(node.inputs)
            nodes = [node]
        else:
            nodes = [site.node]
            store_node(model, site.scope, site.node, plan, site.number, lazy=lazy)
        packed.append(_Packed(site.scope, tuple(nodes), plan.form, site.constant, site.bytes, size))
        reason = inexact(model, nodes[0], plan.form, site.constant.weight)
        if reason is not None:
            wrong[nodes[0]] = reason
    for scope, streams in places.items():
        swap(scope, streams)
    return _without(model, packed, wrong, ctx, lazy=lazy)


def _proven(model: Model, packed: list[_Packed], ctx: Context, *, lazy: bool) -> list[_Packed]:
    """Those that ONNX Runtime folds; the others go back, and decoders that nobody calls any more."""
    ctx.progress(0.9, "loading the packed model")
    sort(model)
    kept = _without(model, packed, unfolded(model, [p.nodes[0] for p in packed if not p.form.rows]), ctx, lazy=lazy)
    used = {n.op for n in model.nodes() if n.domain == DOMAIN}
    model.functions = [f for f in model.functions if f.header.domain != DOMAIN or f.header.name in used]
    if not used:
        restore_versions(model)
    return kept


def _without(
    model: Model, packed: list[_Packed], failed: Mapping[Node, str], ctx: Context, *, lazy: bool
) -> list[_Packed]:
    """Take some tensors back, with the reason."""
    back = [p for p in packed if p.nodes[0] in failed]
    for one in back:
        ctx.refuse(one.name, failed[one.nodes[0]])
    for scope in {p.scope: None for p in back}:
        restore(model, scope, {n: p.form for p in back if p.scope is scope for n in p.nodes}, lazy=lazy)
    return [p for p in packed if p.nodes[0] not in failed]


def _account(kept: list[_Packed], notes: list[str]) -> dict[str, Any]:
    before, after = sum(p.before for p in kept), sum(p.after for p in kept)
    tensors = [
        {
            "name": p.name,
            "encoding": p.form.name,
            "bits per weight": round(8 * p.after / p.constant.weight.size, 3),
            "bytes before": p.before,
            "bytes": p.after,
        }
        for p in kept
    ]
    found: dict[str, Any] = {"packed": len(kept), "bytes before": before, "bytes": after, "tensors": tensors}
    if notes:
        found["notes"] = notes
    return found
