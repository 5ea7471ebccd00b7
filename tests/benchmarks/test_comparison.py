"""Figures with their bootstrap: paired, in points where more is better."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from superb_tasks.results import significance

from ..helpers.benchmarks import scripts


@pytest.fixture
def comparison() -> Iterator[Any]:
    with scripts("learning", "comparison") as (module,):
        yield module


def test_figures_are_points_where_more_is_better(comparison: Any) -> None:
    rows = [("a", 1.0, 1.0), ("b", 0.0, 1.0), ("c", 1.0, 1.0), ("d", 1.0, 1.0)]
    assert comparison.quality("ks", rows)[0] == 75.0
    assert comparison.quality("pr", [("a", 3.0, 10.0), ("b", 1.0, 30.0)])[0] == pytest.approx(90.0)
    assert comparison.quality("asr", [("a", 12.0, 10.0)])[0] == pytest.approx(-20.0)  # more errors than words


def test_intervals_are_those_of_the_package_and_differences_are_paired(comparison: Any) -> None:
    generator = np.random.default_rng(1)
    right = generator.random(300) < 0.7
    rows = [(f"{i:03d}", float(value), 1.0) for i, value in enumerate(right)]
    worse = [(name, amount if i % 10 else 0.0, 1.0) for i, (name, amount, _) in enumerate(rows)]
    ours = comparison.estimate(comparison.quality("ks", rows))
    low, high = significance.interval("ks", rows)
    assert (ours.value, ours.low, ours.high) == pytest.approx((100 * right.mean(), 100 * low, 100 * high), abs=0.7)
    lost = comparison.estimate(comparison.quality("ks", rows) - comparison.quality("ks", worse))
    theirs = significance.difference("ks", rows, worse)
    assert theirs is not None and lost.sure
    assert (lost.value, lost.low, lost.high) == pytest.approx((100 * theirs.value, 100 * theirs.low, 100 * theirs.high), abs=0.7)
    assert lost.high - lost.low < 0.7 * (ours.high - ours.low)  # most utterances are the same
    same = comparison.estimate(comparison.quality("ks", rows) - comparison.quality("ks", rows))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0) and not same.sure


def test_ranks_share_ties(comparison: Any) -> None:
    assert comparison.ranks([3.0, 5.0, 5.0, 1.0]) == [3.0, 1.5, 1.5, 4.0]
    assert comparison.spread([1.0, 3.0]) == "2.0 ± 1.4" and comparison.spread([2.0]) == "2.0"
