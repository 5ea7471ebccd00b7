"""Figures of models on the same test utterances: bootstrap over the utterances, paired, for any statistic of several models.

A figure is an array (1 + R,): first the figure itself, then that of each of R draws of the test utterances. All figures of a task are drawn
alike, so that differences, means and ratios of such arrays are paired, and `estimate` says what came out. What another training would give
is not in it: that is the spread over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hubert_eff.data.lines import read_json
from hubert_eff.errors import UserError
from hubert_eff.reports.table2 import METRICS
from superb_tasks.data.utterances import Row
from superb_tasks.results.significance import drawn_figures, figure

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        """Rounded values for JSON, with None for NaN."""
        return {key: round(value, 4) if math.isfinite(value) else None for key, value in asdict(self).items()}  # type: ignore[misc]


def quality(task: str, rows: Sequence[Row]) -> Figures:
    """Accuracy in %, or 100 minus the error rate in %, of (name, amount, of how many) per utterance: (1 + R,)."""
    values = 100 * np.append(figure(task, rows), drawn_figures(task, rows))
    return values if METRICS[task].more_is_better else 100 - values


def estimate(figures: Figures) -> Estimate:
    """The mean and interval of an array of figures."""
    drawn = figures[1:][np.isfinite(figures[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (math.nan, math.nan)
    return Estimate(float(figures[0]), float(low), float(high))


def mean(figures: Sequence[Figures]) -> Figures:
    """The mean of several figures, draw by draw."""
    return np.mean(np.stack(figures), axis=0)  # type: ignore[no-any-return]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks, 1 for the largest; equal figures share the mean of their ranks."""
    return [1 + sum(other > value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def spread(values: Sequence[float]) -> str:
    """The mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def read_rows(folder: Path, task: str) -> list[Row]:
    """The utterances of a finished probe. Raises `UserError` if there is none."""
    file = folder / task / "utterances.json"
    if not (folder / task / "result.json").is_file():
        raise UserError(f"{folder} has no result of {task}: run the command without --tables")
    try:
        return [(str(name), float(amount), float(number)) for name, amount, number in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete {folder / task}, and the same command runs it again") from error


def read_result(folder: Path, task: str) -> dict[str, Any]:
    """The content of a finished probe: metric, learning rate, steps, duration."""
    return dict(read_json(folder / task / "result.json", "delete its folder, and the same command runs it again"))
