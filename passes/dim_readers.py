"""What can be solved anew where slices are removed: an operator's sum over channels, y = W x + b, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Model, Node
from onnxcomp.passes.dims import Coupling

__all__ = ["Reader", "rows_of_units"]

Array = npt.NDArray[Any]


class Reader(Protocol):
    """One sum over channels of a node of the main graph. Weights are matrices [groups, K, outputs per group]."""

    @property
    def node(self) -> Node: ...

    @property
    def key(self) -> Any:
        """What its moments are found by: a node may hold more than one sum."""

    @property
    def label(self) -> str: ...

    @property
    def number(self) -> int:
        """Position of the node among those of the graph."""

    @property
    def weight(self) -> Constant: ...

    @property
    def source(self) -> str:
        """The name of the value whose rows are x."""

    @property
    def groups(self) -> int: ...

    @property
    def outputs(self) -> int:
        """Of all groups."""

    @property
    def length(self) -> int:
        """K: entries of x per group."""

    @property
    def input_axis(self) -> int:
        """The axis of the weight that the sum runs over."""

    @property
    def takes_bias(self) -> bool: ...

    def bias(self) -> Array:
        """float64 [outputs], zeros if there is none."""

    def matrix(self) -> Array:
        """The weight, float64 [groups, K, outputs per group]."""

    def patches(self, x: Array, rows: int, rng: np.random.Generator) -> Array:
        """What the rows of `matrix` are multiplied with at some output positions: [groups, at most `rows`, K]."""

    def observed(self, value: Array, rows: int, rng: np.random.Generator) -> Array:
        """y at the positions that `patches` takes for a generator in the same state, [at most `rows`, outputs].

        `value` is `output`: the value that holds the output, or from which it follows.
        """

    @property
    def output(self) -> Any: ...

    def kept_outputs(self, keep: Callable[[Any, int], Array]) -> Array:
        """Of the outputs of all groups, those that stay; `keep` gives the indices of an axis of a tensor that do."""

    def on(self, model: Model, twin: Node) -> Reader:
        """The same sum of the node's counterpart in a copy of the model."""

    def rewrite(self, model: Model, weight: Array, bias: Array) -> None:
        """Give the node a new weight [groups, K, outputs per group] and, where it takes one, a bias [outputs]."""


def rows_of_units(site: Reader, coupling: Coupling, units: Sequence[int]) -> list[Array]:
    """For each unit the rows of `site.matrix` (of one group) that belong to it."""
    label = coupling.label(site.weight, site.input_axis)
    taps = site.length // len(label)
    index = np.arange(len(label))[:, None] * taps + np.arange(taps)
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.asarray(units))
    ends = np.searchsorted(label[order], np.asarray(units), side="right")
    return [index[np.sort(order[a:b])].reshape(-1) for a, b in zip(bounds, ends, strict=True)]
