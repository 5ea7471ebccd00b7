"""Prints readable lines of a run for `hubert-eff train`, the recipes and the demo. The log file keeps everything that fairseq writes."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import TextIO

from ..errors import printable
from .training_log import NO_BETTER

SECONDS = 10.0  # minimum time between two lines about training; long runs print one per fiftieth of their time so far
STATISTICS = {"train", "train_inner", "valid"}
SHOWN = (
    re.compile(r"num\. shared model params: (?P<parameters>[\d,]+)"),
    re.compile(r"(?P<loaded>Loaded checkpoint .* @ \d+ updates\))"),
    re.compile(r"(?P<done>done training in [\d.]+ seconds)"),
)
NAMES = {"loss": "loss", "accuracy": "accuracy", "wer": "WER %", "cer": "CER %"}


class Console(logging.StreamHandler[TextIO]):
    """A handler for hydra's job logging that prints few records, each in few words.

    `hydra.job_logging.handlers.console.class=hubert_eff.reports.console.Console` puts it into any run of fairseq-hydra-train.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.addFilter(self.choose)
        self.most: int | None = None  # updates of the run
        self.began = self.last = time.monotonic()
        self.first: tuple[int, float] | None = None  # (updates, time) of the first figures, the reference for the speed

    def choose(self, record: logging.LogRecord) -> bool:
        """Whether to print a record: warnings and errors, lines of the plug-in, figures now and then, begin and end of the run."""
        if record.levelno >= logging.WARNING or record.name.startswith("fairseq_plugins"):
            return True
        if isinstance(record.msg, Mapping):  # a run first logs its configuration
            self.most = (record.msg.get("optimization") or {}).get("max_update")
            return False
        if record.name in STATISTICS:
            return self._is_due(record)
        return any(pattern.search(record.getMessage()) for pattern in SHOWN)

    def _is_due(self, record: logging.LogRecord) -> bool:
        updates, now = _figures(record).get("num_updates"), time.monotonic()
        if updates is None:
            return False
        if record.name == "valid":
            return True
        if self.first is None:
            self.first = (int(updates), now)
        if now - self.last < max(SECONDS, (now - self.began) / 50) and updates != self.most:
            return False
        self.last = now
        return record.name != "train" or updates != self.most  # the last update is printed only once

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        if record.name in STATISTICS and record.levelno < logging.WARNING:
            return self._said(record.name == "valid", _figures(record))
        text = record.getMessage()
        for pattern in SHOWN:
            found = pattern.search(text)
            if found:
                return f"{found['parameters']} parameters" if "parameters" in found.groupdict() else found[0]
        said = printable(text)
        return f"{record.levelname.lower()}: {said}" if record.levelno >= logging.WARNING else said

    def _said(self, valid: bool, figures: Mapping[str, float]) -> str:
        updates = int(figures["num_updates"])
        of = f" of {self.most:,}" if self.most else ""
        parts = [f"{'valid at update' if valid else 'update'} {updates:,}{'' if valid else of}"]
        if not valid and self.most and self.first is not None and updates > self.first[0]:
            speed = (updates - self.first[0]) / max(time.monotonic() - self.first[1], 1e-9)
            parts.append(f"{_duration((self.most - updates) / speed)} left")
        parts += [f"{text} {figures[key]:g}" for key, text in NAMES.items() if key in figures]
        if {"correct_m_0", "majority_m_0"} <= figures.keys():
            accuracy, majority = figures["correct_m_0"], figures["majority_m_0"]
            parts.append(f"masked accuracy {100 * accuracy:.1f}% (most frequent label {100 * majority:.1f}%)")
            if valid and accuracy <= majority:
                parts.append(NO_BETTER)
        return ", ".join(parts)


def _figures(record: logging.LogRecord) -> dict[str, float]:
    """Names and values of a line of statistics."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"(\w+)[ =](-?\d[\d.e+-]*)", record.getMessage()):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def _duration(seconds: float) -> str:
    """A duration as text, such as 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
