"""Timing of two sides in one run: interleaved rounds, medians, and a guard against processes in which activations are slow."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from hubert_eff.profiling.machine import SlowProcessError
from hubert_eff.profiling.machine import cpu_seconds_of as cpu_seconds  # noqa: F401 (the scripts call it)
from hubert_eff.profiling.machine import guard as checked
from hubert_eff.profiling.machine import machine as machine
from hubert_eff.profiling.machine import seconds_of as seconds

CPU_TIME = "count CPU time of one thread instead of wall time, for a machine that others use too"


def parser(description: str, rounds: bool = True) -> argparse.ArgumentParser:
    """The arguments that all benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, default=1, help="torch threads for both sides (default: 1)")
    if rounds:
        options.add_argument("--rounds", type=int, default=5, help="timed rounds of each side, after one to warm up (default: 5)")
    options.add_argument("--json", action="store_true", help="print the figures as JSON")
    return options


def guard(when: str) -> float:
    """Stop with exit code 3 if this process runs activations abnormally slowly: its figures would be meaningless."""
    try:
        return checked(when)
    except SlowProcessError as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from error


def compare(
    sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[Callable[[], object]], float] = seconds
) -> dict[str, list[float]]:
    """Seconds per call of each side. A round calls every side once, so a slow moment of the machine affects all of them."""
    for function in sides.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(clock(function))
    return times


def row(what: str, times: dict[str, list[float]], target: float) -> dict[str, Any]:
    """One line of the result: medians in ms, and how many times faster the second side is."""
    (stock, slow), (ours, fast) = times.items()
    a, b = statistics.median(slow), statistics.median(fast)
    # the ratio within each round is what the machine's other load disturbs least
    ratios = sorted(x / y for x, y in zip(slow, fast, strict=True))
    return {
        "what": what,
        "sides": [stock, ours],
        "ms": [a * 1e3, b * 1e3],
        "ratio": a / b,
        "ratio_range": [ratios[0], ratios[-1]],
        "target": target,
    }


def best_marked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of peers of one thing, each with whether its peer is the fastest of them: that ratio is the one that counts."""
    best = min(rows, key=lambda row: row["ms"][0])
    return [{**row, "best": row is best} for row in rows]


def show(rows: list[dict[str, Any]], facts: dict[str, Any], as_json: bool) -> None:
    """Print the result."""
    if as_json:
        print(json.dumps({"machine": facts, "rows": rows}, indent=2))
        return
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    width = max(len(r["what"]) for r in rows)
    for r in rows:
        print(
            f"{r['what']:<{width}}  {r['sides'][0]} {r['ms'][0]:9.1f} ms   {r['sides'][1]} {r['ms'][1]:9.1f} ms   "
            f"{r['ratio']:6.2f}x (rounds {r['ratio_range'][0]:.2f} - {r['ratio_range'][1]:.2f}; target {r['target']:g}x)"
        )
    best = [r for r in rows if r.get("best")]
    if best:
        print("Against the fastest of its peers:")
    for r in best:
        print(f"{r['what']:<{width}}  {r['sides'][1]} {r['ratio']:6.2f}x as fast as {r['sides'][0]} (target {r['target']:g}x)")
