"""Collects what a report shows: training logs, results of SUPERB tasks, measurements, and the costs of their models."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..profiling.cost import Profile, profile
from ..profiling.latency import Shares, Timing, read
from .table2 import METRICS, REFERENCES
from .training_log import LOG, TrainingLog, read_log

COSTS = {"storage": "storage, MB", "bop": "bit operations of 10 s, 2^30", "ms": "measured latency of 10 s, ms"}
MOST_OF_A_REASON = 300  # characters of an error
CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt")  # checkpoints of a run; the model of the first that exists is profiled


@dataclass
class Findings:
    """The content of the folders: training runs, results of SUPERB tasks, measurements, and profiles of their models."""

    runs: list[TrainingLog] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    shares: list[Shares] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)  # name of a run -> file of its model
    left_out: list[str] = field(default_factory=list)  # what cannot be read or profiled, and why


def collect(folders: Iterable[str | os.PathLike[str]]) -> Findings:
    """Read every training log, result.json of a SUPERB task and bench.json below the folders, and profile their models.

    Files that cannot be read are left out and named. Raises `UserError` if folders are given and none of them holds any of these.
    """
    found, given = Findings(), [Path(folder) for folder in folders]
    for folder in given:
        if not folder.is_dir():
            found.left_out.append(f"no folder at {folder}")
            continue
        before = _size(found)
        for name, take in ((LOG, _take_log), ("result.json", _take_result), ("bench.json", _take_bench)):
            for path in sorted(folder.rglob(name)):
                try:
                    take(path, found)
                except UserError as error:
                    found.left_out.append(str(error))
        if _size(found) == before:
            found.left_out.append(
                f"{folder} holds no {LOG} of training, no result.json of a SUPERB task and no bench.json of `hubert-eff bench --out`"
            )
    if given and not (found.runs or found.results or found.timings or found.shares):
        raise UserError("; ".join(found.left_out[:3]))
    models = list(found.checkpoints.values())
    models += [_model(values) for values in found.results] + [timing.model for timing in found.timings]
    for model in dict.fromkeys(models):
        try:
            found.profiles[model] = profile(model)
        except (UserError, RuntimeError) as error:
            found.left_out.append(_without_cost(model, error))
    return found


def _without_cost(model: str, error: Exception) -> str:
    """Why a model has no cost, with its name once, cut between words."""
    reason = textwrap.shorten(str(error), MOST_OF_A_REASON, placeholder=" ...")
    return reason if model in reason else f"{model}: {reason}"


def _size(found: Findings) -> int:
    return len(found.runs) + len(found.results) + len(found.timings) + len(found.shares) + len(found.left_out)


def _take_log(path: Path, found: Findings) -> None:
    run = read_log(path, str(path.parent))  # raises for a run that was refused or has just begun
    found.runs.append(run)
    files = [path.parent / name for name in CHECKPOINTS]
    for file in filter(Path.is_file, files[::-1]):
        found.checkpoints[run.name] = os.path.abspath(file)  # as a SUPERB result names it, so that one model has one row


def _take_result(path: Path, found: Findings) -> None:
    values = _result(path)
    if values is not None:
        found.results.append(values)


def _take_bench(path: Path, found: Findings) -> None:
    timings, shares = read(path)
    found.timings += timings
    found.shares += shares


def _result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        raise UserError(f"{path} cannot be read: it is not a regular file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error
    task = values.get("task") if isinstance(values, dict) else None
    if not isinstance(task, str) or task not in METRICS or not isinstance(values.get("upstream"), str):
        return None
    figures = [values[key] for key in REFERENCES[task] if key in values]
    return values if METRICS[task].key in values and all(map(_is_number, figures)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _model(result: dict[str, Any]) -> str:
    """The preset or checkpoint of a result; an untrained preset is named PRESET@SEED."""
    return profiled(str(result["upstream"]))


def profiled(upstream: str) -> str:
    """The preset or checkpoint whose cost is that of an upstream."""
    return upstream if os.path.isfile(upstream) else upstream.partition("@")[0]


def short_name(name: str) -> str:
    """The last folder and file of a checkpoint; other names unchanged."""
    return "/".join(Path(name).parts[-2:]) if os.sep in name else name
