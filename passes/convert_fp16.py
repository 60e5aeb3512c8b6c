"""convert-fp16: half precision where it is safe, float32 where it is not.

Half of the bytes, and the tensor cores of a GPU. Which nodes stay in float32 follows from the operators, from the
weights, and with calibration data from the ranges of all values (fp16_rules.py); then the result is judged on samples
that were held out, with every value rounded as a GPU does it, and where it breaks the budget, the run of nodes whose
return to float32 helps most goes back, again and again. Without data only the rules decide. ONNX Runtime's CPU provider
has few float16 kernels and converts around the others: it runs the model, but no faster, and more exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from onnxcomp import io
from onnxcomp.calibration.runner import collect
from onnxcomp.calibration.split import limited, parts
from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, Model, Node, sort
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.fp16_rewrite import rounded_to_half, to_half
from onnxcomp.passes.fp16_rules import Refused, refused_by_ranges, refused_by_rules, spread
from onnxcomp.passes.judge import Judge
from onnxcomp.probe import probe
from onnxcomp.shapes import Shapes, infer

__all__ = ["ConvertFp16"]

_SAMPLES = 256  # for the ranges
_MARGIN = 0.7  # of the budget: a few held-out samples do not tell all
_RUNS, _ROUNDS = 6, 4
_FLOAT = onnx.TensorProto.FLOAT

Place = tuple[int, int]  # number of the scope and of the node in it: the same in every copy of a model


@dataclass(frozen=True)
class ConvertFp16(Pass):
    """Mixed precision; inputs and outputs stay float32. `keep` are operators, `skip` names of nodes that stay in
    float32 whatever their values.
    """

    name: ClassVar[str] = "convert-fp16"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse", "equalize", "prune-channels", "quantize")

    keep: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        mark = len(ctx.rewrites)
        chosen, candidates = self._choose(model, ctx)
        details: dict[str, Any] = {}
        if chosen and ctx.data is not None:
            score, chosen = _within_budget(model, chosen, ctx)
            details["sqnr_db"] = round(score, 2)
        chosen = _loadable(model, chosen, ctx)
        if not chosen:
            ctx.withdraw(mark)
            return {"float16": 0}
        model.become(_converted(model, chosen))
        return {"float16": len(chosen), "float32": candidates - len(chosen), **details}

    def _choose(self, model: Model, ctx: Context) -> tuple[list[Place], int]:
        """Nodes to convert, in order, and how many compute on float32 in all."""
        shapes = infer(model)
        chosen: list[Place] = []
        candidates = 0
        seen = _ranges(model, shapes, ctx)
        for number, scope in enumerate(model.graph.scopes()):
            refused: Refused = {n: "it was named" for n in scope.nodes if n.op in self.keep or n.label in self.skip}
            refused |= refused_by_rules(model, scope, shapes, model.opset)
            if scope is model.graph:
                refused = refused_by_ranges(scope, seen) | refused
            refused = spread(scope, refused, shapes)
            for position, node in enumerate(scope.nodes):
                if not _computes(node, shapes):
                    continue
                candidates += 1
                if node in refused:
                    ctx.refuse(node.label, refused[node])
                elif ctx.allow(f"{node.label} to float16"):
                    chosen.append((number, position))
        return chosen, candidates


def _computes(node: Node, shapes: Shapes) -> bool:
    """Whether a node computes a float32 value from others."""
    return node.op not in ("Constant", "Cast") and any(o.name and shapes[o].elem == _FLOAT for o in node.outputs)


def _ranges(model: Model, shapes: Shapes, ctx: Context) -> Mapping[str, Any]:
    if ctx.data is None:
        return {}
    names = [o.name for n in model.graph.nodes for o in n.outputs if o.name and shapes[o].elem == _FLOAT]
    names += [t.name for t in model.graph.inputs if shapes[t].elem == _FLOAT]
    return collect(
        model, limited(ctx.data, _SAMPLES), dict.fromkeys(names),
        threads=ctx.threads, memory=ctx.memory, progress=ctx.progress,
    )  # fmt: skip


def _converted(model: Model, chosen: list[Place], *, simulated: bool = False) -> Model:
    """A copy with the chosen nodes in float16, or `simulated`: see `rounded_to_half`."""
    copy = model.copy()
    shapes, scopes = infer(copy), list(copy.graph.scopes())
    constants: dict[Any, Constant] = {}
    for number, scope in enumerate(scopes):
        nodes = [scope.nodes[position] for place, position in chosen if place == number]
        if simulated:
            rounded_to_half(copy, scope, nodes, shapes, copy.opset)
        else:
            to_half(copy, scope, nodes, shapes, copy.opset, constants)
    sort(copy)
    remove_dead(copy, Context())
    return copy


def _loadable(model: Model, chosen: list[Place], ctx: Context) -> list[Place]:
    """`chosen`, or without its Transposes or its products where ONNX Runtime would not load the result on a CPU.

    Version 1.31 crashes on some Transpose -> float16 MatMul (its issue 28392), so that is tried in a child process.
    """
    scopes = list(model.graph.scopes())
    for left_out in ((), ("Transpose",), ("Transpose", "MatMul", "Gemm")):
        rest = [(s, n) for s, n in chosen if scopes[s].nodes[n].op not in left_out]
        if not rest or _loads(_converted(model, rest)):
            for op in left_out:
                ctx.refuse(op, "ONNX Runtime's CPU provider does not load its float16 form in this model")
            return rest
    ctx.refuse("model", "ONNX Runtime's CPU provider does not load its float16 form")
    return []


def _loads(model: Model) -> bool:
    with tempfile.TemporaryDirectory(prefix="onnxcomp-fp16-") as folder:
        path = Path(folder) / "half.onnx"
        io.save(model, path)
        try:
            probe(path)
        except ModelError:
            return False
    return True


def _within_budget(model: Model, chosen: list[Place], ctx: Context) -> tuple[float, list[Place]]:
    """The score, and the nodes that are left when enough runs of them went back to float32."""
    _, held = parts(ctx.data)
    judge = Judge(model, held, threads=ctx.threads)
    allowed = ctx.max_drop * _MARGIN
    score, drop = judge.score(_converted(model, chosen, simulated=True))
    for number in range(_ROUNDS):
        if drop <= allowed or not chosen:
            break
        tried = []
        for run in np.array_split(np.arange(len(chosen)), min(_RUNS, len(chosen))):
            ctx.progress(number / _ROUNDS, "looking for layers to keep in float32")
            rest = [c for i, c in enumerate(chosen) if i < run[0] or i > run[-1]]
            tried.append((*judge.score(_converted(model, rest, simulated=True)), rest))
        score, drop, chosen = min(tried, key=lambda t: (max(t[1], allowed), -t[0]))
    return score, chosen
