"""Layer trends as pictures: one row per block, means on the left and variances on the right, over updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import missing_extra
from ..utils.files import replacing, writable
from .layer_trends import Record, by_block, place
from .plots import LINES, distinct_colors, plot_text


def draw(runs: Mapping[str, Sequence[Record]], path: Path, title: str, most: int = 8) -> None:
    """Write the picture of one run, or of several overlaid, to `path` (.png or .svg). runs: records by the run's name.

    A single run has one color per layer; several runs have one color each, and one kind of line per layer. If there are more than `most`
    blocks, some are shown, evenly spread, including the last. Raises `UserError` if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "a plot") from error
    writable(path.parent)
    records = [record for run in runs.values() for record in run]
    blocks = by_block(list(dict.fromkeys(name for record in records for name in record.layers)))
    numbered = [name for name in blocks if name.startswith("block ")]
    if len(numbered) > most:
        numbered = [numbered[round(i * (len(numbered) - 1) / (most - 1))] for i in range(most)]
    shown = [*(name for name in blocks if not name.startswith("block ")), *numbered]
    figure = Figure(figsize=(13, 0.8 + 3.0 * len(shown)), layout="constrained")
    figure.suptitle(plot_text(title))
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex=True)
    for (left, right), block in zip(axes, shown, strict=True):
        colors = distinct_colors(max(len(blocks[block]), len(runs)))
        for number, (name, run) in enumerate(runs.items()):
            for index, layer in enumerate(blocks[block]):
                if not any(layer in record.layers for record in run):
                    continue
                label = place(layer)[1] if len(runs) == 1 else f"{name}: {place(layer)[1]}"
                style = LINES[(index // 10 if len(runs) == 1 else index) % len(LINES)]
                _lines(left, right, run, layer, label=plot_text(label), color=colors[index if len(runs) == 1 else number], linestyle=style)
            lost = [r.update for r in run for layer in blocks[block] if not math.isfinite(r.layers.get(layer, (0.0, 0.0, 0.0))[1])]
            if lost:
                color = "red" if len(runs) == 1 else colors[number]
                for axis in (left, right):
                    axis.axvline(min(lost), color=color, linestyle=":")
                place_of = right.get_xaxis_transform()
                right.text(min(lost), 0.98, " not finite from here on", color=color, fontsize=8, va="top", transform=place_of)
        for axis in (left, right):
            axis.grid(alpha=0.3)
        wide = any(abs(r.layers.get(name, (0.0,))[0]) > 10 for r in records for name in blocks[block])
        left.set(ylabel=plot_text(f"{block}: mean"), yscale="symlog" if wide else "linear")
        right.set(ylabel="variance", yscale="log")
        right.legend(frameon=False, fontsize=7 if len(right.lines) < 30 else 4, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)


def _lines(left: Any, right: Any, run: Sequence[Record], layer: str, **style: str) -> None:
    """Draw mean and variance of a layer over updates."""
    updates = [record.update for record in run]
    stats = [record.layers.get(layer, (math.nan, math.nan, math.nan)) for record in run]
    marker = "." if len(updates) < 30 else ""
    left.plot(updates, [mean for mean, _, _ in stats], marker=marker, **style)
    right.plot(updates, [variance if variance > 0 else math.nan for _, variance, _ in stats], marker=marker, **style)
