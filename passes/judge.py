"""How close a candidate is to the float model, in one number, on samples that calibration did not see.

The SQNR is 10 log10(sum y^2 / sum (y - y')^2) dB, mean over the outputs. A few samples can hold most of the noise, and
chance says which; so candidates that ought to be about as good are told apart by the `typical` ratio, in which errors
count by their norm e_i = ||y_i - y_i'|| per sample: 20 log10(sqrt(mean ||y_i||^2) / mean e_i).
Where an output is a Softmax, its input is compared: probabilities saturate and hide what rounding did to the scores.
Quantities of different units that share an output (a detector's boxes and scores) count as outputs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.batches import take
from onnxcomp.calibration.data import Batch, Dataset
from onnxcomp.calibration.runner import expose
from onnxcomp.class_metrics import distributions
from onnxcomp.errors import DataError
from onnxcomp.graph import Model, producer
from onnxcomp.mixed_outputs import NOISE_PER_DROP, Part, parts

__all__ = ["Assessed", "Judge", "Judges", "acceptable", "prudent"]

Array = npt.NDArray[Any]
_LIMIT = 1 << 28  # bytes of reference outputs that are kept
_PROBED, _JUDGED = 128, 512  # held-out samples for single changes, and for whole candidates
_FEWEST = 4  # samples that are compared, however much each has to compare
_MIN_FOR_RARE = 8  # samples from which the spread of an output over them says something

_SPENT = 0.75  # share of the budget that a search may use up on the samples that it looks at


def acceptable(score: tuple[float, float], budget: float) -> bool:
    """Whether a score keeps the drop within the budget.

    Few samples say little about rare changes of class, so the noise on the scores is bounded as well.
    """
    sqnr, drop = score
    return drop <= budget and sqnr >= -10 * math.log10(NOISE_PER_DROP * max(budget, 1e-3))


class Assessed(NamedTuple):
    """What was found: SQNR and typical SQNR in dB, the drop, the drop to expect (see `Judge.assess`), and noise power /
    signal power, mean over the outputs as SQNR is that of their decibels: the worst output makes most of it.
    """

    sqnr: float
    drop: float
    expected: float
    typical: float
    noise: float


def prudent(assessed: Sequence[float], budget: float, counted: int) -> bool:
    """Whether what `Judge.assess` found on `counted` samples with classes leaves the drop on others within the budget.

    The drop to expect counts as well as the drop seen. Classes of samples that the model was trained on change last, so
    that the noise on the scores is bounded closer than in `acceptable`: 20 dB for 1 %. Fewer than 1 / budget samples
    cannot show such a drop, and changes of class may come from few, large errors: of that noise n budget /
    (1 + n budget) stays. Where no classes are counted (0) the drop is a ratio of powers, which a few samples measure.
    The last candidate that passes is the one that these samples flatter most: a quarter of the budget is kept back.
    """
    sqnr, drop, expected = assessed[:3]
    least = max(budget, 1e-3)
    share = counted * least / (1 + counted * least) if counted else 1.0
    return max(drop, expected) <= _SPENT * budget and sqnr >= -10 * math.log10(least * share)


class Split:
    """Values in which quantities of different units are apart; the first ones decide what there is in each.

    `owners` has the number of the output that each of the first values, those of the `outputs`, belongs to, `weights`
    what noise counts in each of these.
    """

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self._found: list[list[Part]] = []
        self.owners: list[int] = []
        self.weights: list[float] = []

    def __call__(self, values: Sequence[Array]) -> list[Array]:
        if not self._found:
            self._found = [parts(v) if v.dtype.kind == "f" else [] for v in values]
            for owner, found in enumerate(self._found[: self._outputs]):
                self.owners += [owner] * max(1, len(found))
                self.weights += [p.weight for p in found] or [1.0]
        return [y for x, found in zip(values, self._found, strict=True) for y in ([p.take(x) for p in found] or [x])]


class Judge:
    """Compares candidates with `reference` on up to `samples` samples of `data`, whose outputs it keeps.

    `counted` is the number of samples whose class is compared, 0 for a model without classes. With `enough` numbers to
    compare, and 4 samples, no more are taken: a picture says more about noise than a row of scores.
    """

    def __init__(
        self, reference: Model, data: Dataset, *, samples: int = 64, threads: int = 1, enough: int | None = None
    ) -> None:
        self._threads = threads
        self._feeds: list[Mapping[str, Array]] = []
        self._counts: list[int] = []
        self._expected: list[list[Array]] = []
        self._split = Split(len(reference.graph.outputs))
        self._powers: list[list[float]] = []
        names = _compared(reference)
        session = expose(reference, names, threads=threads)
        held = numbers = taken = 0
        for batch in _parts(data, samples, enough):
            values = self._split([np.asarray(v) for v in session.run(batch.feeds, names)])
            held += sum(v.nbytes for v in values)
            self._feeds.append(batch.feeds)
            self._counts.append(batch.count)
            self._expected.append(values)
            self._powers = self._powers or [[] for _ in self._split.owners]
            for powers, value in zip(self._powers, values, strict=False):  # the inputs of a Softmax follow
                powers.extend(_powers(value, batch.count))
            numbers, taken = numbers + sum(v.size for v in values), taken + batch.count
            if held > _LIMIT or (enough is not None and numbers >= enough and taken >= _FEWEST):
                break
        self._outputs = [o.name for o in reference.graph.outputs]
        self._classes = len(reference.graph.outputs) == 1 and _decide([v[0] for v in self._expected])
        self.counted = sum(len(v[0]) for v in self._expected) if self._classes else 0

    def rare_outputs(self) -> list[str]:
        """Outputs to which most samples hardly add: (sum p)^2 / sum p^2, the number of samples that count for the power
        p, is below a third of them. What they are where something is found is in few calibration samples, if in any.
        """
        found = []
        for owner, powers in zip(self._split.owners, self._powers, strict=True):
            p = np.array(powers)
            if len(p) >= _MIN_FOR_RARE and p.any() and np.square(p.sum()) / np.square(p).sum() < len(p) / 3:
                found.append(self._outputs[owner])
        return list(dict.fromkeys(found))

    def score(self, candidate: Model) -> tuple[float, float]:
        """SQNR in dB and drop of `assess`."""
        return self.assess(candidate)[:2]

    def assess(self, candidate: Model) -> Assessed:
        """SQNR in dB, mean over the float outputs (before a Softmax), and the drop in quality.

        The drop is the share of samples whose class changes if the only output is [samples, classes] and the largest
        value is not always the same one, or if it holds probabilities; else noise power / signal power of the worst
        output as it is. Minus infinity and infinity if an output is not finite.

        The drop to expect: where classes are counted, the share that would change if errors of this
        power fell on the samples' margins by chance. It says something where few samples change, or none.
        """
        names = _compared(candidate)
        outputs = len(self._split.owners)
        session = expose(candidate, names, threads=self._threads)
        signal, noise, norms, units = np.zeros((4, len(self._expected[0]) if self._expected else 0))
        rows, changed = 0, 0
        margins, errors = [], []
        for feeds, count, expected in zip(self._feeds, self._counts, self._expected, strict=True):
            values = self._split([np.asarray(v) for v in session.run(feeds, names)])
            for i, (x, y) in enumerate(zip(expected, values, strict=True)):
                if x.dtype.kind != "f":
                    continue
                wide = x.astype(np.float64)
                signal[i] += np.square(wide).sum()
                powers = _powers(wide - y, count)
                noise[i] += sum(powers)
                norms[i] += np.sqrt(powers).sum()
                units[i] += len(powers)
                if self._classes and i == 0:
                    rows += len(x)
                    changed += int(np.count_nonzero(x.argmax(axis=1) != y.argmax(axis=1)))
                elif outputs == 1 and rows and wide.ndim == 2:
                    margins.append(_margins(wide))
                    errors.append(wide - y)
        if not np.isfinite(noise).all():
            return Assessed(-math.inf, math.inf, math.inf, -math.inf, math.inf)
        # An output without signal (a head that found nothing) says nothing about rounding.
        ratios = np.where(signal > 0, np.maximum(noise, 1e-12 * signal) / np.where(signal > 0, signal, 1), np.nan)
        before = ratios[outputs:]
        if np.isnan(before).all():
            return Assessed(math.inf, 0.0, 0.0, math.inf, 0.0)
        counted = ratios[:outputs] * self._split.weights
        worst = float(np.nanmax(counted)) if not np.isnan(counted).all() else 0.0
        sqnr, ratio = float(np.nanmean(-10 * np.log10(before))), float(np.nanmean(before))
        # Of the noise power what is left when errors count by their norm: 1 where all samples have the same.
        even = (np.square(norms) / np.maximum(units * noise, 1e-300))[outputs:][~np.isnan(before)]
        typical = sqnr - float(np.mean(10 * np.log10(np.where(even > 0, even, 1.0))))
        if not rows:
            return Assessed(sqnr, worst, worst, typical, ratio)
        drop = changed / rows
        return Assessed(sqnr, drop, _expected(margins, errors) if margins else drop, typical, ratio)


def _parts(data: Dataset, samples: int, enough: int | None) -> Iterator[Batch]:
    """The batches; if few samples may do, the first one in two parts."""
    for number, batch in enumerate(data.batches(samples)):
        if number or enough is None or not data.divisible or batch.count <= _FEWEST:
            yield batch
        else:
            yield take(batch, 0, _FEWEST)
            yield take(batch, _FEWEST, batch.count)


class Judges:
    """The judges of one search, on data that were held out: `probing` for single changes, of which there are many,
    `whole` for candidates. Both are None if there are no such data.
    """

    def __init__(self, reference: Model, data: Dataset | None, *, threads: int, probed: int = _PROBED) -> None:
        self._reference = reference
        self._data = data
        self._threads = threads
        self._probed = probed

    @cached_property
    def probing(self) -> Judge | None:
        return self._judge(self._probed)

    @cached_property
    def whole(self) -> Judge | None:
        return self._judge(_JUDGED)

    def _judge(self, samples: int) -> Judge | None:
        if self._data is None or self._data.length == 0:
            return None
        try:
            return Judge(self._reference, self._data, samples=samples, threads=self._threads)
        except DataError:  # a stream of unknown length with too few batches to hold one out
            return None


def _decide(outputs: list[Array]) -> bool:
    """Whether outputs of samples are scores of classes; see `ClassStats.telling`."""
    if not outputs or not all(o.dtype.kind == "f" and o.ndim == 2 and o.shape[1] > 1 for o in outputs):
        return False
    winners = {int(w) for o in outputs for w in o.argmax(axis=1)}
    return len(winners) > 1 or all(bool(distributions(o.astype(np.float64)).all()) for o in outputs)


def _powers(value: Array, count: int) -> list[float]:
    """Sum of squares of each sample where the first axis holds `count` samples, else of all."""
    if value.dtype.kind != "f":
        return []
    squares = np.square(value.astype(np.float64))
    rows = squares.reshape(count, -1) if value.ndim and len(value) == count else squares.reshape(1, -1)
    return [float(row) for row in rows.sum(axis=1)]


def _margins(scores: Array) -> Array:
    """How far the largest score of each row is above the second."""
    top = np.partition(scores, -2, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])


def _expected(margins: list[Array], errors: list[Array]) -> float:
    """Mean of P(N(0, s^2) > margin), s^2 the mean square of the difference between the errors of two classes."""
    wrong = np.concatenate(errors)
    centered = wrong - wrong.mean(axis=1, keepdims=True)  # what all classes share changes no decision
    classes = wrong.shape[1]
    spread = math.sqrt(max(2 * float(np.square(centered).mean()) * classes / (classes - 1), 1e-30))
    ratios = np.concatenate(margins) / (spread * math.sqrt(2))
    return float(np.mean([0.5 * math.erfc(r) for r in ratios]))


def _compared(model: Model) -> list[str]:
    """The outputs, and behind them for each output the value that the score compares: what goes into its Softmax."""
    names = [o.name for o in model.graph.outputs]
    for output in model.graph.outputs:
        node = producer(output)
        while node is not None and node.op == "Cast" and not node.domain:  # of a half-precision candidate
            node = producer(node.inputs[0])
        soft = node is not None and node.op in ("Softmax", "LogSoftmax", "Sigmoid") and not node.domain
        source = node.inputs[0] if node is not None and soft else output
        names.append(source.name if producer(source) is not None else output.name)
    return names
