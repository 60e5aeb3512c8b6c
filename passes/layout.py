"""What an execution provider wants an int8 model to look like. One calibration serves all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxcomp.passes.placement import Placement, place
from onnxcomp.passes.placement_tensorrt import place_for_tensorrt

__all__ = ["CPU", "LAYOUTS", "Layout"]


@dataclass(frozen=True)
class Layout:
    """`place` chooses what becomes 8-bit. With `signed`, activations are symmetric s8 with zero point 0, else u8 with
    any zero point; with `float_bias`, biases stay float32, else they are int32 of scale s_x s_w[c].
    """

    place: Callable[..., Placement]
    signed: bool
    float_bias: bool


CPU = Layout(place, signed=False, float_bias=False)
# An integer bias and any zero point but 0 are refused by TensorRT's parser.
TENSORRT = Layout(place_for_tensorrt, signed=True, float_bias=True)
LAYOUTS = {"cpu": CPU, "tensorrt": TENSORRT}
