"""Reads training curves from fairseq's logs: loss, accuracy beside the share of the most frequent label, perplexity, speed, memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..analysis.plots import LINES, distinct_colors, plot_text
from ..errors import UserError, missing_extra, printable

LOG = "hydra_train.log"  # file that hydra writes into a run's save_dir
Figures = dict[str, float]

_JSON = re.compile(r"\{.*\}$")
_INNER = re.compile(r"(\w+)=([-+.\w]+)")
_MEANS = re.compile(r"epoch \d+ \| (?:valid on '(?P<subset>[^']*)' subset \| )?(?P<pairs>.*\bnum_updates \d+.*)$")
_LOADED = re.compile(r"Loaded checkpoint .* @ (\d+) updates\)")
_FRESH = "No existing checkpoint found"
MOST_UPDATES = 10**12  # a larger number is not a number of updates
LONGEST = 20_000  # characters of a line of figures


@dataclass(frozen=True)
class Panel:
    """One picture of curves. `lines`: key, split, label. Lines without logged values are left out, and so are panels without lines."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    scale: float = 1.0  # from the log's unit to the title's
    logarithmic: bool = False
    from_zero: bool = True  # of the y axis


PANELS = (
    Panel("loss, bits per frame", (("loss", "train", "train"), ("loss", "valid", "valid")), from_zero=False),
    Panel(
        "masked accuracy, %",
        (("correct_m_0", "train", "train"), ("correct_m_0", "valid", "valid"), ("majority_m_0", "valid", "most frequent label, valid")),
        100.0,
    ),
    Panel(
        "perplexity (classes), valid",
        (("code_ppl_0", "valid", "of the predicted classes"), ("label_ppl_0", "valid", "of the labels")),
    ),
    Panel("errors of the texts, valid, %", (("wer", "valid", "words"), ("cer", "valid", "characters"))),
    Panel("accuracy of the decoder, %", (("accuracy", "train", "train"), ("accuracy", "valid", "valid")), 100.0),
    Panel("norm of the gradient", (("gnorm", "train", "train"),), logarithmic=True),
    Panel("learning rate", (("lr", "train", "train"),)),
    Panel("speed, seconds of audio per second", (("audio_per_s", "train", "train"),)),
    Panel("memory, GB", (("mem_gb", "train", "peak so far"),)),
)
NO_BETTER = "no better than always predicting the most frequent label"


@dataclass
class TrainingLog:
    """The records of a run by update, each with its `num_updates`: one per log interval and per validation.

    `updates`: the number of updates, as far as the log tells. If a log holds several or resumed runs, only records that led to the last
    state count: a new run drops all records before it, and a resumed run those after its checkpoint.
    """

    name: str
    train: list[Figures] = field(default_factory=list)
    valid: list[Figures] = field(default_factory=list)
    updates: int = 0

    @property
    def best(self) -> Figures:
        """The validation with the lowest word error rate or, without one, the lowest loss: that of `checkpoint_best.pt`.

        Raises `UserError` if there has been no validation yet.
        """
        if not self.valid:
            raise UserError(f"{self.name} holds no validation yet")
        return min(self.valid, key=lambda record: (_sortable(record.get("wer", 0.0)), _sortable(record["loss"])))

    def __str__(self) -> str:
        text = f"{printable(self.name)}: {self.updates} updates"
        if not self.valid:
            return f"{text}, no validation yet"
        best = self.best
        text += f"; best validation at {best['num_updates']:.0f}, loss {best['loss']:.3f}"
        if "correct_m_0" in best and "majority_m_0" in best:
            text += f", masked accuracy {best['correct_m_0']:.1%} (most frequent label: {best['majority_m_0']:.1%})"
            if best["correct_m_0"] <= best["majority_m_0"]:
                text += f", {NO_BETTER}"
        return text + (f", WER {best['wer']:.1f}%" if "wer" in best else "")


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def read_log(path: Path, name: str | None = None) -> TrainingLog:
    """Read a log of `common.log_format` simple, tqdm or json. The first of several validation sets counts, as for `checkpoint_best.pt`.

    Raises `UserError` for a file that cannot be read, or that holds no record of training.
    """
    reader = _Reader()
    try:
        if not path.is_file():
            raise UserError(
                f"{path} cannot be read: it is not a regular file" if path.exists() else f"{path} cannot be read: there is none"
            )
        with path.open(encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(LONGEST):
                reader.read(line.rstrip("\n"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    train, valid = ([found[update] for update in sorted(found)] for found in (reader.train, reader.valid))
    if not train and not valid:
        raise UserError(f"{path} holds no record of training yet: fairseq writes one every common.log_interval updates")
    return TrainingLog(name or str(path), train, valid, int(reader.updates))


class _Reader:
    """Reads lines one by one and keeps the state."""

    def __init__(self) -> None:
        self.train: dict[float, Figures] = {}
        self.valid: dict[float, Figures] = {}
        self.updates = 0.0
        self.subset: str | None = None  # the first validation set

    def read(self, line: str) -> None:
        """Read one line."""
        if match := _LOADED.search(line):
            self._go_back(float(match[1]))
        elif _FRESH in line:
            self._go_back(-1.0)
        elif "num_updates" in line:
            self._take(*_record(line))

    def _take(self, kind: str, record: Figures) -> None:
        update = record.get("num_updates", math.nan)
        if not 0 <= update < MOST_UPDATES or "loss" not in record:
            return
        if update < self.updates:  # a restart in a log without lines about checkpoints
            self._go_back(update)
        self.updates = update
        if kind == "train":
            self.train[update] = record
        elif kind != "epoch":  # the means of a whole epoch are not a point of the curve
            self.subset = kind if self.subset is None else self.subset
            if kind == self.subset:
                self.valid[update] = record

    def _go_back(self, update: float) -> None:
        self.updates = min(self.updates, max(update, 0.0))
        for found in (self.train, self.valid):
            for later in [known for known in found if known > update]:
                del found[later]


def _record(line: str) -> tuple[str, Figures]:
    """The subject of a line - train, epoch, or the name of a validation set behind a colon - and its figures."""
    if match := _MEANS.search(line):
        pairs = (part.split(" ", 1) for part in match["pairs"].split(" | "))
        return "epoch" if match["subset"] is None else f":{match['subset']}", _numbers(pair for pair in pairs if len(pair) == 2)
    if not (match := _JSON.search(line)):
        return "train", _numbers(_INNER.findall(line))
    try:
        entry = json.loads(match[0])
    except (ValueError, RecursionError):
        return "train", {}
    for key in entry:
        if key.endswith("_num_updates"):
            prefix = key.removesuffix("num_updates")
            record = _numbers((name.removeprefix(prefix), value) for name, value in entry.items())
            return "epoch" if prefix == "train_" else f":{prefix[:-1]}", record
    return "train", _numbers(entry.items())


def _numbers(pairs: Any) -> Figures:
    found = {}
    for key, value in pairs:
        try:
            found[str(key)] = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return found


def draw_curves(runs: Sequence[TrainingLog]) -> Any:
    """A matplotlib figure of one or more runs, with a panel for each logged figure. Raises `UserError` without matplotlib."""
    panels = _logged(runs)
    rows = -(-len(panels) // 3)
    height = 0.4 + 3.2 * rows
    figure = _figure(13, height)
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    figure.subplots_adjust(left=0.045, right=0.985, bottom=0.5 / height, top=1 - 0.35 / height, wspace=0.2, hspace=0.38)  # at once
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, runs)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def draw_panels(runs: Sequence[TrainingLog]) -> list[tuple[str, Any]]:
    """The same panels as separate figures with titles, for narrow pages. Raises `UserError` as `draw_curves` does."""
    found = []
    for panel in _logged(runs):
        figure = _figure(4.3, 3.1)
        _draw(figure.add_axes((0.135, 0.15, 0.84, 0.75)), panel, runs)
        found.append((panel.title, figure))
    return found


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "training curves") from error
    return Figure(figsize=(width, height))


def _logged(runs: Sequence[TrainingLog]) -> list[Panel]:
    """The panels with logged lines, and only those lines."""
    logged = {(key, split) for run in runs for split in ("train", "valid") for record in getattr(run, split) for key in record}
    panels = (replace(panel, lines=tuple(line for line in panel.lines if line[:2] in logged)) for panel in PANELS)
    return [panel for panel in panels if panel.lines]


def _draw(axis: Any, panel: Panel, runs: Sequence[TrainingLog]) -> None:
    """Draw the lines of a panel; all panels share the x axis, from 0 to the last update of all runs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    several = len(runs) > 1
    colors = distinct_colors(max(len(runs), len(LINES)))
    for number, run in enumerate(runs):
        for style, (key, split, label) in enumerate(panel.lines):
            points = [(record["num_updates"], panel.scale * record[key]) for record in getattr(run, split) if key in record]
            shown = plot_text(f"{run.name}, {label}") if several else label
            axis.plot(
                *zip(*points, strict=True) if points else ((), ()), label=shown, linestyle=LINES[style],
                color=colors[number if several else style], marker="." if len(points) < 30 else "", markersize=9 if len(points) == 1 else 6,
            )  # fmt: skip
    values = [value for line in axis.lines for value in line.get_ydata() if math.isfinite(value)]
    logarithmic = panel.logarithmic and any(value > 0 for value in values)
    axis.set(title=panel.title, xlabel="updates", yscale="log" if logarithmic else "linear")
    last = max((float(record["num_updates"]) for run in runs for record in (*run.train, *run.valid)), default=0.0)
    axis.set_xlim(0, 1.03 * max(last, 1.0))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:g} M"))
    if logarithmic:
        positive = [value for value in values if value > 0]
        low, high = min(positive) / 2, max(positive) * 2
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.ticklabel_format(axis="y", scilimits=(-2, 5), useOffset=False)  # numbers stay narrow
        if panel.from_zero and values and min(values) >= 0:
            axis.set_ylim(0, 1.1 * max(values) or 1.0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
