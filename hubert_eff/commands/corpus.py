"""`hubert-eff corpus`: make a small synthetic speech corpus offline."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_extra, unknown

_SUPERB_TASKS = ("ks",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two corpora: `demo` to pre-train on, `superb` to evaluate on."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    demo = kinds.add_parser("demo", help="sentences of several voices, with transcripts and phone timings")
    demo.add_argument("--out", required=True, type=Path, help="folder to write")
    demo.add_argument("--minutes", type=float, default=20.0, help="speech in all (default: %(default)g)")
    demo.add_argument("--speakers", type=int, default=10, help="number of voices (default: %(default)d)")
    demo.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus (default: %(default)d)")
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")

    superb = kinds.add_parser("superb", help="a stand-in for the data of a SUPERB task, in that data's own layout")
    superb.add_argument("--out", required=True, type=Path, help="folder to write")
    superb.add_argument("--task", required=True, help="ks (keyword spotting, laid out as Speech Commands)")
    superb.add_argument("--per-word", type=int, default=60, help="recordings of each word (default: %(default)d)")
    superb.add_argument("--speakers", type=int, default=10, help="number of voices (default: %(default)d)")
    superb.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus (default: %(default)d)")
    superb.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the corpus and print its summary."""
    if args.kind == "demo":
        from ..corpus.demo import make_demo

        summary = make_demo(args.out, args.minutes, args.speakers, args.seed)
        line = (
            f"{summary['utterances']} utterances, {summary['minutes']:.1f} min, {summary['speakers']} speakers, "
            f"{summary['phones']} phones -> {args.out}"
        )
    else:
        summary = _make_superb(args)
        figures = ", ".join(f"{k} {v}" for k, v in summary.items() if isinstance(v, (int, float, str)))
        line = f"{figures} -> {args.out}"
    print(json.dumps({**summary, "out": str(args.out)}, ensure_ascii=False) if args.json else line)
    return 0


def _make_superb(args: argparse.Namespace) -> dict[str, Any]:
    if args.task not in _SUPERB_TASKS:
        raise unknown("task", args.task, _SUPERB_TASKS)
    if args.per_word < 1 or args.speakers < 1:
        raise UserError(f"--per-word {args.per_word} and --speakers {args.speakers} must be at least 1")
    try:
        # by name: hubert_eff does not depend on the bridge to S3PRL, which stands above it
        bridge = importlib.import_module("superb_tasks.corpus")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "superb_tasks", "superb", "the corpus of a SUPERB task") from error
    summary: dict[str, Any] = bridge.make_keywords(args.out, seed=args.seed, per_word=args.per_word, speakers=args.speakers)
    return summary
