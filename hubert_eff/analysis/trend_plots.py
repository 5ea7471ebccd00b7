"""Layer trends as pictures: one row per block, means on the left and variances on the right, over updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import missing_extra
from ..utils.files import replacing, writable
from .layer_trends import Record, by_block, place
from .plots import LINES, distinct_colors, plot_text


def draw(records: Sequence[Record], path: Path, title: str, most: int = 8) -> None:
    """Write the picture to `path` (.png or .svg). Of more than `most` blocks some are shown, evenly spread, the last among them.

    Raises `UserError` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "a plot") from error
    writable(path.parent)
    layers = list(dict.fromkeys(name for record in records for name in record.layers))
    blocks = by_block(layers)
    numbered = [name for name in blocks if name.startswith("block ")]
    if len(numbered) > most:
        numbered = [numbered[round(i * (len(numbered) - 1) / (most - 1))] for i in range(most)]
    shown = [*(name for name in blocks if not name.startswith("block ")), *numbered]
    figure = Figure(figsize=(13, 0.8 + 3.0 * len(shown)), layout="constrained")
    figure.suptitle(plot_text(title))
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex=True)
    updates = [record.update for record in records]
    for (left, right), block in zip(axes, shown, strict=True):
        colors = distinct_colors(len(blocks[block]))
        for index, layer in enumerate(blocks[block]):
            stats = [record.layers.get(layer, (math.nan, math.nan, math.nan)) for record in records]
            style = {"label": plot_text(place(layer)[1]), "color": colors[index], "linestyle": LINES[index // 10 % len(LINES)]}
            style["marker"] = "." if len(updates) < 30 else ""
            left.plot(updates, [mean for mean, _, _ in stats], **style)
            right.plot(updates, [variance if variance > 0 else math.nan for _, variance, _ in stats], **style)
        lost = sorted({r.update for r in records for name in blocks[block] if not math.isfinite(r.layers.get(name, (0.0, 0.0, 0.0))[1])})
        for axis in (left, right):
            axis.grid(alpha=0.3)
            if lost:
                axis.axvline(lost[0], color="red", linestyle=":")
        if lost:
            right.text(lost[0], 0.98, " not finite from here on", color="red", fontsize=8, va="top", transform=right.get_xaxis_transform())
        wide = any(abs(r.layers.get(name, (0.0,))[0]) > 10 for r in records for name in blocks[block])
        left.set(ylabel=plot_text(f"{block}: mean"), yscale="symlog" if wide else "linear")
        right.set(ylabel="variance", yscale="log")
        right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)
