"""Which units of a group go first, and what each removal costs: an order and a curve of predicted errors per group.

Methods, for a unit c with rows Q of the weight W [K, O] of each operator that reads it:

    l1, l2     sum over its slices of all weights of |w|, w^2
    bn         |scale| of the BatchNormalization that makes it (where there is one; else l2)
    energy     sum of H_qq ||W_q||^2 over Q, H the second moment of the input: what the sum loses, one channel at a time
    obs        structured optimal brain surgeon: tr(W_Q^T ([H^-1]_QQ)^-1 W_Q), what is lost after the weights that stay
               have been solved anew; H^-1 and W are updated after each step (Frantar et al. 2022, Meng et al. 2024)

A residual branch has one unit; what its ablation costs is measured (dim_sensitivity.py).

Errors are relative to the power of the operator's output, added up over the operators that read the group; for
l1, l2 and bn they are shares of the group's total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Constant
from onnxcomp.passes.dim_readers import Reader, rows_of_units
from onnxcomp.passes.dims import Coupling, Group

__all__ = ["Curve", "Method", "curves"]

Array = npt.NDArray[Any]
Method = Literal["l1", "l2", "bn", "energy", "obs", "ablation"]
_DAMPING = 1e-3  # of the mean diagonal
_STEPS = 32  # updates of the inverse per group


@dataclass(frozen=True)
class Curve:
    """`order`: units, first to go first. `errors[k]`: predicted error after k removals, float64 [width + 1]."""

    group: Group
    order: tuple[int, ...]
    errors: Array
    method: Method


def curves(
    coupling: Coupling, groups: list[Group], method: Method, found: list[Reader], grams: Mapping[Any, Gram]
) -> list[Curve]:
    """One curve per group. Groups that no observed operator reads fall back from obs and energy to l2."""
    gammas = _gammas(coupling)
    result = []
    for group in groups:
        readers = [s for s in found if s.key in grams and (s.weight, s.input_axis) in group.axes]
        readers = [s for s in readers if (s.weight, s.input_axis) in coupling.sums]
        if method == "obs" and readers:
            result.append(_surgeon(coupling, group, readers, grams))
        elif method == "energy" and readers:
            result.append(_ranked(group, _energy(coupling, group, readers, grams), method))
        elif method == "bn" and (scores := _scales(coupling, group, gammas)) is not None:
            result.append(_ranked(group, scores, method))
        else:
            power = 1 if method == "l1" else 2
            result.append(_ranked(group, _norms(coupling, group, power), "l1" if method == "l1" else "l2"))
    return result


def _ranked(group: Group, scores: Array, method: Method) -> Curve:
    order = np.argsort(scores, kind="stable")
    total = float(scores.sum()) if method in ("l1", "l2", "bn") else 1.0
    errors = np.concatenate([[0.0], np.cumsum(scores[order])]) / max(total, 1e-30)
    return Curve(group, tuple(group.units[i] for i in order), errors, method)


def _norms(coupling: Coupling, group: Group, power: int) -> Array:
    """Sum over all slices of |w|^power, each weight relative to its total."""
    scores = np.zeros(group.width)
    units = np.asarray(group.units)
    for tensor, axis in group.axes:
        values = np.abs(tensor.values.astype(np.float64)) ** power
        slices = values.sum(axis=tuple(k for k in range(values.ndim) if k != axis))
        scores += _per_unit(coupling.label(tensor, axis), slices, units) / max(float(slices.sum()), 1e-30)
    return scores


def _per_unit(labels: Array, slices: Array, units: Array) -> Array:
    place = np.searchsorted(units, labels)
    place[place == len(units)] = 0
    mine = units[place] == labels
    return np.bincount(place[mine], weights=slices[mine], minlength=len(units))


def _gammas(coupling: Coupling) -> list[tuple[Constant, Array]]:
    found = []
    for node in coupling.model.nodes():
        if node.op == "BatchNormalization" and isinstance(node.inputs[1], Constant):
            found.append((node.inputs[1], np.abs(node.inputs[1].values.astype(np.float64))))
    return found


def _scales(coupling: Coupling, group: Group, gammas: list[tuple[Constant, Array]]) -> Array | None:
    scores = np.zeros(group.width)
    for tensor, scale in gammas:
        scores += _per_unit(coupling.label(tensor, 0), scale, np.asarray(group.units))
    return scores if scores.any() else None


def _moment(site: Reader, gram: Gram) -> Array:
    """[groups, K, K]: the covariance where a bias can take up the mean, else the second moment."""
    return gram.covariance if site.takes_bias else gram.products / max(gram.rows, 1)


def _energy(coupling: Coupling, group: Group, readers: list[Reader], grams: Mapping[Any, Gram]) -> Array:
    scores = np.zeros(group.width)
    for site in readers:
        moment, weight = _moment(site, grams[site.key]), site.matrix()
        power = np.einsum("gkk,gko->k", moment, np.square(weight))
        total = max(float(np.einsum("gko,gkl,glo->", weight, moment, weight, optimize=True)), 1e-30)
        scores += [power[rows].sum() / total for rows in rows_of_units(site, coupling, group.units)]
    return scores


@dataclass
class _State:
    """One operator's part of a group while units go: rows per unit, inverse moment and weight per group of channels."""

    rows: list[Array]
    inverse: Array
    weight: Array
    total: float

    def scores(self, alive: Array) -> Array:
        """Error of the removal of each unit alone. Units of one group have equally many rows in an operator."""
        index = np.stack([self.rows[i] for i in alive])
        blocks = self.inverse[:, index[:, :, None], index[:, None, :]]
        weight = self.weight[:, index]
        return np.asarray(np.einsum("guko,guko->u", weight, np.linalg.solve(blocks, weight)) / self.total)

    def remove(self, units: Array) -> float:
        """Take rows out, update what stays, and return the error that this adds."""
        gone = np.concatenate([self.rows[i] for i in units])
        block = self.inverse[:, gone[:, None], gone]
        weight = self.weight[:, gone]
        solved = np.linalg.solve(block, weight)
        error = float(np.einsum("gko,gko->", weight, solved)) / self.total
        column = self.inverse[:, :, gone]
        self.weight -= column @ solved
        self.inverse -= column @ np.linalg.solve(block, column.transpose(0, 2, 1))
        # Rows of removed units stay in place; a unit diagonal keeps later blocks solvable, and none reads them.
        self.inverse[:, gone, :] = 0.0
        self.inverse[:, :, gone] = 0.0
        self.inverse[:, gone, gone] = 1.0
        self.weight[:, gone] = 0.0
        return error


