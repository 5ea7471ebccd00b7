"""The report's HTML, a page that needs no network and fits on a phone."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..analysis.plots import distinct_colors
from ..errors import printable
from ..profiling.cost import ModuleCost, Profile
from ..profiling.latency import Timing
from . import table1
from .findings import COSTS, Findings, short_name
from .narrow import narrow
from .table2 import QUALITIES
from .training_log import TrainingLog

LEAST = 1.0  # shares of time below this, in %, are added up as the rest
MOST_COLORS = 10  # number of distinguishable colors, including the rest


@dataclass(frozen=True)
class Curves:
    """A run and its panels, each a title and SVG."""

    run: TrainingLog
    panels: list[tuple[str, bytes]]


@dataclass(frozen=True)
class Chart:
    """A picture of quality over cost, as SVG. `dropped`: results of the task that do not compare with those shown."""

    task: str
    cost: str
    svg: bytes
    paper: bool  # whether it shows the paper's models
    dropped: int


STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5b6472; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1160px; padding: 0 16px 48px; color: #1b2430; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p, li { max-width: 75ch; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; } th:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); } tbody { border-top: 1px solid var(--line); }
tbody th { font-weight: normal; vertical-align: top; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: #fff; }
@media (max-width: 640px) {
  table { font-size: .8rem; } th, td { padding: 2px 5px; } th { min-width: 3.2rem; } th:first-child { min-width: 5.5rem; }
  thead th { white-space: normal; } tbody th { white-space: normal; overflow-wrap: anywhere; }
}
.controls { display: flex; flex-wrap: wrap; gap: 12px; } select { font: inherit; max-width: 100%; padding: 4px; }
.chart { max-width: 100%; width: 560px; display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 8px; }
.panels img { width: 100%; display: block; }
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
    """Text for HTML; unprintable characters are written as by `printable`."""
    return html.escape(printable(text))


def as_html(
    rows: Sequence[dict[str, Any]], found: Findings, charts: Sequence[Chart], curves: Sequence[Curves],
    together: Sequence[tuple[str, bytes]] = (),
) -> str:  # fmt: skip
    """The page: first runs, with costs and results of their models, then what they are compared with.

    rows: of `table1.table1`. together: panels of several runs over each other, each a title and its SVG.
    """
    left_out = "".join(f"<p class=soft>Left out: {escape(text)}</p>" for text in found.left_out)
    title = f"The run {short_name(found.runs[0].name)}" if len(found.runs) == 1 else "Cost and quality of the models"
    modules = [_modules(name, p) for name, p in found.profiles.items()]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>hubert-eff {escape(__version__)}. Counts are for 10 s of audio; times are estimated unless marked as measured.</p>",
        left_out,
        *(["<h2>Training</h2>", _panels(together, "all runs"), *map(_curves, curves)] if curves else []),
        *(["<h2>Cost</h2>", _found_table(found)] if found.profiles else []),
        *(["<h2>SUPERB</h2>", _superb(found)] if found.results else []),
        *(["<h2>Measured latency</h2>", _timings(found.timings)] if found.timings else []),
        *(["<h2>Where the time goes (measured)</h2>", _shares(found)] if found.shares else []),
        *(["<h2>Quality over cost</h2>", _charts(found, charts)] if charts else []),
        "<h2>The paper's models</h2>", _cost_table(rows, unfolded=not found.profiles),
        *(["<h2>Modules</h2>", *modules] if modules else []),
        f"<p class=soft>{' '.join(_missing(found))}</p>",
    ]  # fmt: skip
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'><title>hubert-eff report</title>"
        f"<style>{STYLE}</style>"
    )
    content = "\n".join(body)
    script = f"<script>{SCRIPT}</script>" if charts else ""
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{content}\n{script}</body></html>\n"


def _missing(found: Findings) -> list[str]:
    """What is missing in the given folders, and the command that makes it."""
    made = {
        "No model was found: a run's folder holds one in checkpoint_best.pt.": found.profiles,
        "No SUPERB results were found: hubert-eff superb run ... --out DIR makes them.": found.results,
        "No measured latency was found: hubert-eff bench ... --out DIR makes bench.json.": found.timings,
    }
    return [text for text, there in made.items() if not there]


def _number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def _foldable(text: str) -> str:
    """The name of a column, with line breaks allowed after parts of a path."""
    return escape(text).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _table(head: Sequence[str], groups: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A table of `groups`, each a name and its rows of cells, with a line above each."""
    lines = ["<div class=wide><table><thead><tr>", *(f"<th>{_foldable(h)}</th>" for h in head), "</tr></thead>"]
    for name, rows in groups:
        lines.append(f"<tbody><tr><th rowspan={len(rows)}>{escape(name)}</th>")
        lines.append("</tr><tr>".join("".join(f"<td>{escape(c)}</td>" for c in cells) for cells in rows))
        lines.append("</tr></tbody>")
    return "".join([*lines, "</table></div>"])


def _cost_table(rows: Sequence[dict[str, Any]], unfolded: bool) -> str:
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
    caption = "<p>Bit operations (BOP): 32 per float MAC, 1 per W1A1 MAC, G = 2^30.</p>"
    table = _table(("model", "", *table1.HEADINGS, "params"), groups)
    summary = "<summary>Table 1 of the paper, and our count of the same models</summary>"
    return f"<details{' open' * unfolded}>{summary}{caption}{table}<ol>{listed}</ol></details>"


