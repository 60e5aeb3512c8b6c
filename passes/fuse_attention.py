"""fuse-attention: the core of attention as one operator of ONNX Runtime. Same function up to rounding.

Per head, with q, k and v split from [batch, length, heads * size] to [batch, heads, length, size]:

    y = softmax(scale q k^T + mask) v

The dozen nodes that exporters write for it (Reshape and Transpose of each operand, two MatMul, scaling, mask, Softmax,
Transpose and Reshape back), and the biases added in front, become com.microsoft.MultiHeadAttention. The projections
keep their MatMul. The pass comes last: pruning and quantization know the single nodes. TensorRT does not know the
operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Model, Node, Variable, producer
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.site import Site

__all__ = ["FuseAttention"]

_DOMAIN = "com.microsoft"
_SPLIT, _SPLIT_TRANSPOSED = [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make each attention core one MultiHeadAttention of ONNX Runtime."""

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = "float"
    after: ClassVar[tuple[str, ...]] = (
        "cleanup", "fold-constants", "fuse", "equalize", "prune-channels", "quantize",
    )  # fmt: skip

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        softmaxes = [(s, [n for n in s.nodes if n.kind == "Softmax"]) for s in model.graph.scopes()]
        if not any(found for _, found in softmaxes):
            return {}
        if ctx.target == "tensorrt":
            ctx.refuse("attention", "TensorRT does not know the operator MultiHeadAttention of ONNX Runtime")
            return {}
        shapes, fused = ctx.shapes(model), 0
        for scope, found in softmaxes:
            site, home = Site(model, scope, shapes, model.opset), set(scope.nodes)
            for softmax in found:
                core = _match(site, softmax, home)
                if core is not None and ctx.allow(f"attention around {softmax.label}"):
                    _rewrite(site, core)
                    fused += 1
        if fused:
            model.import_domain(_DOMAIN, 1)
            remove_dead(model, ctx)
        return {"attention": fused} if fused else {}


@dataclass
class _Core:
    """What was matched: the three operands [batch, length, heads * size], and the `nodes` that one will replace.

    Only nodes of `home`, those of the scope, can be replaced.
    """

    home: set[Node]
    heads: int = 0
    scale: float = 1.0
    mask: Any = None
    operands: list[Any] = field(default_factory=list)
    biases: list[npt.NDArray[Any] | None] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    output: Any = None
    nodes: list[Node] = field(default_factory=list)


def _match(site: Site, softmax: Node, home: set[Node]) -> _Core | None:
    if softmax.attrs.get("axis", -1 if site.opset >= 13 else 1) not in (-1, 3) or not softmax.plain:
        return None
    core = _Core(home, nodes=[softmax])
    value = _reader(site, core, softmax.outputs[0], "MatMul")
    if value is None or value.inputs[0] is not softmax.outputs[0]:
        return None
    scores = _scores(site, core, softmax.inputs[0])
    if scores is None:
        return None
    parts = ((scores.inputs[0], _SPLIT), (scores.inputs[1], _SPLIT_TRANSPOSED), (value.inputs[1], _SPLIT))
    sizes = [_operand(site, core, tensor, order) for tensor, order in parts]
    if None in sizes or len({s[0] for s in sizes if s}) != 1 or sizes[0] != sizes[1]:
        return None
    core.heads = sizes[0][0] if sizes[0] else 0
    if not _merges(site, core, value) or not core.scale:  # a scale of 0 stands for the default
        return None
    return core


def _only(site: Site, tensor: Any) -> bool:
    """Whether one node reads a value and nothing else uses it."""
    return len(tensor.outputs) == 1 and not any(o is tensor for o in site.scope.outputs)


def _reader(site: Site, core: _Core, tensor: Any, op: str) -> Node | None:
    """The only reader of a value, if it is a standard `op` of this scope."""
    return _taken(core, tensor.outputs[0], op) if _only(site, tensor) else None


def _source(site: Site, core: _Core, tensor: Any, op: str) -> Node | None:
    """The node that computes a value which only one node reads, if it is a standard `op` of this scope."""
    return _taken(core, producer(tensor), op) if _only(site, tensor) else None


def _taken(core: _Core, node: Node | None, op: str) -> Node | None:
    if node is None or node.kind != op or not node.plain or node not in core.home:
        return None
    core.nodes.append(node)
    return node


def _scores(site: Site, core: _Core, tensor: Any) -> Node | None:
    """The MatMul of queries and keys below scaling and mask."""
    added = _source(site, core, tensor, "Add")
    if added is not None:
        sides = [i for i in (0, 1) if (p := producer(added.inputs[i])) is not None and p.op in ("MatMul", "Mul", "Div")]
        side = next((i for i in sides if _fits(site, added.inputs[1 - i], added.inputs[i])), None)
        if side is None:
            return None
        tensor, core.mask = added.inputs[side], added.inputs[1 - side]
    return _source(site, core, _unscaled(site, core, tensor), "MatMul")


