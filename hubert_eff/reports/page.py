"""Writes the report: a self-contained HTML page of runs, costs, SUPERB results and quality over cost, with figures and tables."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import printable
from ..profiling.latency import plain
from ..profiling.precision import PRECISIONS, SIMULATED
from ..utils.files import replacing, writable, write_json, write_text
from . import frontier, table1
from .findings import COSTS, Findings, collect, profiled, short_name
from .markup import Chart, Curves, as_html
from .table2 import METRICS, QUALITIES, SCORE, paper_quality, rows_of, superb_score
from .training_log import draw_curves, draw_panels

__all__ = ["collect", "points", "write_report"]
MEASURED_SECONDS = 10.0


def points(found: Findings, task: str, cost: str) -> list[frontier.Point]:
    """The models of one chart: those found, and the paper's models with the paper's figures if they are comparable.

    Results on SUPERB's data with its settings compare with the paper's; if there are any, others are left out of the chart. Results on
    other data or with fewer steps compare only with each other. Without results the chart shows all models of the paper.
    """
    chart, found = [], comparable(found, task)
    alone = bool(found.results) and not all(result.get("superb_settings") for result in found.results)
    for row in () if alone else table1.PAPER_TABLE:
        value = {"storage": row.storage_mb, "bop": row.bop_nonq_g + (row.bop_bq_g or 0.0), "ms": None}[cost]
        if value is not None:
            chart += [frontier.Point(title, value, paper_quality(title, task), ours=False) for title in rows_of(row.title)]
    for upstream, remark, quality in _scores(found) if task == SCORE else _qualities(found, task):
        name = profiled(upstream)
        known = found.profiles.get(name)
        if known is None:
            continue
        measured = (t for t in found.timings if (t.model, t.precision, t.seconds, t.batch) == (name, PRECISIONS[0], MEASURED_SECONDS, 1))
        times = [t.median_ms for t in measured if t.form != SIMULATED]
        value = {
            "storage": known.storage_mb["paper"],
            "bop": known.bop_nonq_g + known.bop_bq_g,
            "ms": times[0] if times else None,
        }[cost]
        if value is not None:
            label = short_name(upstream) + (f" ({remark})" if remark else "")
            chart.append(frontier.Point(label, value, quality, ours=True))
    return chart


def comparable(found: Findings, task: str) -> Findings:
    """The findings with the results of one chart only."""
    results = [r for r in found.results if task in (SCORE, r["task"])]
    official = [r for r in results if r.get("superb_settings")]
    return replace(found, results=official or results)


def _qualities(found: Findings, task: str) -> list[tuple[str, str, float]]:
    """Upstream, steps with data, and figure of each result of a task."""
    metric = METRICS[task]
    return [(str(r["upstream"]), _remark(r), metric.scale * r[metric.key]) for r in found.results if r["task"] == task]


def _remark(result: dict[str, Any]) -> str:
    """Steps of a result, and its data set if that is known."""
    steps = result.get("steps")
    return ", ".join(filter(None, [f"{steps} steps" if steps else "", str(result.get("data_set", ""))]))


def _scores(found: Findings) -> list[tuple[str, str, float]]:
    """Upstream and SUPERB score of models with results of all ten tasks on SUPERB's data with its settings."""
    by_upstream: dict[str, dict[str, dict[str, Any]]] = {}
    for result in found.results:
        if result.get("superb_settings"):
            by_upstream.setdefault(str(result["upstream"]), {})[result["task"]] = result
    scores = ((upstream, superb_score(results)) for upstream, results in by_upstream.items())
    return [(upstream, "", score) for upstream, score in scores if score is not None]


def write_report(found: Findings, out: str | os.PathLike[str]) -> list[Path]:
    """Write report.html, report.json, cost.csv, and as SVG and PNG the curves, of several runs also overlaid, and the figures of the tasks
    with results.

    Returns the paths. The page holds everything it shows and needs no network. Raises `UserError` without matplotlib.
    """
    target, rows = writable(out), table1.table1(counts=table1.COUNTS)
    written, charts, curves = [], [], []
    for number, run in enumerate(found.runs, start=1):
        panels = [(title, frontier.as_bytes(figure, "svg")) for title, figure in draw_panels([run])]
        curves.append(Curves(run, panels))
        written += _pictures(draw_curves([run]), target / f"training-{number}")
    together = []
    if len(found.runs) > 1:
        together = [(title, frontier.as_bytes(figure, "svg")) for title, figure in draw_panels(found.runs)]
        written += _pictures(draw_curves(found.runs), target / "training-together")
    shown = _shown_tasks(found)
    paper = not (found.runs or found.results or found.timings or found.shares)  # nothing was found, so only the paper's models are shown
    for task in QUALITIES if paper else shown:
        for cost, axis in COSTS.items():
            chart = points(found, task, cost)
            if not chart or not (paper or any(p.ours for p in chart)):
                continue
            figure = frontier.draw(chart, axis, QUALITIES[task].title, QUALITIES[task].more_is_better)
            beside = comparable(found, task)
            dropped = sum(r["task"] == task for r in found.results) - len(beside.results) if task in METRICS else 0
            charts.append(Chart(task, cost, frontier.as_bytes(figure, "svg"), any(not p.ours for p in chart), dropped))
            if task in shown:
                written += _pictures(figure, target / f"frontier-{task}-{cost}")
    costs = _costs(rows, found)
    table = io.StringIO()
    writer = csv.DictWriter(table, costs[0])
    writer.writeheader()
    writer.writerows(costs)
    values = {
        "version": __version__,
        "table1": rows,
        "models": {name: p.to_dict() for name, p in found.profiles.items()},
        "runs": [asdict(run) for run in found.runs],
        "results": found.results,
        "timings": [plain(timing) for timing in found.timings],
        "left_out": found.left_out,
    }
    write_text(target / "cost.csv", table.getvalue())
    write_json(target / "report.json", _storable(values))
    write_text(target / "report.html", as_html(rows, found, charts, curves, together))
    return [target / "report.html", target / "report.json", target / "cost.csv", *written]


def _storable(value: Any) -> Any:
    """Values that JSON can hold: None for numbers that are not finite, and texts that UTF-8 can encode."""
    if isinstance(value, dict):
        return {str(_storable(key)): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pictures(figure: Any, stem: Path) -> list[Path]:
    written = []
    for kind in ("svg", "png"):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as temporary:
            temporary.write_bytes(frontier.as_bytes(figure, kind))
        written.append(path)
    return written


def _shown_tasks(found: Findings) -> list[str]:
    """The tasks with results; one of the paper's if nothing at all was found."""
    tasks = [*dict.fromkeys(result["task"] for result in found.results), *([SCORE] if _scores(found) else [])]
    return tasks or ([] if found.runs or found.timings or found.shares else ["ks"])


def _costs(rows: Sequence[dict[str, Any]], found: Findings) -> list[dict[str, Any]]:
    """The cost table as plain columns: first the paper's models by our count, then the models found."""
    figures = ("params", "storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s")
    table = []
    for row in rows:
        table.append({"model": row["row"], "source": "Table 1, our count", **{name: row[name] for name in figures}})
        table.append({"model": row["row"], "source": "Table 1, the paper", "params": None, **row["paper"]})
    for name, p in found.profiles.items():
        own = (p.params_without_labels, p.storage_mb["paper"], p.gflop, p.bop_nonq_g, p.bop_bq_g, 1e4 * p.est_time_s["paper"])
        table.append({"model": name, "source": "found", **dict(zip(figures, own, strict=True))})
    return table
