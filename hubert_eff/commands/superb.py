"""`hubert-eff superb list | check | run | report`: the ten tasks of the SUPERB benchmark, through S3PRL."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_extra, printable
from ._tasks import add_task, names_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the four sub-commands."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    listing = kinds.add_parser("list", help="the ten tasks: metric, data, license, where the data are from")
    listing.add_argument("--json", action="store_true", help="print the tasks with their settings and layouts as JSON")

    check = kinds.add_parser("check", help="check that the data of tasks are there, in the layout that S3PRL reads")
    check.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds the data sets")
    add_task(check)
    check.add_argument("--json", action="store_true", help="print what is missing as JSON")

    run = kinds.add_parser("run", help="train and test tasks on a frozen upstream")
    add_task(run, required=True)
    sources = "a checkpoint, an export, an untrained model, or one of S3PRL's, such as s3prl:fbank or s3prl:wavlm_base"
    run.add_argument("--upstream", required=True, metavar="CKPT|FILE|PRESET[@SEED]|s3prl:NAME", help=f"model: {sources}")
    run.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds the data sets")
    run.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the runs: DIR/TASK/result.json")
    run.add_argument("--lr-sweep", action="store_true", help="try SUPERB's learning rates, 1e-1 to 1e-7, and test the best one")
    run.add_argument("--lr", type=float, help="learning rate for all tasks (default: that of each task's settings)")
    run.add_argument("--steps", type=int, help="updates per run (default: SUPERB's, 30000 to 200000; with --small 80 to 400)")
    run.add_argument("--small", action="store_true", help="use narrow heads, small batches and few steps, for generated data")
    run.add_argument("--seed", type=int, default=1337, help="seed of heads and batches (default: S3PRL's, %(default)d)")
    run.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    run.add_argument("--workers", type=int, help="number of processes that load data (default: the settings'; none on a CPU)")
    run.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder to keep the hidden states of all recordings in; their size is printed first"
    )
    run.add_argument("--json", action="store_true", help="print the results as JSON")

    report = kinds.add_parser(
        "report", help="compare models with each other and with the paper's: ten tasks, SUPERB score, cost, significance"
    )
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders of runs; the others are compared with the first model"
    )
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the table as Markdown, CSV and JSON, and a submission per model"
    )
    report.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; `check` returns 2 if data are missing."""
    return {"list": _list, "check": _check, "run": _run, "report": _report}[args.kind](args)


def _bridge(module: str) -> Any:
    """Import a module of superb_tasks by name, because hubert_eff must not depend on superb_tasks, which imports it."""
    try:
        return importlib.import_module(f"superb_tasks.{module}")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "superb_tasks", "superb", "SUPERB evaluation") from error


def _list(args: argparse.Namespace) -> int:
    tasks = [task.describe() for task in _bridge("tasks").choose("all")]
    if args.json:
        print(json.dumps({"tasks": tasks}, indent=2, ensure_ascii=False))
        return 0
    for task in tasks:
        print(f"{task['task']:<4} {task['title']}, {task['metric']} ({task['steps'] or 'no'} steps; {task['config']})")
        print(f"     {task['data']}: {task['layout']}\n     {task['license']}; {task['url']}")
    return 0


def _check(args: argparse.Namespace) -> int:
    tasks = _bridge("tasks")
    missing: dict[str, str] = {}
    chosen = tasks.choose(names_of(args.task))
    if not args.data.is_dir():
        raise UserError(f"no folder at {args.data}")
    for task in chosen:
        try:
            tasks.check(task, args.data)
        except UserError as error:
            missing[task.name] = str(error)
    complete = [task.name for task in chosen if task.name not in missing]
    if args.json:
        print(json.dumps({"data": str(args.data), "complete": complete, "missing": missing}, indent=2))
    else:
        for name in complete:
            print(f"{name}: complete")
        for line in missing.values():
            print(f"hubert-eff superb: {line}", file=sys.stderr)
    return 2 if missing else 0


def _run(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # S3PRL asks whether a GPU exists, not whether to use it
    if not sys.stderr.isatty():  # in a log, S3PRL's progress bars print a line now and then instead of ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # read when tqdm is imported
    runner = _bridge("running.runner")
    request = runner.Request(
        args.upstream, args.data, args.steps, args.lr, args.lr_sweep, args.small, args.seed, args.device, args.workers, args.cache
    )
    results = runner.run_tasks(names_of(args.task), request, args.out)
    if args.json:
        print(json.dumps({"results": results}, indent=2, ensure_ascii=False))
        return 0
    tasks = {task.name: task for task in _bridge("tasks").choose("all")}
    for result in results:
        task = tasks[result["task"]]
        chosen = f"learning rate {result['learning_rate']:g}, {result['steps']} steps" if task.trains else f"layer {result['layer']}"
        file = args.out / task.name / "result.json"
        print(f"{task.name:<4} {task.title}, {args.upstream}: {task.key} {result[task.key]:.4f} ({chosen}); {file}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from ..reports.tables import plain_table, show

    results = _bridge("results.tables")
    values = results.report(args.folders, args.out)
    for text in values["left_out"]:
        print(f"left out: {printable(text)}", file=sys.stderr)
    if args.json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return 0
    first = values["narrow"]
    wide_head, wide_rows = results.cells(values, results.tasks_of(values))  # a terminal is narrow; files have all ten tasks
    for head, rows, notes in ((first["head"], first["rows"], first["notes"]), (wide_head, wide_rows, values["notes"])):
        table = plain_table(*head)
        for row in rows:
            table.add_row(*row)
        show(table)
        print(*notes, "", sep="\n")
    for row in values["rows"]:
        if row.get("submission"):
            print(f"{row['model']}: submission of {len(row['submission'])} of 14 parts: {' '.join(row['submission'])}")
    return 0