def _fits(site: Site, mask: Any, scores: Any) -> bool:
    """Whether a mask has the shape that the operator takes: it broadcasts over batch and heads only."""
    shape, whole = site.shapes[mask].shape, site.shapes[scores].shape
    if shape is None or whole is None or len(shape) != 4 or len(whole) != 4 or None in shape[2:]:
        return False
    outer = zip(shape[:2], whole[:2], strict=True)
    return shape[2:] == whole[2:] and all(d == 1 or (d is not None and d == w) for d, w in outer)


def _unscaled(site: Site, core: _Core, tensor: Any) -> Any:
    """What a value was before it was multiplied or divided by single numbers, which go into the scale."""
    while True:
        node = producer(tensor)
        if node is None or node not in core.home or node.kind not in ("Mul", "Div") or not _only(site, tensor):
            return tensor
        place = 0 if node.op == "Mul" and isinstance(node.inputs[0], Constant) else 1
        number = site.value(node, place)
        if number is None or number.size != 1 or number.ndim > 1 or (node.op == "Div" and not number.any()):
            return tensor
        factor = float(number.reshape(()))
        core.scale *= factor if node.op == "Mul" else 1 / factor
        core.nodes.append(node)
        tensor = node.inputs[1 - place]


def _operand(site: Site, core: _Core, tensor: Any, order: list[int]) -> tuple[int, int] | None:
    """Heads and their size, where a value is [batch, length, heads * size] split into heads and moved to `order`."""
    scaled = core.scale
    moved = _source(site, core, _unscaled(site, core, tensor), "Transpose")
    if len(core.operands) == 2 and core.scale != scaled:
        return None  # a scale of the values is none of the scores
    if moved is None or moved.attrs.get("perm") != order:
        return None
    split = _source(site, core, moved.inputs[0], "Reshape")
    if split is None:
        return None
    before, after = site.shapes[split.inputs[0]].shape, site.shapes[split.outputs[0]].shape
    if before is None or after is None or len(before) != 3 or len(after) != 4 or not _keeps(site, split):
        return None
    heads, size = after[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or before[2] != heads * size or not heads * size:
        return None
    source, bias = _without_bias(site, core, split.inputs[0], heads * size)
    core.operands.append(source)
    core.biases.append(bias)
    core.widths.append(heads * size)
    return heads, size


def _keeps(site: Site, reshape: Node) -> bool:
    """Whether a Reshape leaves the first two dimensions alone."""
    before, after = site.shapes[reshape.inputs[0]].shape, site.shapes[reshape.outputs[0]].shape
    target = site.integers(reshape, 1, "shape")
    if before is None or after is None:
        return False
    if target is not None and not (0 in target and reshape.attrs.get("allowzero", 0)):
        # One of the two may follow from the number of elements.
        kept = [t == 0 or (t > 0 and t == d) for t, d in zip(target[:2], before[:2], strict=True)]
        return all(kept) or (any(kept) and -1 in target[:2])
    return None not in before[:2] and before[:2] == after[:2]


def _without_bias(site: Site, core: _Core, tensor: Any, width: int) -> tuple[Any, npt.NDArray[Any] | None]:
    """An operand without the bias that is added to it, and the bias [width]."""
    node = producer(tensor)
    if node is None or node not in core.home or node.kind != "Add" or not _only(site, tensor):
        return tensor, None
    for place in (0, 1):
        bias, rest = site.value(node, place), node.inputs[1 - place]
        if bias is not None and bias.shape == (width,) and site.shapes[rest].shape == site.shapes[tensor].shape:
            core.nodes.append(node)
            return rest, bias
    return tensor, None


def _merges(site: Site, core: _Core, value: Node) -> bool:
    """Whether the heads are put together again behind the second MatMul."""
    moved = _reader(site, core, value.outputs[0], "Transpose")
    merged = _reader(site, core, moved.outputs[0], "Reshape") if moved is not None else None
    if moved is None or merged is None or moved.attrs.get("perm") != _SPLIT:
        return False
    core.output = merged.outputs[0]
    after, queries = site.shapes[core.output].shape, site.shapes[core.operands[0]].shape
    if after is None or queries is None or len(after) != 3:
        return False
    return (None not in after[:2] and after[:2] == queries[:2]) or _keeps(site, merged)


def _rewrite(site: Site, core: _Core) -> None:
    inputs = list(core.operands)
    if any(b is not None for b in core.biases):
        dtype = next(b.dtype for b in core.biases if b is not None)
        parts = [np.zeros(w, dtype) if b is None else b for b, w in zip(core.biases, core.widths, strict=True)]
        inputs.append(site.model.constant(site.scope, f"{core.output.name}_bias", np.concatenate(parts)))
    if core.mask is not None:
        inputs += [Variable("") for _ in range(5 - len(inputs))]
        inputs.append(core.mask)
    merged = core.output.inputs[0]
    merged.outputs.clear()
    attrs = {"num_heads": core.heads, "scale": core.scale}
    site.scope.add("MultiHeadAttention", inputs, [core.output], domain=_DOMAIN, attrs=attrs)
    site.scope.remove(core.nodes)
