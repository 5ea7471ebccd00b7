"""The report: one self-contained HTML page of costs, quality over cost, shares of time and module trees; figures and tables beside it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..analysis.plots import distinct_colors
from ..errors import UserError, printable
from ..profiling.cost import ModuleCost, Profile, profile
from ..profiling.latency import Shares, Timing, plain, read
from ..profiling.precision import PRECISIONS, SIMULATED
from ..utils.files import replacing, writable, write_json, write_text
from . import frontier, table1
from .table2 import METRICS, QUALITIES, REFERENCES, SCORE, paper_quality, rows_of, superb_score
from .training_log import LOG, TrainingLog, draw_curves, read_log

COSTS = {"storage": "storage, MB", "bop": "bit operations of 10 s, 2^30", "ms": "measured latency of 10 s, ms"}
MEASURED_SECONDS = 10.0
LEAST = 1.0  # shares of time below this, in %, are summed up as the rest


@dataclass
class Findings:
    """What the folders hold: training runs, results of SUPERB tasks, measurements, and the profiles of the models these speak of."""

    runs: list[TrainingLog] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    shares: list[Shares] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # what cannot be read or profiled, and why


def collect(folders: Iterable[str | os.PathLike[str]]) -> Findings:
    """Read every log of training, result.json of a SUPERB task and bench.json below the folders; profile the latter's models.

    What cannot be read is left out, and named. Raises `UserError` where folders were given and none of them holds any of these.
    """
    found, given = Findings(), [Path(folder) for folder in folders]
    for folder in given:
        if not folder.is_dir():
            found.left_out.append(f"no folder at {folder}")
            continue
        before = _size(found)
        for name, take in ((LOG, _take_log), ("result.json", _take_result), ("bench.json", _take_bench)):
            for path in sorted(folder.rglob(name)):
                try:
                    take(path, found)
                except UserError as error:
                    found.left_out.append(str(error))
        if _size(found) == before:
            found.left_out.append(
                f"{folder} holds no {LOG} of training, no result.json of a SUPERB task and no bench.json of `hubert-eff bench --out`"
            )
    if given and not (found.runs or found.results or found.timings or found.shares):
        raise UserError("; ".join(found.left_out[:3]))
    models = [_model(values) for values in found.results] + [timing.model for timing in found.timings]
    for model in dict.fromkeys(models):
        try:
            found.profiles[model] = profile(model)
        except (UserError, RuntimeError) as error:
            found.left_out.append(f"{model}: {' '.join(str(error).split())[:200]}")
    return found


def _size(found: Findings) -> int:
    return len(found.runs) + len(found.results) + len(found.timings) + len(found.shares) + len(found.left_out)


def _take_log(path: Path, found: Findings) -> None:
    found.runs.append(read_log(path, str(path.parent)))  # none of a run that was refused, or has just begun


def _take_result(path: Path, found: Findings) -> None:
    values = _result(path)
    if values is not None:
        found.results.append(values)


def _take_bench(path: Path, found: Findings) -> None:
    timings, shares = read(path)
    found.timings += timings
    found.shares += shares


def _result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        raise UserError(f"{path} cannot be read: it is no regular file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error
    task = values.get("task") if isinstance(values, dict) else None
    if not isinstance(task, str) or task not in METRICS or not isinstance(values.get("upstream"), str):
        return None
    figures = [values[key] for key in REFERENCES[task] if key in values]
    return values if METRICS[task].key in values and all(map(_is_number, figures)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _model(result: dict[str, Any]) -> str:
    """The preset or checkpoint of a result: an untrained preset is named PRESET@SEED."""
    return _profiled(str(result["upstream"]))


def _profiled(upstream: str) -> str:
    return upstream if os.path.isfile(upstream) else upstream.partition("@")[0]


def _label(name: str) -> str:
    """A checkpoint by its last folder and file."""
    return "/".join(Path(name).parts[-2:]) if os.sep in name else name


def points(found: Findings, task: str, cost: str) -> list[frontier.Point]:
    """The models of one chart: the paper's, with the paper's own figures, and those of the results found."""
    chart = []
    for row in table1.PAPER_TABLE:
        value = {"storage": row.storage_mb, "bop": row.bop_nonq_g + (row.bop_bq_g or 0.0), "ms": None}[cost]
        if value is not None:
            chart += [frontier.Point(title, value, paper_quality(title, task), ours=False) for title in rows_of(row.title)]
    for upstream, remark, quality in _scores(found) if task == SCORE else _qualities(found, task):
        name = _profiled(upstream)
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
            label = _label(upstream) + (f" ({remark})" if remark else "")
            chart.append(frontier.Point(label, value, quality, ours=True))
    return chart


def _qualities(found: Findings, task: str) -> list[tuple[str, str, float]]:
    """Upstream, steps and data, and figure of each result of a task."""
    metric = METRICS[task]
    return [(str(r["upstream"]), _remark(r), metric.scale * r[metric.key]) for r in found.results if r["task"] == task]


def _remark(result: dict[str, Any]) -> str:
    """Steps of a result, and its data set where that is known."""
    steps = result.get("steps")
    return ", ".join(filter(None, [f"{steps} steps" if steps else "", str(result.get("data_set", ""))]))


def _scores(found: Findings) -> list[tuple[str, str, float]]:
    """Upstream and SUPERB score of those with results of all ten tasks, as SUPERB has them: on its data, by its settings."""
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
        figure = draw_curves([run])
        curves.append((run, frontier.as_bytes(figure, "svg")))
        written += _pictures(figure, curves[-1][1], target / f"training-{number}")
    overlaid = b""
    if len(found.runs) > 1:
        figure = draw_curves(found.runs)
        overlaid = frontier.as_bytes(figure, "svg")
        written += _pictures(figure, overlaid, target / "training-together")
    shown = _shown_tasks(found)
    tasks = QUALITIES if found.results or not found.runs else {task: QUALITIES[task] for task in shown}  # all 22 take seconds
    for task, metric in tasks.items():
        for cost, axis in COSTS.items():
            chart = points(found, task, cost)
            if not chart:
                continue
            figure = frontier.draw(chart, axis, metric.title, metric.more_is_better)
            svg = frontier.as_bytes(figure, "svg")
            charts.append((task, cost, svg))
            if task not in shown:
                continue
            written += _pictures(figure, svg, target / f"frontier-{task}-{cost}")
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
    write_text(target / "report.html", _page(rows, found, charts, curves, overlaid))
    return [target / "report.html", target / "report.json", target / "cost.csv", *written]


def _storable(value: Any) -> Any:
    """Values as JSON can hold them: what is not finite is none, texts of files can be written as UTF-8."""
    if isinstance(value, dict):
        return {str(_storable(key)): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pictures(figure: Any, svg: bytes, stem: Path) -> list[Path]:
    written = []
    for kind in ("svg", "png"):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as temporary:
            temporary.write_bytes(svg if kind == "svg" else frontier.as_bytes(figure, kind))
        written.append(path)
    return written


def _shown_tasks(found: Findings) -> list[str]:
    """The tasks that results were found of, or else one of the paper's."""
    return [*dict.fromkeys(result["task"] for result in found.results), *([SCORE] if _scores(found) else [])] or ["ks"]


