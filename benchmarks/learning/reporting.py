"""What the pages of results share: Markdown tables, figures with their intervals, what a run depends on."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import hubert_eff
from hubert_eff.profiling.machine import cpu_name
from hubert_eff.reports.training_log import read_log


@cache
def commit() -> str | None:
    """The commit of the checkout, None where there is none."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or None


def run_of(commits: Sequence[str]) -> dict[str, Any]:
    """What figures depend on besides the settings: processor, versions, the commits that ran the steps, date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "hubert_eff": hubert_eff.__version__}
    return {"cpu": cpu_name(), "commit": ", ".join(commits), "date": time.strftime("%Y-%m-%d"), **versions}


def last_validation(log: Path) -> dict[str, float]:
    """Updates, masked accuracy and the share of the most frequent label at a run's last validation, whose weights are probed."""
    last = read_log(log).valid[-1]
    return {"updates": last["num_updates"], "accuracy": last["correct_m_0"], "majority": last["majority_m_0"]}


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table, and an empty line."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def show(values: dict[str, Any] | None, digits: int = 1) -> str:
    """A figure and its interval; a dash where there is none."""
    if values is None or values["value"] is None:
        return "–"
    return f"{values['value']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"
