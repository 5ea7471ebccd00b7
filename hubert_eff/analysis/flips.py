"""The direction of time over many utterances and over the checkpoints of a run."""

# S letters, T frames of 20 ms

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.load import open_fairseq
from ..errors import UserError
from ..recognition.model import Recognizer
from .alignment import CLEAR, cross_attention, direction, gradients

FEWEST = 3  # fewer letters of an utterance do not show which way time runs


@dataclass(frozen=True)
class Flips:
    """The results of `direction` for several utterances.

    Attributes:
        utterances: the number of utterances.
        turned: the number of utterances in which the encoder as a whole reverses time.
        in_order: the number of utterances in which it does not.
        unclear: the number of utterances in which neither is clear.
        reversing: block -> number of utterances in which it reverses time.
        places: place -> mean correlation between the order of letters and the places of their gradients.
        cross_attention: decoder block -> mean correlation between the order of letters and the frames that it attends to.
    """

    utterances: int
    turned: int
    in_order: int
    unclear: int
    reversing: dict[int, int]
    places: dict[str, float]
    cross_attention: dict[str, float]

    @property
    def verdict(self) -> str:
        """The majority: "reversed", "in order", or "unclear"."""
        if self.unclear * 2 >= self.utterances:
            return "unclear"
        return "reversed" if self.turned > self.in_order else "in order"

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def over_utterances(model: Recognizer, utterances: Iterable[tuple[Tensor, Sequence[int]]], head: str) -> Flips:
    """Find the direction of time in recordings (1, S') with their letters; `model` is in eval mode, `head` as in `gradients`.

    Utterances of fewer than `FEWEST` letters are skipped. Raises `UserError` if all are skipped.
    """
    found = []
    for wav, labels in utterances:
        if len(labels) < FEWEST:
            continue
        crossed = cross_attention(model, wav, labels) if model.decoder is not None else ()
        found.append(direction(gradients(model, wav, labels, head), crossed))
    if not found:
        raise UserError(f"no utterance has {FEWEST} letters or more, and the order of fewer does not show which way time runs")
    blocks = Counter(block for way in found for block in way.reversing)

    def mean(key: str) -> dict[str, float]:
        rows = [getattr(way, key) for way in found]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    turned = sum(way.turned is True for way in found)
    in_order = sum(way.turned is False for way in found)
    return Flips(
        len(found), turned, in_order, len(found) - turned - in_order, dict(sorted(blocks.items())), mean("places"), mean("cross_attention")
    )


def checkpoints_of(path: Path) -> list[tuple[int, Path]]:
    """(updates, file) of a checkpoint, or of all in a folder in order of updates, one per number of updates. Raises `UserError`."""
    if not path.is_dir():
        return [(updates_of(path), path)]
    found: dict[int, Path] = {}
    for file in sorted(path.glob("*.pt")):
        found.setdefault(updates_of(file), file)
    if not found:
        raise UserError(f"{path} holds no checkpoint (*.pt): train with checkpoint.save_interval_updates and keep_interval_updates=-1")
    return sorted(found.items())


def updates_of(file: Path) -> int:
    """Number of updates of a checkpoint; 0 if it does not say."""
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    with open_fairseq(file) as opened:
        history = opened.content.get("optimizer_history") or [{}]
        return int(history[-1].get("num_updates", 0))


def table(rows: Sequence[tuple[int, Flips]]) -> str:
    """A table with one line per checkpoint, and below it the first checkpoint that reverses time."""
    lines = [f"{'updates':>8} {'reversed':>9} {'in order':>9} {'unclear':>8}   {'audio':>6} {'output':>7} {'decoder':>8}   verdict"]
    for updates, flips in rows:
        ends, crossed = list(flips.places.values()), list(flips.cross_attention.values())
        decoder = f"{crossed[-1]:+8.2f}" if crossed else f"{'':8}"
        counts = f"{updates:8} {flips.turned:9} {flips.in_order:9} {flips.unclear:8}"
        lines.append(f"{counts}   {ends[0]:+6.2f} {ends[-1]:+7.2f} {decoder}   {flips.verdict}")
    lines.append(f"audio, output, decoder: mean correlation of letters with their places by gradients or attention; clear above {CLEAR}")
    first = next(((updates, flips) for updates, flips in rows if flips.verdict == "reversed"), None)
    if first is None:
        lines.append("no checkpoint reverses time in most utterances")
    else:
        blocks = ", ".join(f"block {block} ({count})" for block, count in first[1].reversing.items())
        lines.append(f"time is reversed from update {first[0]} on, by {blocks}")
    return "\n".join(lines)
