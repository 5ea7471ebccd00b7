"""Training curves out of fairseq's logs: loss, accuracy beside the share of the most frequent label, perplexity, speed, memory."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_extra

LOG = "hydra_train.log"  # what hydra writes into a run's save_dir
Figures = dict[str, float]

_RECORD = re.compile(r"\{.*\}$")
_INNER = re.compile(r"(\w+)=([-+.\w]+)")
_VALID = re.compile(r"valid on '[^']*' subset \| (.*)$")

# (title, logarithmic, lines: key, split, label); a line whose key was not logged is left out, and so is a panel without lines
PANELS: tuple[tuple[str, bool, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss, bits", False, (("loss", "train", "train"), ("loss", "valid", "valid"))),
    (
        "masked accuracy", False,
        (("correct_m_0", "train", "train"), ("correct_m_0", "valid", "valid"), ("majority_m_0", "valid", "most frequent label, valid")),
    ),
    (
        "perplexity, valid", False,
        (("code_ppl_0", "valid", "of the predicted classes"), ("label_ppl_0", "valid", "of the labels")),
    ),
    ("errors of greedy CTC, valid, %", False, (("wer", "valid", "words"), ("uer", "valid", "letters"))),
    ("accuracy of the decoder", False, (("accuracy", "train", "train"), ("accuracy", "valid", "valid"))),
    ("norm of the gradient", True, (("gnorm", "train", "train"),)),
    ("learning rate", False, (("lr", "train", "train"),)),
    ("seconds of audio per second", False, (("audio_per_s", "train", "train"),)),
    ("memory, GB", False, (("mem_gb", "train", "most so far"),)),
)  # fmt: skip


@dataclass
class TrainingLog:
    """What a run logged, by update, each record with its `num_updates`: at every log interval, and at every validation."""

    name: str
    train: list[Figures] = field(default_factory=list)
    valid: list[Figures] = field(default_factory=list)

    @property
    def best(self) -> Figures:
        """The validation with the lowest word error rate, or, where there is none, the lowest loss: that of `checkpoint_best.pt`.

        Raises `UserError` where there has been no validation yet.
        """
        if not self.valid:
            raise UserError(f"{self.name} holds no validation yet")
        return min(self.valid, key=lambda record: (record.get("wer", 0.0), record["loss"]))

    def __str__(self) -> str:
        if not self.valid:
            return f"{self.name}: {self.train[-1]['num_updates']:.0f} updates, no validation yet"
        best, last = self.best, (self.train or self.valid)[-1]["num_updates"]
        text = f"{self.name}: {last:.0f} updates; best validation at {best['num_updates']:.0f}, loss {best['loss']:.3f}"
        if "correct_m_0" in best and "majority_m_0" in best:
            text += f", masked accuracy {best['correct_m_0']:.1%} (most frequent label: {best['majority_m_0']:.1%})"
        return text + (f", WER {best['wer']:.1f}%" if "wer" in best else "")


def read_log(path: Path, name: str | None = None) -> TrainingLog:
    """Read a log of `common.log_format` simple or json. Of updates that a run repeated after a restart the latest record counts.

    Raises `UserError` for a file that cannot be read, or that holds no record of training.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found: dict[str, dict[float, Figures]] = {"train": {}, "valid": {}}
    for line in lines:
        kind, record = _record(line)
        if "num_updates" in record and "loss" in record:
            found[kind][record["num_updates"]] = record
    if not any(found.values()):
        raise UserError(f"{path} holds no record of training yet: fairseq writes one every common.log_interval updates")
    train, valid = ([records[update] for update in sorted(records)] for records in found.values())
    return TrainingLog(name or str(path), train, valid)


def _record(line: str) -> tuple[str, Figures]:
    """Which split a line of the log speaks of, and its figures; none where it is no such line."""
    if "valid" in line and (match := _VALID.search(line)):
        pairs = [tuple(part.split(" ", 1)) for part in match[1].split(" | ")]
        return "valid", _numbers(pair for pair in pairs if len(pair) == 2)
    if "num_updates" not in line:
        return "train", {}
    if match := _RECORD.search(line):
        try:
            entry = json.loads(match[0])
        except ValueError:
            return "train", {}
        for prefix in ("valid_", "train_"):
            if f"{prefix}num_updates" in entry:
                stripped = ((key.removeprefix(prefix), value) for key, value in entry.items())
                return "valid", _numbers(stripped) if prefix == "valid_" else {}  # a whole epoch's means are no point of the curve
        return "train", _numbers(entry.items())
    return "train", _numbers(_INNER.findall(line))


def _numbers(pairs: Any) -> Figures:
    found = {}
    for key, value in pairs:
        try:
            found[str(key)] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def draw_curves(runs: Sequence[TrainingLog]) -> Any:
    """A matplotlib figure of one or more runs, a panel per figure that they logged. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "training curves") from error
    logged = {(key, split) for run in runs for split in ("train", "valid") for record in getattr(run, split) for key in record}
    panels = [(title, log, [line for line in lines if line[:2] in logged]) for title, log, lines in PANELS]
    panels = [panel for panel in panels if panel[2]]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 0.4 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for axis, (title, logarithmic, lines) in zip(axes, panels, strict=False):
        for number, run in enumerate(runs):
            for style, (key, split, label) in enumerate(lines):
                points = [(record["num_updates"], record[key]) for record in getattr(run, split) if key in record]
                shown = f"{run.name}, {label}" if len(runs) > 1 else label
                axis.plot(
                    *zip(*points, strict=True) if points else ((), ()), label=shown, linestyle=("-", "--", ":")[style],
                    color=f"C{number if len(runs) > 1 else style}", marker="." if len(points) < 30 else "",
                )  # fmt: skip
        axis.set(title=title, xlabel="updates", yscale="log" if logarithmic else "linear")
        axis.grid(alpha=0.3)
        if len(lines) > 1 or len(runs) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure
