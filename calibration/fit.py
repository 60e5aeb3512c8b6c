"""How arrays fit a model's inputs: names, types, shapes and values, with errors that say what to change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.calibration.sources import Array, suggest
from onnxcomp.errors import DataError, UsageError
from onnxcomp.runtime import TensorSpec

__all__ = [
    "LABELS",
    "Interface",
    "check_dtype",
    "check_shape",
    "describe",
    "fit_values",
    "fixed_dim",
    "interface",
    "match_names",
]

LABELS = "labels"
_DEFAULT_BATCH = 16
# Names that say nothing about which input is meant; with one array and one input there is no doubt.
_GENERIC = frozenset({"arr_0", "x", "data", "input", "images"})


@dataclass(frozen=True)
class Interface:
    """The inputs of a model and how many samples go into one run.

    `common` is true if the first axis of every input can be a batch axis: all of them free, or all fixed at
    the same size, which is then `fixed`. `size` is the number of samples per run where samples lie along the
    first axis.
    """

    inputs: tuple[TensorSpec, ...]
    common: bool
    fixed: int | None
    size: int

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.inputs]


def interface(inputs: Sequence[TensorSpec], batch: int | None) -> Interface:
    """Derive the batch axis from the shapes of the inputs. `batch` is for models that leave the size free.

    Raises DataError if an input is of a type that numpy cannot hold, UsageError if `batch` is not positive.
    """
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UsageError(f"the batch size must be a positive whole number, not {batch!r}")
    if not inputs:
        raise DataError("the model has no inputs that data could feed")
    for spec in inputs:
        if spec.dtype is None:
            raise DataError(f"the model's input {spec.name!r} is a {spec.kind}, which data sets cannot hold")
    leading = {fixed_dim(spec, 0) for spec in inputs}
    common = len(leading) == 1 and all(spec.shape is None or spec.shape for spec in inputs)
    fixed = leading.pop() if common else None
    return Interface(tuple(inputs), common, fixed, fixed or batch or _DEFAULT_BATCH)


def match_names(found: Collection[str], inputs: Sequence[TensorSpec], where: str) -> dict[str, str]:
    """Input name -> array name. `labels` is left out unless the model has such an input.

    Raises DataError for an array that is no input, or an input without an array.
    """
    known = [spec.name for spec in inputs]
    arrays = [name for name in found if name in known or name != LABELS]
    if len(arrays) == len(known) == 1 and (arrays[0] in _GENERIC or arrays[0] == known[0]):
        return {known[0]: arrays[0]}
    expected = f"the model's inputs are {', '.join(describe(spec) for spec in inputs)}"
    unknown = [name for name in arrays if name not in known]
    if unknown:
        advice = suggest(unknown[0], known) or (f" (rename it to {known[0]!r}?)" if len(known) == 1 else "")
        raise DataError(f"{where}: array {unknown[0]!r} is not an input of the model{advice}; {expected}")
    missing = [name for name in known if name not in arrays]
    if missing:
        held = f"only {', '.join(map(repr, arrays))}" if arrays else "nor for any other"
        raise DataError(
            f"{where}: there is no array for the model's input {missing[0]!r}, {held}; {expected}"
        )
    return {name: name for name in known}


def check_dtype(spec: TensorSpec, dtype: np.dtype[Any], where: str) -> None:
    """Accept the input's own type, floats for floats and integers for integers (`fit_values` checks ranges).

    Raises DataError otherwise: a silent change from 0-255 pixels to floats would calibrate on the wrong
    scale.
    """
    expected = spec.dtype
    if expected is None or expected == dtype:
        return
    if (expected.kind == "f" and dtype.kind == "f") or (expected.kind in "iu" and dtype.kind in "iu"):
        return
    if expected.kind == "O" and dtype.kind == "U":
        return
    hint = f"convert with .astype(np.{expected})"
    if dtype == np.uint8 and expected.kind == "f":
        hint = "scale raw pixels as in training, or give the folder of images with a preprocessing spec"
    elif dtype.kind in "OV":
        hint = "give a plain numeric array"
    raise DataError(f"{where}: input {spec.name!r} is {dtype}, but the model takes {expected}; {hint}")


def check_shape(spec: TensorSpec, shape: tuple[int, ...], where: str, *, free_first: bool = False) -> None:
    """Compare the shape of one feed with the input's fixed dimensions, without the first if `free_first`.

    Raises DataError, with a hint if the axes look swapped between NCHW and NHWC.
    """
    if spec.shape is None or _fits(spec, shape, free_first):
        return
    hint = ""
    if len(shape) == len(spec.shape) >= 3:
        order = list(range(len(shape)))
        to_first, to_last = [0, order[-1], *order[1:-1]], [0, *order[2:], 1]
        for axes, found, wanted in ((to_first, "NHWC", "NCHW"), (to_last, "NCHW", "NHWC")):
            if not hint and _fits(spec, tuple(shape[a] for a in axes), free_first):
                hint = f"; the data look {found} and the model takes {wanted}: array.transpose{tuple(axes)}"
    raise DataError(
        f"{where}: input {spec.name!r} has shape {_text(shape)}, but the model takes "
        f"{_text(spec.shape)}{hint}"
    )


def fit_values(spec: TensorSpec, array: Array, where: str, first: int | None) -> Array:
    """`array` in the input's type and C order, without a copy where it is so already.

    `first` is the number of the array's first row in its file, None if it has no rows to speak of. Raises
    DataError for NaN and infinity, and for values that the input's type cannot hold.
    """
    expected = spec.dtype
    if array.dtype.kind == "f":
        _reject(~np.isfinite(array), array, f"{where}: input {spec.name!r}", "is not a finite number", first)
    elif expected is not None and expected.kind in "iu" and not np.can_cast(array.dtype, expected):
        low, high = np.iinfo(expected).min, np.iinfo(expected).max
        _reject(
            (array < low) | (array > high),
            array,
            f"{where}: input {spec.name!r}",
            f"does not fit {expected}",
            first,
        )
    with np.errstate(over="ignore"):
        result = np.asarray(array, dtype=expected, order="C")
    if result.dtype.kind == "f" and result.dtype.itemsize < array.dtype.itemsize:
        _reject(~np.isfinite(result), array, f"{where}: input {spec.name!r}", f"is beyond {expected}", first)
    return result


def describe(spec: TensorSpec) -> str:
    """Name, type and shape of an input as error messages show them: 'x' float32 [N, 3, 32, 32]."""
    shape = "of any rank" if spec.shape is None else _text(spec.shape)
    return f"{spec.name!r} {spec.kind if spec.dtype is None else spec.dtype} {shape}"


def _reject(bad: Array, values: Array, what: str, problem: str, first: int | None) -> None:
    if not bad.any():
        return
    at = np.unravel_index(int(np.argmax(bad)), bad.shape)
    row = "" if first is None or not at else f" in row {first + int(at[0])}"
    raise DataError(f"{what} holds {values[at]}{row}, which {problem}")


def _fits(spec: TensorSpec, shape: tuple[int, ...], free_first: bool) -> bool:
    if spec.shape is None:
        return True
    start = 1 if free_first else 0
    wanted = [fixed_dim(spec, axis) for axis in range(len(spec.shape))]
    return len(shape) == len(wanted) and all(
        w is None or w == s for w, s in zip(wanted[start:], shape[start:], strict=True)
    )


def fixed_dim(spec: TensorSpec, axis: int) -> int | None:
    """The size of an axis if the model fixes it, else None. Old exporters write 0 or -1 for a free size."""
    if not spec.shape or axis >= len(spec.shape):
        return None
    dim = spec.shape[axis]
    return dim if isinstance(dim, int) and dim > 0 else None


def _text(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
