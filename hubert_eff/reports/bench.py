"""Measurements as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from ..analysis.plots import distinct_colors, plot_text
from ..errors import missing_extra, printable
from ..profiling.latency import Share, Shares, Timing
from ..profiling.precision import FLOAT, PACKED, SIMULATED
from ..utils.files import replacing
from .tables import plain_table

FORMS = {  # notes for readers about the forms of one-bit models
    PACKED: "runs from bits, as an export does.",
    SIMULATED: "computes with one- and two-bit numbers as floats, as in training: not the time of an export.",
}
LEAST = 0.05  # groups with less than this share, in %, of parameters, operations and time are left out of the printed tables


def render(timings: Sequence[Timing], shares: Sequence[Shares], facts: dict[str, Any]) -> Group:
    """Tables of latencies, and of where the time goes for each model and length."""
    table = plain_table("model", "audio s", "batch", "p50 ms", "p95 ms", "RTF", "peak MB", "file MB", "x first", "p5 x", "p95 x", "kernel")
    for t in timings:
        peak = "-" if t.peak_memory_mb is None else f"{t.peak_memory_mb:,.0f}"
        cells = [f"{t.seconds:g}", f"{t.batch}", f"{t.median_ms:,.2f}", f"{t.p95_ms:,.2f}", f"{t.rtf:.5f}", peak]
        cells += ["-" if t.file_mb is None else f"{t.file_mb:,.2f}", *(f"{x:.3f}" for x in (t.ratio, t.ratio_p5, t.ratio_p95)), t.kernel]
        table.add_row(printable(t.label), *cells)
    rounds = timings[0].rounds
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    note = (
        f"Measured, {rounds} interleaved rounds after warm-up; {where}.\nRTF: time over the length of all audio. Peak: weights, and what "
        "the memory in use grows by during the call. File: tensors of\nits export. x first: time over the "
        "first model's, round by round: median, p5, p95. Kernel: what runs the linear layers."
    )
    forms = {t.form for t in timings} - {FLOAT}
    note += "".join(f"\n{form}: {FORMS[form]}" for form in sorted(forms))
    return Group(table, Text(note), *(_shares_table(s) for s in shares))


def _shares_table(shares: Shares) -> Group:
    table = plain_table("where the time goes", "params %", "FLOP %", "time %", "ms")
    for title, rows in (("parts of the model", shares.parts), ("modules inside the blocks", shares.blocks), ("operations", shares.kinds)):
        table.add_row(f"{title}:", end_section=False)
        for row in rows:
            if max(row.params_percent, row.flop_percent, row.time_percent) >= LEAST:
                params = "" if title == "operations" else f"{row.params_percent:.1f}"
                table.add_row("  " + row.name, params, f"{row.flop_percent:.1f}", f"{row.time_percent:.1f}", f"{row.ms:,.2f}")
    heading = (
        f"\n{printable(shares.label)}, {shares.seconds:g} s, one recording, measured operation by operation in wall time. Each row has the "
        "time of its own\noperations, without those of its submodules. Parameters of submodules that run nothing themselves belong to "
        "the row above.\nFLOP: 2 per MAC and 1 per element operation."
    )
    return Group(Text(heading), table)


def draw(timings: Sequence[Timing], shares: Sequence[Shares], folder: Path) -> list[Path]:
    """Draw latency over the length of audio, and shares of the blocks' time, as bench.svg and bench.png. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "plot", "drawing bench.svg") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    models = list(dict.fromkeys(t.label for t in timings))
    for name, color in zip(models, distinct_colors(len(models)), strict=True):
        line = [t for t in timings if t.label == name and t.batch == timings[0].batch]
        errors = [[t.median_ms - t.p5_ms for t in line], [t.p95_ms - t.median_ms for t in line]]
        seconds, medians = [t.seconds for t in line], [t.median_ms for t in line]
        left.errorbar(seconds, medians, yerr=errors, marker="o", capsize=2, label=plot_text(name), color=color)
    left.set(xscale="log", yscale="log", xlabel="audio, s", ylabel="latency, ms (median, p5 to p95)", title="Measured latency")
    lengths = sorted({t.seconds for t in timings})
    left.set_xticks(lengths, [f"{length:g}" for length in lengths])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    names = list(dict.fromkeys(row.name for s in shares for row in s.blocks if row.time_percent >= 1.0))
    colors = dict(zip(names, distinct_colors(len(names)), strict=True)) | {"rest": "lightgray"}
    bars = [(f"{plot_text(s.label)}\n{s.seconds:g} s: {what}", _bar(s.blocks, key, names)) for s in shares for what, key in COLUMNS]
    for position, (_, parts) in enumerate(bars):
        start = 0.0
        for name, value in parts.items():
            right.barh(position, value, left=start, color=colors[name], label=plot_text(name))
            start += value
    right.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="%", title="Shares inside the blocks", xlim=(0, 100))
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    right.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    paths = [folder / "bench.svg", folder / "bench.png"]
    for path in paths:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130)
    return paths


COLUMNS = (("parameters", "params_percent"), ("FLOP", "flop_percent"), ("time", "time_percent"))


def _bar(rows: Sequence[Share], key: str, names: Sequence[str]) -> dict[str, float]:
    values = {name: sum(getattr(row, key) for row in rows if row.name == name) for name in names}
    return values | {"rest": max(0.0, 100.0 - sum(values.values()))}
