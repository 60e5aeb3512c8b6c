"""Affine quantization: x ~ s (q - z), q = clip(round(x / s) + z, first, last).

Unsigned with b bits: first = 0, last = 2^b - 1, s = (hi - lo) / last, z = round(-lo / s), with lo <= 0 <= hi so that
zero is exact. Signed, symmetric: first = -2^(b-1), last = 2^(b-1) - 1, s = max(|lo|, |hi|) / last, z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["QuantParameters", "grid", "parameters"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantParameters:
    """Scale (positive float32 value), zero point, signedness and bits of a tensor."""

    scale: float
    zero_point: int
    signed: bool = False
    bits: int = 8

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The numpy type that holds the codes, one per element."""
        return np.int8 if self.signed else np.uint8

    @property
    def first(self) -> int:
        """The lowest code."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def last(self) -> int:
        """The highest code."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def low(self) -> float:
        return self.scale * (self.first - self.zero_point)

    @property
    def high(self) -> float:
        return self.scale * (self.last - self.zero_point)

    def apply(self, values: Array) -> Array:
        """Quantize and dequantize (float64)."""
        q = np.clip(np.rint(values / self.scale) + self.zero_point, self.first, self.last)
        return np.asarray(self.scale * (q - self.zero_point))


def parameters(low: float, high: float, *, signed: bool = False, bits: int = 8) -> QuantParameters:
    """Scale and zero point that cover low..high (extended to hold zero) with 2 to 8 bits."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale, zero_point = grid(np.array([low]), np.array([high]), signed, bits)
    return QuantParameters(float(scale[0]), int(zero_point[0]), signed, bits)


def grid(low: Array, high: Array, signed: bool, bits: int) -> tuple[Array, Array]:
    """Scales (float64 that are float32 values) and zero points of several ranges."""
    last = (1 << bits - 1) - 1 if signed else (1 << bits) - 1
    width = np.maximum(-low, high) if signed else high - low
    scale = (np.maximum(width, np.finfo(np.float32).tiny) / last).astype(np.float32).astype(np.float64)
    # The division can end below the smallest float32.
    scale = np.maximum(scale, float(np.finfo(np.float32).smallest_subnormal))
    zero_point = np.zeros_like(scale) if signed else np.clip(np.rint(-low / scale), 0, last)
    return scale, zero_point
