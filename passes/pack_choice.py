"""Which encoding each tensor gets: the least bytes in the file, names, nodes and functions included.

Every form that is used costs its decoder once, however many tensors use it: a facility location problem. It is solved
by local search (add or drop the form that saves most), from no form at all and from the best form of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcomp.graph import Constant, Graph, Node
from onnxcomp.passes.codec import Form, Plan
from onnxcomp.passes.codec_functions import decoder
from onnxcomp.storage import DOMAIN, OPSET, VERSION

Array = npt.NDArray[Any]
__all__ = ["Site", "choose", "estimated_bytes", "plain_bytes", "stored_bytes"]


@dataclass(frozen=True)
class Site:
    """A tensor, where it is, and the plans that would make it smaller, each with its bytes in the file.

    `node` is the Constant node that holds it, None for an initializer.
    """

    scope: Graph
    constant: Constant
    node: Node | None
    number: int
    plans: tuple[tuple[Plan, int], ...]

    @property
    def bytes(self) -> int:
        return plain_bytes(self.constant)


def choose(sites: Sequence[Site], there: Iterable[Form] = ()) -> list[tuple[Site, Plan, int]]:
    """The plan of each tensor that is packed, with its bytes; `there` are forms whose decoders the model has."""
    free = frozenset(there)
    forms = sorted({p.form for s in sites for p, _ in s.plans}, key=lambda form: form.name)
    costs = np.asarray([0 if form in free else _decoder_bytes(form) for form in forms], np.int64)
    sizes = np.empty((len(sites), len(forms)), np.int64)
    for row, site in enumerate(sites):
        best = dict.fromkeys(forms, site.bytes)
        best.update((plan.form, size) for plan, size in sorted(site.plans, key=lambda p: -p[1]))
        sizes[row] = [best[form] for form in forms]
    plain = np.asarray([site.bytes for site in sites], np.int64)
    starts = (np.zeros(len(forms), bool), np.isin(np.arange(len(forms)), sizes.argmin(axis=1)) if forms else None)
    ends = [_search(sizes, plain, costs, start) for start in starts if start is not None]
    if not ends or min(ends)[0] + (0 if free else _import_bytes()) >= plain.sum():
        return []
    used = {form for form, there_is in zip(forms, min(ends)[1], strict=True) if there_is}
    found = []
    for site in sites:
        plan, size = min((p for p in site.plans if p[0].form in used), key=lambda p: p[1], default=(None, site.bytes))
        if plan is not None and size < site.bytes:
            found.append((site, plan, size))
    return found


def _search(sizes: Array, plain: Array, costs: Array, start: Array) -> tuple[int, list[bool]]:
    """Add or drop the form that saves most, until none does. Bytes in all, and which forms are used.

    `sizes` [tensors, forms], `plain` [tensors] and `costs` [forms] are bytes.
    """
    used = start.copy()

    def total(chosen: Array) -> int:
        columns = sizes[:, chosen]
        best = np.minimum(plain, columns.min(axis=1)) if columns.size else plain
        return int(best.sum() + costs[chosen].sum())

    least = total(used)
    while True:
        moves = []
        for form in range(len(costs)):
            used[form] = not used[form]
            moves.append((total(used), form))
            used[form] = not used[form]
        found, form = min(moves, default=(least, 0))
        if found >= least:
            return least, used.tolist()
        least, used[form] = found, not used[form]


def stored_bytes(constant: Constant, plan: Plan, number: int) -> int:
    """Bytes in the file of a tensor that is packed: its streams and the call of the decoder."""
    names = [f"{letter}{number}" for letter in plan.shapes]
    attributes: dict[str, Any] = {"shape": constant.shape}
    if "count" in plan.form.attributes:
        attributes["count"] = [constant.weight.size]
    if plan.groups is not None:
        attributes["groups"] = plan.groups
    node = helper.make_node(plan.form.name, names, [constant.name], domain=DOMAIN, **attributes)
    size = _entry(node.ByteSize())
    kinds = dict.fromkeys(plan.shapes, onnx.TensorProto.UINT8) | {"t": constant.weight.data_type}
    for (letter, shape), name in zip(plan.shapes.items(), names, strict=True):
        size += _tensor_bytes(name, kinds[letter], shape, _elements(shape))
    return size + (constant.weight.nbytes // constant.weight.size - 1) * _elements(plan.shapes["t"])


def estimated_bytes(count: int, used: int, bits: int) -> int:
    """About what the places of `used` elements that are not zero among `count` take, and `bits` for each of these.

    Places take a bit per element, or as Rice codes about 5 % more than their entropy. For plans and accounts, before
    there are values to encode; codebooks and names come on top.
    """
    p = used / max(count, 1)
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    places = count * min(1.0, 1.05 * entropy)
    return math.ceil((places + used * bits) / 8)


def plain_bytes(constant: Constant) -> int:
    """Bytes in the file of a plain initializer."""
    weight = constant.weight
    return _tensor_bytes(constant.name, weight.data_type, weight.shape, weight.nbytes)


def _tensor_bytes(name: str, kind: int, shape: Sequence[int], payload: int) -> int:
    return _entry(onnx.TensorProto(name=name, data_type=kind, dims=shape).ByteSize() + _entry(payload))


def _entry(size: int) -> int:
    """Bytes of a field with `size` bytes in it: its tag, its length, and these."""
    return 1 + (max(size, 1).bit_length() + 6) // 7 + size


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def _decoder_bytes(form: Form) -> int:
    return 1 + _entry(decoder(form, OPSET).ByteSize())


def _import_bytes() -> int:
    return _entry(onnx.OperatorSetIdProto(domain=DOMAIN, version=VERSION).ByteSize())
