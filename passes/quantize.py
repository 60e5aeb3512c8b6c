"""quantize: 8-bit arithmetic with calibration data, in the layout that the target's kernels ask for, or fewer bits for
the weights alone.

Weights are s8 per output channel. For ONNX Runtime's CPU provider activations are u8 with zero point and biases int32
with scale s_x s_w[c]; for TensorRT activations are s8 with zero point 0 and biases float. The CUDA provider has no
8-bit kernels: there `convert-fp16` is what helps. How the best model is found: quantize_search.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxcomp.calibration.gram import Gram
from onnxcomp.calibration.split import limited, parts
from onnxcomp.errors import UsageError
from onnxcomp.graph import Constant, Model
from onnxcomp.linear import LINEAR_OPS
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.opset import upgrade
from onnxcomp.passes import dynamic, weight_blocks
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.fp16_rewrite import widened
from onnxcomp.passes.input_moments import input_moments
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.layout import CPU, LAYOUTS
from onnxcomp.passes.moments import observe_inputs
from onnxcomp.passes.placement import place
from onnxcomp.passes.quantize_search import Search
from onnxcomp.passes.weight_only import compress_weights
from onnxcomp.shapes import infer

__all__ = ["Quantize"]

_MIN_OPSET = 13  # DequantizeLinear with a scale per channel
_SAMPLES = 128  # for the second moments that weights alone are rounded by


@dataclass(frozen=True)
class Quantize(Pass):
    """Static int8 quantization; with `mode` "weights" storage of the weights in 8 bits under float arithmetic (with
    `weight_bits` 4 matrices in 4-bit blocks, multiplied as they are); with "dynamic" int8 products and LSTMs whose
    activations are quantized in every run.

    `ranges` chooses activation ranges (auto tries mse, minmax and percentile on held-out samples, and makes those wider
    that cut off what the outputs need), where a common scale for values that meet in a sum may take over, as it saves
    the rounding of the sum; `rounding` is second-order or
    nearest; `rescale`, `finer_inputs` (first layers that read their input on two grids), `bias_correction` and
    `islands` switch these steps; `island_cost` is the share of the multiplications that may stay in float, or be made
    twice, for accuracy; `latency` times groups of layers on this machine and
    leaves those in float that are not faster in 8 bits, or whose time is worth the accuracy (the default pipeline for
    the CPU does); `weight_bits` is 7 where processors without int8 dot products would saturate (auto: if this one is
    such); `ops` are the operators to quantize, `skip` names nodes that stay in float.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = (
        *("cleanup", "fold-constants", "fuse", "factorize", "equalize"),
        *("prune-channels", "prune-weights"),
    )

    mode: Literal["static", "weights", "dynamic"] = "static"
    ranges: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "auto"
    rounding: Literal["second-order", "nearest"] = "second-order"
    rescale: bool = True
    finer_inputs: bool = True
    bias_correction: bool = True
    islands: bool = True
    island_cost: float = 0.02
    latency: bool = False
    weight_bits: Literal["auto", "8", "7", "4"] = "auto"
    ops: tuple[str, ...] = LINEAR_OPS
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.island_cost <= 1:
            raise UsageError("option 'island_cost' of pass 'quantize' must be a share from 0 to 1")

    @property
    def needs_data(self) -> bool:
        return self.mode == "static"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if self.weight_bits == "4" and self.mode != "weights":
            raise UsageError("pass 'quantize': weight-bits=4 needs mode=weights; arithmetic on 4 bits does not exist")
        if self.mode == "weights":
            return self._weights(model, ctx)
        if self.mode == "dynamic":
            upgrade(model, dynamic.MIN_OPSET)
            moments = {} if self.rounding == "nearest" else input_moments(model, ctx, ("Gemm", "MatMul", "LSTM"))
            count = dynamic.quantize_dynamically(model, ctx.allow, moments)
            remove_dead(model, Context())
            return {"mode": "dynamic", "quantized": count}
        if ctx.data is None:
            raise UsageError("pass 'quantize' needs calibration data; give them with --calib")
        layout = LAYOUTS.get(ctx.target)
        if layout is None:
            ctx.refuse(ctx.target, "its execution provider has no 8-bit kernels; the pass convert-fp16 speeds it up")
            return {"quantized": 0}
        original = model
        if layout is CPU and _has_half(model):
            model = widened(model)  # the CPU provider computes float16 in float32 anyway, with conversions
        plan = layout.place(model, model.graph, infer(model), ctx, keep_float=self.skip, ops=self.ops)
        skip, mark = set(self.skip), len(ctx.rewrites)
        skip |= {u.key for u in plan.units if u.view is not None and not ctx.allow(f"{u.label} to int8")}
        if not any(u.view is not None and u.key not in skip for u in plan.units):
            return {"quantized": 0}
        upgrade(model, _MIN_OPSET)
        fit, held = parts(ctx.data)
        judge = Judge(model, held, threads=ctx.threads)
        search = Search(model, ctx, self, judge, fit, layout, held_out=held is not fit)
        best = search.run(frozenset(skip))
        if not any(u.view is not None for u in best.units):
            ctx.withdraw(mark)
            return {"quantized": 0, "reason": "8 bits cost more than the budget allows in every part of the model"}
        original.become(best.model)
        return search.account(best)

    def _weights(self, model: Model, ctx: Context) -> dict[str, Any]:
        """Store weights in few bits; with data, rounded so that the outputs stay close."""
        details: dict[str, Any] = {"mode": "weights"}
        if self.weight_bits == "4":
            upgrade(model, weight_blocks.MIN_OPSET)
        grams = self._grams(model, ctx)
        if self.weight_bits == "4":
            details["stored_as_int4"] = weight_blocks.compress_blocks(model, ctx.allow, grams)
            remove_dead(model, Context())
        states = {} if self.rounding == "nearest" else input_moments(model, ctx, ("LSTM", "GRU", "RNN"))
        details["stored_as_int8"] = compress_weights(model, ctx.allow, grams, states)
        return details

    def _grams(self, model: Model, ctx: Context) -> dict[str, Gram]:
        if ctx.data is None or self.rounding == "nearest":
            return {}
        plan = place(model, model.graph, infer(model), Context(), keep_float=self.skip, ops=self.ops)
        return observe_inputs(
            model, plan, limited(ctx.data, _SAMPLES), grams=True,
            threads=ctx.threads, memory=ctx.memory, seed=ctx.seed, progress=ctx.progress,
        ).grams  # fmt: skip


def _has_half(model: Model) -> bool:
    constants = (i for s in model.graph.scopes() for i in s.initializers if isinstance(i, Constant))
    return any(c.dtype == np.float16 for c in constants)