def _found_table(found: Findings) -> str:
    groups = []
    runs = {file: name for name, file in found.checkpoints.items()}
    for name, p in found.profiles.items():
        figures = (p.storage_mb["paper"], p.storage_mb["file"], p.gflop, p.bop_nonq_g, p.bop_bq_g, 1e4 * p.est_time_s["paper"])
        shown = f"the model of {short_name(runs[name])}" if name in runs and len(found.runs) == 1 else short_name(name)
        groups.append((shown, ([*map(_number, figures), f"{p.params_without_labels:,}"],)))
    caption = "<p>Storage and time follow the paper's formulas; file MB is the size of the file that export writes.</p>"
    return caption + _table(("model", "storage MB", "file MB", *table1.HEADINGS[1:], "params"), groups)


def _superb(found: Findings) -> str:
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for result in found.results:
        models.setdefault(str(result["upstream"]), {})[result["task"]] = result
    head, rows, notes = narrow([(short_name(upstream), upstream, results) for upstream, results in models.items()])
    listed = "".join(f"<p class=soft>{escape(note)}</p>" for note in notes)
    return _table(head, [(name, [cells]) for name, *cells in rows]) + listed


def _curves(curves: Curves) -> str:
    return f"<p>{escape(str(curves.run))}</p>{_panels(curves.panels, curves.run.name)}"


def _panels(panels: Sequence[tuple[str, bytes]], name: str) -> str:
    images = "".join(f"<img alt='{escape(title)}: curves of {escape(name)}' src='{_image(svg)}'>" for title, svg in panels)
    return f"<div class=panels>{images}</div>" if panels else ""


def _image(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


PARETO = (
    "A stepped line joins the models that are best at their cost (the Pareto front): no other model is both as cheap and as good, or "
    "better. Every model off the line is beaten by one on it."
)
WITH_PAPER = "The paper's models carry its own figures (Tables 1 and 2, full LibriSpeech and SUPERB)."
ALONE = "Compare results on other data, or with fewer steps than SUPERB's, only with each other; the paper's models are left out."


def _charts(found: Findings, charts: Sequence[Chart]) -> str:
    tasks = "".join(f"<option value={task}>{escape(QUALITIES[task].title)}</option>" for task in dict.fromkeys(c.task for c in charts))
    costs = "".join(f"<option value={cost}>{escape(COSTS[cost])}</option>" for cost in dict.fromkeys(c.cost for c in charts))
    images = "".join(
        f"<figure id={c.task}-{c.cost} style='margin:12px 0'><img class=chart alt='{escape(QUALITIES[c.task].title)} over "
        f"{escape(COSTS[c.cost])}' src='{_image(c.svg)}'></figure>"
        for c in charts
    )
    notes = [PARETO, *([WITH_PAPER] if any(c.paper for c in charts) else []), *([ALONE] if not all(c.paper for c in charts) else [])]
    dropped = {c.task: c.dropped for c in charts if c.dropped}
    notes += [f"{task}: {number} results by other settings than SUPERB's are left out." for task, number in dropped.items()]
    return (
        f"<p>{escape(' '.join(notes))}</p>"
        f"<div class=controls><label>Quality <select id=task>{tasks}</select></label>"
        f"<label>Cost <select id=cost>{costs}</select></label></div>{images}"
    )


def _timings(timings: Sequence[Timing]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for t in timings:
        times = [_number(value) for value in (t.median_ms, t.p95_ms)]
        sizes = [_number(t.peak_memory_mb, ",.0f"), _number(t.file_mb)]
        row = [f"{t.seconds:g}", f"{t.batch}", *times, _number(t.rtf, ".5f"), *sizes, printable(t.kernel)]
        groups.setdefault(t.label, []).append(row)
    caption = "<p>One-bit models run from packed bits, unless they say simulated: computed with +-1 in floats, as in training.</p>"
    head = ("model", "audio s", "batch", "p50 ms", "p95 ms", "RTF", "peak MB", "file MB", "kernel")
    return caption + _table(head, [(short_name(name), rows) for name, rows in groups.items()])


def _shares(found: Findings) -> str:
    most: dict[str, float] = {"LayerNorm": math.inf}
    for row in (row for s in found.shares for row in s.blocks if row.time_percent >= LEAST):
        most[row.name] = max(most.get(row.name, 0.0), row.time_percent)
    names = sorted(most, key=lambda name: -most[name])[: MOST_COLORS - 1]
    colors = dict(zip(names, distinct_colors(len(names)), strict=True))  # one color per class on the whole page
    order = {name: place for place, name in enumerate(colors)}
    parts = []
    for s in found.shares:
        parts.append(f"<p><b>{escape(short_name(s.label))}</b>, {s.seconds:g} s: modules inside the blocks</p>")
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
        label = module.name.rpartition(".")[2] or short_name(name)
        share = f", {100 * module.macs / found.macs:.1f}% of MACs" if found.macs and module.macs else ""
        widths = "".join(f", {w} x {a} bit" for w, a in sorted(module.macs_by_bits, reverse=True))
        return f"<b>{escape(label)}</b> <span class=soft>{escape(module.kind)}: {module.params:,} parameters{share}{widths}</span>"

    def tree(module: ModuleCost, unfolded: str = "") -> str:
        below = [child for child in module.children if child.params or child.macs or child.element_ops]
        if not below:
            return f"<div class=leaf>{line(module)}</div>"
        return f"<details{unfolded}><summary>{line(module)}</summary>{''.join(map(tree, below))}</details>"

    return f"<div class=tree>{tree(found.modules, ' open')}</div>"
