"""Confidence intervals and paired differences by bootstrap over the utterances of a test set.

Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation": utterances are drawn with replacement,
the same ones for two models. Trials of speaker verification share recordings, so their intervals are too narrow rather than too wide, as
are all intervals that leave out the training.

# R draws, N utterances
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.utterances import Row

DRAWS = 2000
LEVEL = 0.95
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A model's figure minus another's on the same utterances: the difference, its interval, and the two-sided p value of no difference."""

    value: float
    low: float
    high: float
    p: float


def ratio(amounts: Values, numbers: Values) -> Values:
    """The sum of amounts over the sum of numbers, along the last axis."""
    return np.asarray(amounts.sum(-1) / np.maximum(numbers.sum(-1), 1e-12))


def equal_error_rate(scores: Values, same: Values) -> Values:
    """The rate at which misses and false alarms are equal, along the last axis; 0.5 if there is only one kind of trial."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    target = np.take_along_axis(same, order, -1)
    hits, alarms = np.cumsum(target, -1), np.cumsum(1 - target, -1)
    positives, negatives = hits[..., -1:], alarms[..., -1:]
    missed, false = 1 - hits / np.maximum(positives, 1), alarms / np.maximum(negatives, 1)
    crossing = np.argmin(np.abs(missed - false), -1)[..., None]
    rate = (np.take_along_axis(missed, crossing, -1) + np.take_along_axis(false, crossing, -1))[..., 0] / 2
    return np.where((positives > 0)[..., 0] & (negatives > 0)[..., 0], rate, 0.5)


def figure(task: str, rows: Sequence[Row]) -> float:
    """The metric of all rows."""
    return float(_measure(task)(*_columns(rows)))


def interval(task: str, rows: Sequence[Row], seed: int = 0) -> tuple[float, float]:
    """The 95% confidence interval of the metric."""
    drawn = drawn_figures(task, rows, seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference(task: str, ours: Sequence[Row], theirs: Sequence[Row], seed: int = 0) -> Difference | None:
    """`ours` minus `theirs`, paired; None if the utterances are not the same."""
    if [row[0] for row in ours] != [row[0] for row in theirs]:
        return None
    drawn = drawn_figures(task, ours, seed) - drawn_figures(task, theirs, seed)  # the same seed draws the same utterances
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    p = min(1.0, max(2 * float(tail), 1 / DRAWS))  # at least the smallest value that the draws can show
    return Difference(figure(task, ours) - figure(task, theirs), float(low), float(high), p)


def _measure(task: str) -> Any:
    return equal_error_rate if task == "asv" else ratio


def _columns(rows: Sequence[Row]) -> tuple[Values, Values]:
    return np.array([row[1] for row in rows], dtype=np.float64), np.array([row[2] for row in rows], dtype=np.float64)


def drawn_figures(task: str, rows: Sequence[Row], seed: int = 0) -> Values:
    """The metric of each draw, (R,): the same utterances are drawn for every model of a task."""
    first, second = _columns(rows)
    generator, measure = np.random.default_rng(seed), _measure(task)
    block = max(1, 2_000_000 // len(rows))  # draws at a time, even for a full test set
    drawn = []
    for start in range(0, DRAWS, block):
        chosen = generator.integers(len(rows), size=(min(block, DRAWS - start), len(rows)))
        drawn.append(measure(first[chosen], second[chosen]))
    return np.concatenate(drawn)