def _surgeon(coupling: Coupling, group: Group, readers: list[Reader], grams: Mapping[Any, Gram]) -> Curve:
    states = []
    for site in readers:
        moment, weight = _moment(site, grams[site.key]), site.matrix()
        total = max(float(np.einsum("gko,gkl,glo->", weight, moment, weight, optimize=True)), 1e-30)
        damping = _DAMPING * np.einsum("gkk->g", moment) / moment.shape[1] + 1e-12
        inverse = np.linalg.inv(moment + damping[:, None, None] * np.eye(moment.shape[1]))
        states.append(_State(rows_of_units(site, coupling, group.units), inverse, weight, total))
    alive = np.arange(group.width)
    step = max(1, group.width // _STEPS)
    order: list[int] = []
    errors = [0.0]
    while len(alive) > 1:
        scores = sum(state.scores(alive) for state in states)
        gone = alive[np.argsort(scores, kind="stable")[: min(step, len(alive) - 1)]]
        added = sum(state.remove(gone) for state in states)
        errors.extend(errors[-1] + added * (k + 1) / len(gone) for k in range(len(gone)))
        order.extend(gone.tolist())
        alive = alive[~np.isin(alive, gone)]
    order.extend(alive.tolist())
    errors.append(max(errors[-1], float(len(readers))))
    return Curve(group, tuple(group.units[i] for i in order), np.asarray(errors), "obs")
