"""Inputs made from the graph alone, for models that come without data: seeded, in range, and proven to run.

Values follow what the graph says about them (hints.py); sizes of open dimensions are found by trying.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import InconclusiveError
from onnxcomp.hints import Hint, read_hints
from onnxcomp.runtime import Session, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["synthesize", "usable_inputs"]

Array = npt.NDArray[Any]

_SIZES = (64, 32, 128, 96, 224, 16, 256, 160, 8, 512, 1, 2, 320, 48)
_TRIES = 20
_BATCH_NAMES = frozenset({"batch", "batch_size", "none"})


def synthesize(
    inputs: Sequence[TensorSpec],
    proto: onnx.ModelProto | None,
    *,
    seed: int,
    count: int,
    sizes: Mapping[str, int] | None = None,
) -> list[dict[str, Array]]:
    """`count` feeds for a model's inputs; the same arguments give the same bits.

    Float inputs take turns between a normal, a uniform and a sparse distribution, in the range that a
    directly connected QuantizeLinear, BatchNormalization or ImageScaler tells. `sizes` gives symbolic
    dimensions by name and unnamed ones as "INPUT:AXIS"; what is missing is 1. Raises InconclusiveError for an
    input that numpy cannot hold.
    """
    hints = read_hints(proto, [spec.name for spec in inputs]) if proto is not None else {}
    known = sizes or {}
    feeds = []
    for index in range(count):
        feed = {}
        for spec in inputs:
            rng = np.random.default_rng([seed, index, zlib.crc32(spec.name.encode())])
            shape = tuple(_size(spec, axis, known) for axis in range(len(spec.shape or ())))
            feed[spec.name] = _values(spec, shape, hints.get(spec.name, Hint()), index, rng)
        feeds.append(feed)
    return feeds


def usable_inputs(
    session: Session, proto: onnx.ModelProto | None, *, seed: int = 0, count: int = 8
) -> list[dict[str, Array]]:
    """Feeds that the model runs on: sizes of the open dimensions are tried until it does.

    Batch dimensions (the open ones on axis 0, or named like a batch) are 1, then 2. Raises InconclusiveError
    with ONNX Runtime's last words when no size works.
    """
    last = "it has no inputs that can be filled"
    for sizes in _candidates(session.inputs):
        feeds = synthesize(session.inputs, proto, seed=seed, count=1, sizes=sizes)
        try:
            session.run(feeds[0])
        except Exception as error:  # ONNX Runtime's exception types share no base class
            last = " ".join(str(error).split())[-300:]
            continue
        return synthesize(session.inputs, proto, seed=seed, count=count, sizes=sizes)
    raise InconclusiveError(
        f"the model ran on none of the inputs that were made up for it, the last time because: {last}; "
        "give samples of real inputs with --eval or --calib"
    )


def _candidates(inputs: Sequence[TensorSpec]) -> Iterator[dict[str, int]]:
    """Sizes to try: all open dimensions alike, then a batch of two, then each one different."""
    batch: list[str] = []
    free: list[str] = []
    for spec in inputs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int):
                for name in _terms(spec, axis):
                    is_batch = (axis == 0 and len(spec.shape or ()) > 1) or name.lower() in _BATCH_NAMES
                    (batch if is_batch else free).append(name)
    batch, free = list(dict.fromkeys(batch)), list(dict.fromkeys(n for n in free if n not in batch))
    if not free:
        yield from (dict.fromkeys(batch, size) for size in ((1, 2, 4) if batch else (1,)))
        return
    for size in _SIZES:
        yield {**dict.fromkeys(batch, 1), **dict.fromkeys(free, size)}
    yield {**dict.fromkeys(batch, 2), **dict.fromkeys(free, _SIZES[0])}
    for shift in range(_TRIES - len(_SIZES) - 1):
        varied = {name: _SIZES[(shift + k) % len(_SIZES)] for k, name in enumerate(free)}
        yield {**dict.fromkeys(batch, 1), **varied}


def _terms(spec: TensorSpec, axis: int) -> list[str]:
    """Names of the sizes that an open dimension is made of: exporters write "past_length + length"."""
    dim = (spec.shape or ())[axis]
    if not isinstance(dim, str) or not dim:
        return [f"{spec.name}:{axis}"]
    return [term.strip() for term in dim.split("+") if not term.strip().isdigit()]


def _size(spec: TensorSpec, axis: int, sizes: Mapping[str, int]) -> int:
    dim = (spec.shape or ())[axis]
    if isinstance(dim, int):
        return dim
    if isinstance(dim, str) and dim:
        return sum(int(t) if t.strip().isdigit() else sizes.get(t.strip(), 1) for t in dim.split("+"))
    return sizes.get(f"{spec.name}:{axis}", 1)


def _values(
    spec: TensorSpec, shape: tuple[int, ...], hint: Hint, index: int, rng: np.random.Generator
) -> Array:
    dtype = spec.dtype
    if dtype is None:
        raise InconclusiveError(
            f"input {spec.name!r} is a {spec.kind}, for which no values can be made up; "
            "give samples of real inputs with --eval or --calib"
        )
    if dtype.kind == "f":
        return _floats(shape, hint, index, rng).astype(dtype)
    if dtype.kind == "O":
        return rng.choice(np.array(hint.words or ("text",), dtype=object), size=shape).reshape(shape)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return _integers(spec.name, dtype, shape, hint, rng).astype(dtype)


def _floats(
    shape: tuple[int, ...], hint: Hint, index: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    normal, uniform = rng.standard_normal(shape), rng.random(shape)
    sparse = np.where(rng.random(shape) < 0.1, normal, 0.0)
    if hint.mean is not None and hint.std is not None and len(shape) > 1 and shape[1] == len(hint.mean):
        per_channel = (1, -1) + (1,) * (len(shape) - 2)
        return hint.mean.reshape(per_channel) + hint.std.reshape(per_channel) * (normal, sparse)[index % 2]
    if hint.low is not None and hint.high is not None:
        centre, width = (hint.low + hint.high) / 2, hint.high - hint.low
        spread = np.clip(centre + normal * width / 6, hint.low, hint.high)
        return np.asarray((spread, hint.low + width * uniform)[index % 2])
    return np.asarray((normal, uniform, sparse)[index % 3])


def _integers(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], hint: Hint, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    if hint.fill is not None:
        return np.full(shape, hint.fill, dtype=np.int64)
    if hint.bound is not None:
        top = min(hint.bound, int(np.iinfo(dtype).max) + 1)
        return rng.integers(0, max(1, top), size=shape, dtype=np.int64)
    if "mask" in name.lower():
        # Masks are ones up to a length: a row of zeros alone makes NaN in most attention layers.
        length = shape[-1] if shape else 1
        ones = np.arange(length) < rng.integers(max(1, length // 2), length + 1)
        return np.broadcast_to(ones if shape else ones[0], shape).astype(np.int64)
    if hint.values is not None and hint.values.size:
        values = hint.values.astype(np.int64)
        several = values.size > 1 or not shape  # a lone scalar is compared to take a branch
        return rng.choice(values if several else np.append(values, [0, 1]), size=shape)
    if dtype == np.uint8:
        return rng.integers(0, 256, size=shape, dtype=np.int64)
    return np.asarray(rng.integers(0, 2, size=shape) if shape else 1, dtype=np.int64)
