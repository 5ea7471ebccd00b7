"""Draws quality over cost, with the best points and labels that do not overlap."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.plots import plot_text
from ..errors import missing_extra

SIZE = (4.8, 4.0)  # inches; on a phone, letters still have about their natural size
FRAME = (0.14, 0.125, 0.84, 0.76)  # of the axes: left, bottom, width, height in shares of the figure
LINE = 1.15  # height of a label, in its own heights


@dataclass(frozen=True)
class Point:
    """One model: its cost, its quality, and the source of these figures."""

    label: str
    cost: float
    quality: float
    ours: bool


def best(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """The points that no other point equals or beats in both cost and quality, cheapest first."""
    sign = 1.0 if more_is_better else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def draw(points: Sequence[Point], cost: str, quality: str, more_is_better: bool) -> Any:
    """A matplotlib figure: cost on a logarithmic x axis, the better quality on top; a stepped line joins the best models of the paper, and
    one those found here. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "plot", "the report's figures") from error
    figure = Figure(figsize=SIZE)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(FRAME)  # searching for a layout takes longer than drawing
    for ours, color, line, name in ((False, "#8a8a8a", "#9db4d0", "the paper's models"), (True, "#c2410c", "#f0c3a8", "models found")):
        chosen = [p for p in points if p.ours is ours]
        if chosen:
            axes.scatter([p.cost for p in chosen], [p.quality for p in chosen], s=22, color=color, label=name, zorder=3)
            front = best(chosen, more_is_better)
            label = f"best of {'these' if ours else 'those'} at their cost"
            axes.step([p.cost for p in front], [p.quality for p in front], where="post", color=line, lw=1.2, zorder=1, label=label)
    axes.set(xscale="log", xlabel=cost, ylabel=quality + (", higher is better" if more_is_better else ", lower is better"))
    axes.margins(x=0.28, y=0.12)
    if len({p.cost for p in points}) == 1:  # no range of its own: a factor of three on both sides
        axes.set_xlim(points[0].cost / 3, 3 * points[0].cost)
    left, right = axes.get_xlim()
    decades = math.log10(right / left)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    if not more_is_better:
        axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    _place_labels(figure, axes, points)
    return figure


def _place_labels(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Place a label beside, above or below each point so that it overlaps no label or point; a thin line leads to a moved label."""
    renderer = figure.canvas.get_renderer()
    axes.autoscale(False)
    frame, to_data = axes.get_window_extent(), axes.transData.inverted().transform
    dots = [axes.transData.transform((p.cost, p.quality)) for p in points]
    radius = 5.0 * figure.dpi / 100
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in dots]
    for point, (x, y) in sorted(zip(points, dots, strict=True), key=lambda item: -item[1][1]):
        text = axes.text(point.cost, point.quality, plot_text(point.label), fontsize=7.5, va="center", zorder=2.5)
        box = text.get_window_extent(renderer)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})  # the line of the best passes behind
        height = LINE * box.height
        middle = max(frame.x0, min(x - box.width / 2, frame.x1 - box.width))  # a long name: above or below its point
        for step in range(6 * len(points) + 6):
            shift = ((step // 3 + 1) // 2) * height * (1 if step // 3 % 2 else -1)
            left = (x + 1.6 * radius, x - 1.6 * radius - box.width, middle)[step % 3]
            place = (left, y + shift - height / 2, left + box.width, y + shift + height / 2)
            inside = frame.x0 <= place[0] and place[2] <= frame.x1 and frame.y0 <= place[1] and place[3] <= frame.y1
            if inside and not any(_overlap(place, other) for other in taken):
                break
        taken.append(place)
        text.set_position(to_data((place[0], y + shift)))
        if abs(shift) > height / 2:
            end = to_data((min(max(x, place[0]), place[2]), y + shift))
            axes.plot([point.cost, end[0]], [point.quality, end[1]], color="#b0b0b0", lw=0.6, zorder=2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def as_bytes(figure: Any, kind: str) -> bytes:
    """The figure as svg, or as png about 1,000 pixels wide."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script
        dpi = figure.dpi if kind == "svg" else 1000 / figure.get_figwidth()
        with rc_context({"svg.fonttype": "none"}):  # letters as text take a fifth of the size of their outlines
            figure.savefig(stream, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()
