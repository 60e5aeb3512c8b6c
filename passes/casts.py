"""Which element types hold every value of which others."""

from __future__ import annotations

from onnx import TensorProto

__all__ = ["holds_all"]

_T = TensorProto
_BITS: dict[int, int] = {
    _T.BOOL: 1, _T.UINT8: 8, _T.INT8: 8, _T.UINT16: 16, _T.INT16: 16, _T.UINT32: 32, _T.INT32: 32, _T.INT64: 64,
}  # fmt: skip
_UNSIGNED = (_T.BOOL, _T.UINT8, _T.UINT16, _T.UINT32)
_EXACT_BITS: dict[int, int] = {_T.FLOAT16: 11, _T.BFLOAT16: 8, _T.FLOAT: 24, _T.DOUBLE: 53}
_WIDER: dict[int, tuple[int, ...]] = {
    _T.FLOAT16: (_T.FLOAT, _T.DOUBLE),
    _T.BFLOAT16: (_T.FLOAT, _T.DOUBLE),
    _T.FLOAT: (_T.DOUBLE,),
}


def holds_all(source: int, middle: int, target: int) -> bool:
    """Whether source -> middle -> target is source -> target for every value.

    What a float out of range gives as an integer is not defined, so a way through floats must not end in integers that
    lack values of the source.
    """
    if source in _EXACT_BITS:
        return middle in _WIDER.get(source, ()) and (target in _EXACT_BITS or target == _T.BOOL)
    if source not in _BITS:
        return False
    bits = _BITS[source] - (0 if source in _UNSIGNED else 1)
    if middle in _EXACT_BITS:
        fits = bits <= _EXACT_BITS[middle] and middle != _T.FLOAT16 and middle != _T.BFLOAT16
        return fits and (target in _EXACT_BITS or _integer_holds(source, target))
    return middle != _T.BOOL and _integer_holds(source, middle) and (target in _EXACT_BITS or target in _BITS)


def _integer_holds(source: int, target: int) -> bool:
    if target not in _BITS:
        return False
    bits = _BITS[source] - (0 if source in _UNSIGNED else 1)
    return bits <= _BITS[target] - (0 if target in _UNSIGNED else 1) and (
        source in _UNSIGNED or target not in _UNSIGNED
    )
