"""`hubert-eff trends RUN_DIR...|CKPT...`: mean and variance of every layer's output over training, and alarms."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Bounds
from ..errors import UserError, printable, require
from ._numbers import whole

if TYPE_CHECKING:
    from ..analysis.layer_trends import Alarm, Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff trends`."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_DIR|CKPT",
        help="save_dirs of runs that were trained with task.trends_interval=N; or checkpoints, whose encoders are run on "
        "Gaussian input",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for trends.json and trends.png")
    parser.add_argument(
        "--blocks", type=whole(Bounds(least=2)), default=8, help="number of blocks in the picture, evenly spread (default: %(default)d)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures and alarms as JSON")


def run(args: argparse.Namespace) -> int:
    """Read or measure, and print alarms; returns 0 whether or not there are alarms."""
    from ..analysis.layer_trends import alarms
    from ..utils.files import writable, write_json

    if args.out is not None:
        require("matplotlib", "plot", "--out")
        writable(args.out)
    runs: dict[str, list[Record]] = _runs(args.paths)
    found = {name: alarms(records) for name, records in runs.items()}
    results: dict[str, dict[str, Any]] = {
        name: {
            "records": [json.loads(record.line()) for record in records],
            # JSON has no numbers that are not finite
            "alarms": [{**asdict(alarm), "value": alarm.value if math.isfinite(alarm.value) else None} for alarm in found[name]],
        }
        for name, records in runs.items()
    }
    result = {"runs": results} if len(runs) > 1 else next(iter(results.values()))
    if args.out is not None:
        from ..analysis.trend_plots import draw

        write_json(args.out / "trends.json", result)
        draw(runs, args.out / "trends.png", ", ".join(path.name for path in args.paths), args.blocks)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, records in runs.items():
        _say(f"{name}: " if len(runs) > 1 else "", records, found[name])
    return 0


def _say(head: str, records: list[Record], found: list[Alarm]) -> None:
    from ..analysis.layer_trends import EXPLODED

    last = records[-1]
    variances = [variance for _, variance, _ in last.layers.values()]
    print(
        f"{head}{len(records)} records of {len(last.layers)} layers, updates {records[0].update} to {last.update}, {last.input} input; "
        f"variances at the end {min(variances):.3g} to {max(variances):.3g} (explosion above {EXPLODED:g})"
    )
    for kind, count in Counter(alarm.kind for alarm in found).items():
        first = next(alarm for alarm in found if alarm.kind == kind)
        print(f"{head}{kind}: {count} of {len(last.layers)} layers; first, {first}")
    if not found:
        print(f"{head}no alarm")


def _runs(paths: list[Path]) -> dict[str, list[Record]]:
    """Records by run: one run per folder, or one for all checkpoints together."""
    if len(paths) < 2 or not all(path.is_dir() for path in paths):
        return {"": _records(paths)}
    names = [path.name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice")
    whole = len(set(names)) < len(names)  # folders of the same name are shown by their paths
    return {printable(path) if whole else printable(path.name): _records([path]) for path in paths}


def _records(paths: list[Path]) -> list[Record]:
    from ..analysis.layer_trends import FILE, look, read_trends
    from ..checkpoints.load import load, updates_of

    if len(paths) == 1 and paths[0].is_dir():
        file = paths[0] / FILE
        if not file.is_file():
            raise UserError(f"no {FILE} in {paths[0]}: train with task.trends_interval=N, or name checkpoints")
        records = read_trends(file)
        if not records:
            raise UserError(f"{file} has no record yet")
        return records
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name runs, or checkpoints, not both")
    found, left_out = [], []
    for path in paths:
        try:
            found.append(look(load(path), updates_of(path)))
        except UserError as error:
            left_out.append(error)
    if not found:
        raise left_out[0]
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return sorted(found, key=lambda record: record.update)
