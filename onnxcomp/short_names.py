"""Short names for what only the model itself refers to: in small files names take a tenth of the bytes, or more."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

from onnxcomp.graph import Model

__all__ = ["shortened"]


def shortened(model: Model) -> Model:
    """A copy whose inner values are called a, b, c and so on, those that are used most first, and whose nodes have no
    name. Inputs and outputs of the model keep theirs, and so do the bodies of local functions.
    """
    copy = model.copy()
    kept = {t.name for t in (*copy.graph.inputs, *copy.graph.outputs)}
    uses: Counter[Any] = Counter()
    for scope in copy.graph.scopes():
        uses.update(t for t in scope.tensors_here() if t.name and t.name not in kept)
        for node in scope.nodes:
            node.name = ""
    free = (name for name in _names() if name not in kept)
    for (tensor, _), name in zip(uses.most_common(), free, strict=False):
        tensor.name = name
    return copy


def _names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))
