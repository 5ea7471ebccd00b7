"""`hubert-eff corpus`: make a small synthetic speech corpus offline."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import missing_extra, printable
from ..utils.locks import locked
from ._tasks import add_task, names_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of two corpora: `demo` to pre-train on, `superb` to evaluate on."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    demo = kinds.add_parser("demo", help="sentences of several voices, with transcripts and phone timings")
    demo.add_argument("--out", required=True, type=Path, help="folder to write")
    demo.add_argument("--minutes", type=float, default=20.0, help="minutes of speech in all (default: %(default)g)")
    demo.add_argument("--speakers", type=int, default=10, help="number of voices (default: %(default)d)")
    demo.add_argument("--seed", type=int, default=1, help="random seed; the same seed gives the same corpus (default: %(default)d)")
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")

    superb = kinds.add_parser("superb", help="stand-ins for the data of SUPERB's tasks, in the layouts of the real data sets")
    superb.add_argument(
        "--out", required=True, type=Path, help="folder to write to; data sets made earlier with the same arguments are kept"
    )
    superb.add_argument("--minutes", type=float, default=10.0, help="approximate minutes of speech in each data set (default: %(default)g)")
    add_task(superb)
    superb.add_argument("--seed", type=int, default=1, help="random seed; the same seed gives the same data (default: %(default)d)")
    superb.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the corpus and print its summary."""
    if args.kind == "demo":
        from ..data.synthetic.sentences import make_demo

        whole = args.out.absolute()  # the folder appears only when it is complete, so the lock stands beside it
        with locked(whole.parent, hashlib.sha256(os.fsencode(whole.name)).hexdigest()[:8]):
            summary = make_demo(args.out, args.minutes, args.speakers, args.seed)
        line = (
            f"{summary['utterances']} utterances, {summary['minutes']:.1f} min, {summary['speakers']} speakers, "
            f"{summary['phones']} phones -> {printable(args.out)}"
        )
    else:
        summary = _make_superb(args)
        line = "\n".join(
            f"{name}: {entry['recordings']} recordings, {entry['recorded_minutes']:.1f} min -> {printable(args.out / name)}"
            for name, entry in summary.items()
        )
    print(json.dumps({**summary, "out": str(args.out)}) if args.json else line)
    return 0


def _make_superb(args: argparse.Namespace) -> dict[str, Any]:
    try:
        # imported by name, because hubert_eff must not depend on superb_tasks, which imports it
        bridge = importlib.import_module("superb_tasks.data.corpus")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "superb_tasks", "superb", "the corpus of a SUPERB task") from error
    with locked(args.out):
        summary: dict[str, Any] = bridge.make_superb(args.out, names_of(args.task), args.minutes, args.seed)
    return summary
