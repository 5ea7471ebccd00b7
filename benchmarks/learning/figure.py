"""Cost against quality, float and at one bit: the models of table2_mini.py, and in a second panel the paper's, by the same two figures.

    python benchmarks/learning/figure.py docs/results/table2_mini.json --out docs/results

Cost is bit operations of 10 s as the paper's Table 1 counts them, quality the mean over the same tasks of accuracy, or 100 minus the error
rate, in %. A line joins a model's two forms. Writes cost-quality-light.svg and cost-quality-dark.svg, 800 px wide, for the two themes of a
page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError
from hubert_eff.reports.table1 import PAPER_TABLE as COSTS
from hubert_eff.reports.table2 import METRICS, PAPER_TABLE
from hubert_eff.utils.files import replacing

WIDTH, HEIGHT = 800, 400  # px of 1/100 inch
THEMES = {  # text, grid, background, attention only, with convolution
    "light": ("#1f2328", "#d1d9e0", "#ffffff", "#0969da", "#bc4c00"),
    "dark": ("#f0f6fc", "#3d444d", "#0d1117", "#4493f8", "#f0883e"),
}
GAP = 0.052  # between two labels, in heights of a panel


@dataclass(frozen=True)
class Line:
    """A model: its name, its kind, (cost, quality) of its float and its one-bit form."""

    name: str
    attention_only: bool
    whole: tuple[float, float]
    bits: tuple[float, float]


def ours(values: dict[str, Any]) -> list[Line]:
    """The models of a result of table2_mini.py."""
    return [
        Line(
            name, model["attention_only"],
            (model["bop_g"]["float"], values["table"]["float"][name]["mean"]["value"]),
            (model["bop_g"]["w1a1"], values["table"]["w1a1"][name]["mean"]["value"]),
        )
        for name, model in values["models"].items()
    ]  # fmt: skip


def theirs(values: dict[str, Any]) -> list[Line]:
    """The paper's rows of the same models, on the same tasks."""
    costs = {row.title: row.bop_nonq_g + (row.bop_bq_g or 0.0) for row in COSTS}
    tasks = values["settings"]["tasks"]

    def quality(row: str) -> float:
        points = [PAPER_TABLE[row][list(METRICS).index(task)] * 100 / METRICS[task].scale for task in tasks]
        return statistics.mean(p if METRICS[task].more_is_better else 100 - p for p, task in zip(points, tasks, strict=True))

    lines = []
    for model in values["models"].values():
        row = model["row"]
        bits = f"BQ-{row.removesuffix(' Trans')}"
        lines.append(Line(row, model["attention_only"], (costs[row], quality(row)), (costs[bits], quality(bits))))
    return lines


def _panel(axes: Any, lines: list[Line], title: str, theme: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    text, grid, background, *colors = THEMES[theme]
    for line in lines:
        color = colors[0] if line.attention_only else colors[1]
        (x0, y0), (x1, y1) = line.whole, line.bits
        axes.plot([x0, x1], [y0, y1], color=color, lw=1.2, alpha=0.6, zorder=2)
        axes.scatter([x0], [y0], s=42, color=background, edgecolor=color, linewidth=1.6, zorder=3)
        axes.scatter([x1], [y1], s=42, color=color, zorder=3)
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(title, color=text, fontsize=11, loc="left")
    axes.set_facecolor(background)
    axes.grid(color=grid, lw=0.6)
    axes.tick_params(colors=text, labelsize=9, which="both")
    for spine in axes.spines.values():
        spine.set_color(grid)
    axes.margins(x=0.12, y=0.1)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.62)  # room for names
    low, high = axes.get_ylim()
    places: list[float] = []
    for line in sorted(lines, key=lambda line: -line.whole[1]):  # from above, each name at least a line below the one before
        place = min([line.whole[1], *(p - GAP * (high - low) for p in places[-1:])])
        places.append(place)
        color = colors[0] if line.attention_only else colors[1]
        axes.annotate(line.name, line.whole, (max(x.whole[0] for x in lines) * (right / left) ** 0.06, place), color=color, fontsize=9,
                      va="center", arrowprops={"arrowstyle": "-", "color": grid, "lw": 0.8, "shrinkA": 0, "shrinkB": 4})  # fmt: skip


def draw(values: dict[str, Any], theme: str) -> Any:
    """The figure in a theme. Needs matplotlib."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    text, _, background, *colors = THEMES[theme]
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor=background)
    FigureCanvasSVG(figure)
    left, right = figure.add_axes((0.075, 0.2, 0.405, 0.69)), figure.add_axes((0.565, 0.2, 0.405, 0.69))
    _panel(left, ours(values), "Measured here, on generated speech", theme)
    _panel(right, theirs(values), "The paper, on SUPERB", theme)
    tasks = ", ".join(task.upper() for task in values["settings"]["tasks"])
    left.set_ylabel(f"mean of {tasks}, %", color=text, fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("bit operations of 10 s, 2$^{30}$", color=text, fontsize=9)
    marks = [
        Line2D([], [], marker="o", ls="", color=text, markerfacecolor=background, label="float"),
        Line2D([], [], marker="o", ls="", color=text, label="one bit (W1A1)"),
        Line2D([], [], color=colors[0], label="attention only"),
        Line2D([], [], color=colors[1], label="with convolution"),
    ]
    figure.legend(handles=marks, loc="lower center", ncols=4, frameon=False, fontsize=9, labelcolor=text)
    return figure


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("values", type=Path, metavar="FILE", help="table2_mini.json")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two pictures")
    args = options.parse_args()
    try:
        values = json.loads(args.values.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "table" not in values:
            raise UserError(f"{args.values} holds no table of table2_mini.py: run it until one model has finished")
        for theme in THEMES:
            with replacing(args.out / f"cost-quality-{theme}.svg") as file:
                import matplotlib

                with matplotlib.rc_context({"svg.hashsalt": "hubert-eff"}):  # the same figures give the same file
                    draw(values, theme).savefig(file, format="svg", metadata={"Date": None})
    except (OSError, ValueError) as error:
        print(f"figure.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