def _costs(rows: Sequence[dict[str, Any]], found: Findings) -> list[dict[str, Any]]:
    """The cost table as plain columns: the paper's models by our count, then the models found."""
    figures = ("params", "storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s")
    table = []
    for row in rows:
        table.append({"model": row["row"], "source": "Table 1, our count", **{name: row[name] for name in figures}})
        table.append({"model": row["row"], "source": "Table 1, the paper", "params": None, **row["paper"]})
    for name, p in found.profiles.items():
        own = (p.params_without_labels, p.storage_mb["paper"], p.gflop, p.bop_nonq_g, p.bop_bq_g, 1e4 * p.est_time_s["paper"])
        table.append({"model": name, "source": "found", **dict(zip(figures, own, strict=True))})
    return table


# -- HTML ----------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5b6472; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1160px; padding: 0 16px 48px; color: #1b2430; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p, li { max-width: 75ch; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; } th:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); } tbody { border-top: 1px solid var(--line); }
tbody th { font-weight: normal; vertical-align: top; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: #fff; }
@media (max-width: 640px) { table { font-size: .8rem; } th, td { padding: 2px 5px; } tbody th { white-space: normal; min-width: 5.5rem; } }
.controls { display: flex; flex-wrap: wrap; gap: 12px; } select { font: inherit; max-width: 100%; padding: 4px; }
.chart { max-width: 100%; width: 560px; display: block; } .curves { width: 1100px; display: block; }
.bar { display: flex; height: 22px; border-radius: 4px; overflow: hidden; }
.bar span { display: block; height: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; margin: 6px 0 14px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
details { margin-left: 18px; } details > summary { cursor: pointer; } .leaf { margin-left: 34px; }
.tree { font-size: .9rem; overflow-x: auto; }
.tree summary, .leaf { white-space: nowrap; }
"""
SCRIPT = """
const charts = [...document.querySelectorAll('figure')], task = document.getElementById('task'), cost = document.getElementById('cost');
function choose() {
  const has = c => charts.some(f => f.id === task.value + '-' + c);
  for (const option of cost.options) option.disabled = !has(option.value);
  if (!has(cost.value)) cost.value = [...cost.options].find(o => !o.disabled).value;
  for (const figure of charts) figure.hidden = figure.id !== task.value + '-' + cost.value;
}
task.onchange = cost.onchange = choose; choose();
"""
REST = "#c9ced6"


def escape(text: object) -> str:
    """Text for HTML; what cannot be shown as it is in the notation of `printable`."""
    return html.escape(printable(text))


def _page(
    rows: Sequence[dict[str, Any]],
    found: Findings,
    charts: Sequence[tuple[str, str, bytes]],
    curves: Sequence[tuple[TrainingLog, bytes]],
    overlaid: bytes = b"",
) -> str:
    left_out = "".join(f"<p class=soft>Left out: {escape(text)}</p>" for text in found.left_out)
    body = [
        "<h1>What the models cost, and what they are worth</h1>",
        f"<p class=soft>hubert-eff {escape(__version__)}. Counts are of 10 s of audio; times are estimated unless they say measured.</p>",
        *(["<h2>Training</h2>", *_together(overlaid), *(_curves(run, svg) for run, svg in curves)] if curves else []),
        "<h2>Cost</h2>", _cost_table(rows), _found_table(found), left_out,
        "<h2>Quality over cost</h2>", _charts(found, charts),
        *(["<h2>Measured latency</h2>", _timings(found.timings)] if found.timings else []),
        "<h2>Where the time goes (measured)</h2>", _shares(found),
        "<h2>Modules</h2>", *(_modules(name, p) for name, p in found.profiles.items()),
        "" if found.profiles else "<p class=soft>No model was found in the folders given.</p>",
    ]  # fmt: skip
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'><title>hubert-eff report</title>"
        f"<style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{content}\n<script>{SCRIPT}</script></body></html>\n"


def _number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def _table(head: Sequence[str], groups: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """`groups`: a name, and the rows of cells that belong to it; a line stands above each."""
    lines = ["<div class=wide><table><thead><tr>", *(f"<th>{escape(h)}</th>" for h in head), "</tr></thead>"]
    for name, rows in groups:
        lines.append(f"<tbody><tr><th rowspan={len(rows)}>{escape(name)}</th>")
        lines.append("</tr><tr>".join("".join(f"<td>{escape(c)}</td>" for c in cells) for cells in rows))
        lines.append("</tr></tbody>")
    return "".join([*lines, "</table></div>"])


def _cost_table(rows: Sequence[dict[str, Any]]) -> str:
    groups = []
    notes: list[str] = []
    for row in rows:
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        mark = f" [{notes.index(row['note']) + 1}]" if row["note"] else ""
        params = _number(row["params"], ",")
        ours = ["ours", *(_number(row[f]) for f in table1.FIGURES), params]
        paper = ["paper", *(_number(row["paper"][f]) for f in table1.FIGURES), ""]
        difference = ["diff %", *(_number(row["difference_percent"][f], "+.2f") for f in table1.FIGURES), ""]
        groups.append((row["row"] + mark, (ours, paper, difference)))
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    caption = "<p>The paper's Table 1 rebuilt. BOP: 32 per float MAC, 1 per W1A1 MAC, G = 2^30.</p>"
    return caption + _table(("model", "", *table1.HEADINGS, "params"), groups) + f"<ol>{listed}</ol>"


def _found_table(found: Findings) -> str:
    if not found.profiles:
        return ""
    groups = []
    for name, p in found.profiles.items():
        figures = (p.storage_mb["paper"], p.storage_mb["file"], p.gflop, p.bop_nonq_g, p.bop_bq_g, 1e4 * p.est_time_s["paper"])
        groups.append((_label(name), ([*map(_number, figures), f"{p.params_without_labels:,}"],)))
    caption = "<p>Models found. Storage by the paper's formula, and of the file that export writes.</p>"
    return caption + _table(("model", "storage MB", "file MB", *table1.HEADINGS[1:], "params"), groups)


def _curves(run: TrainingLog, svg: bytes) -> str:
    return f"<p>{escape(str(run))}</p><div class=wide><img class=curves alt='curves of {escape(run.name)}' src='{_image(svg)}'></div>"


def _together(svg: bytes) -> list[str]:
    return [f"<div class=wide><img class=curves alt='curves of all runs, overlaid' src='{_image(svg)}'></div>"] if svg else []


def _image(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _charts(found: Findings, charts: Sequence[tuple[str, str, bytes]]) -> str:
    first = _shown_tasks(found)[0]
    tasks = "".join(
        f"<option value={task}{' selected' if task == first else ''}>{escape(QUALITIES[task].title)}</option>"
        for task in dict.fromkeys(task for task, _, _ in charts)
    )
    costs = "".join(f"<option value={cost}>{escape(axis)}</option>" for cost, axis in COSTS.items())
    images = "".join(
        f"<figure id={task}-{cost} style='margin:12px 0'><img class=chart alt='{escape(QUALITIES[task].title)} over {escape(COSTS[cost])}' "
        f"src='{_image(svg)}'></figure>"
        for task, cost, svg in charts
    )
    return (
        "<p>The paper's models carry the paper's figures (Tables 1 and 2, full LibriSpeech and SUPERB). Results found here may come from "
        "other data and fewer steps: they compare among themselves, not with the paper's.</p>"
        f"<div class=controls><label>Quality <select id=task>{tasks}</select></label>"
        f"<label>Cost <select id=cost>{costs}</select></label></div>{images}"
    )


def _timings(timings: Sequence[Timing]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for t in timings:
        times = [_number(value) for value in (t.median_ms, t.p5_ms, t.p95_ms)]
        memory = _number(t.peak_memory_mb, ",.0f")
        groups.setdefault(t.label, []).append([f"{t.seconds:g}", f"{t.batch}", *times, _number(t.rtf, ".5f"), memory])
    caption = "<p>One-bit models run from packed bits, unless they say simulated: computed with +-1 in floats, as in training.</p>"
    head = ("model", "audio s", "batch", "median ms", "p5", "p95", "RTF", "peak MB")
    return caption + _table(head, [(_label(name), rows) for name, rows in groups.items()])


def _shares(found: Findings) -> str:
    if not found.shares:
        return "<p class=soft>No bench.json was found in the folders given: hubert-eff bench ... --out DIR makes one.</p>"
    most: dict[str, float] = {"LayerNorm": math.inf}
    for row in (row for s in found.shares for row in s.blocks if row.time_percent >= LEAST):
        most[row.name] = max(most.get(row.name, 0.0), row.time_percent)
    names = sorted(most, key=lambda name: -most[name])
    colors = dict(zip(names, distinct_colors(len(names)), strict=True))  # one color per class on the whole page
    order = {name: place for place, name in enumerate(colors)}
    parts = []
    for s in found.shares:
        parts.append(f"<p><b>{escape(_label(s.label))}</b>, {s.seconds:g} s: modules inside the blocks</p>")
        for title, key in (("parameters", "params_percent"), ("FLOP", "flop_percent"), ("time", "time_percent")):
            spans = "".join(
                f"<span style='width:{getattr(row, key):.2f}%;background:{colors.get(row.name, REST)}' "
                f"title='{escape(row.name)} {getattr(row, key):.1f}%'></span>"
                for row in sorted(s.blocks, key=lambda row: order.get(row.name, len(order)))
            )
            parts.append(f"<div class=soft>{title}</div><div class=bar>{spans}</div>")
        legend = "".join(
            f"<span><i style='background:{colors[row.name]}'></i>{escape(row.name)} {row.params_percent:.1f} / {row.flop_percent:.1f} / "
            f"{row.time_percent:.1f} %</span>"
            for row in s.blocks
            if row.name in colors
        )
        parts.append(f"<div class=legend>{legend}<span><i style='background:{REST}'></i>rest</span></div>")
    return "<p>Shares of parameters / FLOP / time in %. FLOP: 2 per MAC of any width and 1 per element operation.</p>" + "".join(parts)


def _modules(name: str, found: Profile) -> str:
    def line(module: ModuleCost) -> str:
        label = module.name.rpartition(".")[2] or _label(name)
        share = f", {100 * module.macs / found.macs:.1f}% of MACs" if found.macs and module.macs else ""
        widths = "".join(f", {w} x {a} bit" for w, a in sorted(module.macs_by_bits, reverse=True))
        return f"<b>{escape(label)}</b> <span class=soft>{escape(module.kind)}: {module.params:,} parameters{share}{widths}</span>"

    def tree(module: ModuleCost, unfolded: str = "") -> str:
        below = [child for child in module.children if child.params or child.macs or child.element_ops]
        if not below:
            return f"<div class=leaf>{line(module)}</div>"
        return f"<details{unfolded}><summary>{line(module)}</summary>{''.join(map(tree, below))}</details>"

    return f"<div class=tree>{tree(found.modules, ' open')}</div>"
