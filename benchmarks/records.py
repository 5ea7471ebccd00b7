"""Keeps figures of benchmarks as lines, and compares two of them.

    python benchmarks/records.py keep speed/one_bit.py --rounds 5     # runs it with --json, adds a line to benchmarks/results/one_bit.jsonl
    python benchmarks/records.py compare one_bit                      # its last line beside the one before
    python benchmarks/records.py compare one_bit --old 0 --new -1     # any two lines, counted from 0, or from the end
    python benchmarks/records.py compare OLD.jsonl NEW.jsonl          # the last lines of two files

A line holds the command, the commit, the date, the machine and the rows that the script printed. Two lines are compared row by row: a
ratio against a peer in the same run can be compared between machines, milliseconds only on one machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_text

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


def keep(script: str, words: Sequence[str], folder: Path = RESULTS) -> Path:
    """Run a script with `--json`, and add what it prints to a file of `folder`, which is returned.

    Raises `UserError` for a script that is not there, fails, or prints no rows.
    """
    file = ROOT / script
    if file.suffix != ".py" or not file.is_file():
        known = " ".join(sorted(f"speed/{path.name}" for path in (ROOT / "speed").glob("*.py")))
        raise UserError(f"{script} is not a script of benchmarks: name one of {known}")
    done = subprocess.run([sys.executable, str(file), *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}: nothing was kept")
    try:
        printed = json.loads(done.stdout)
        rows = printed["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{script} printed no rows as JSON: nothing was kept") from error
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    entry = {
        "command": shlex.join(["python", f"benchmarks/{script}", *words]), "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"), "machine": printed.get("machine", {}), "rows": rows,
    }  # fmt: skip
    target = folder / f"{file.stem}.jsonl"
    before = target.read_text(encoding="utf-8") if target.is_file() else ""
    write_text(target, f"{before}{json.dumps(entry, ensure_ascii=False)}\n")
    return target


def read(name: str) -> list[dict[str, Any]]:
    """The lines of a file, or of the kept results of a script. Raises `UserError` for what holds none."""
    file = Path(name) if name.endswith(".jsonl") else RESULTS / f"{Path(name).stem}.jsonl"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in RESULTS.glob("*.jsonl"))) or "none yet"
        raise UserError(f"{file} is not there; results are kept of: {known}")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["rows"], list):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number} is not a result that `records.py keep` wrote") from error
        found.append(entry)
    if not found:
        raise UserError(f"{file} is empty")
    return found


def pick(entries: Sequence[dict[str, Any]], number: int, name: str) -> dict[str, Any]:
    """One of the lines. Raises `UserError` where there are not as many."""
    if not -len(entries) <= number < len(entries):
        raise UserError(f"{name} has {len(entries)} lines, there is no line {number}")
    return entries[number]


def _name(row: dict[str, Any]) -> str:
    sides = row.get("sides")
    return f"{row.get('what', '?')}: {' / '.join(map(str, sides))}" if sides else str(row.get("what") or row.get("encoder") or row)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines of text: what the two are of, then each row that both have, as a Markdown table."""
    facts = [
        f"{side}: {entry.get('command')}, commit {entry.get('commit')}, {entry.get('date')}, {entry.get('machine', {}).get('cpu', '?')}"
        for side, entry in (("old", old), ("new", new))
    ]
    same = old.get("machine", {}).get("cpu") == new.get("machine", {}).get("cpu")
    before = {_name(row): row for row in old["rows"]}
    lines = [*facts, "", "| what | ms, old | ms, new | new / old | ratio, old | ratio, new |", "|---|---|---|---|---|---|"]
    both = [(name, before[name], row) for row in new["rows"] if (name := _name(row)) in before]
    for name, was, now in both:
        times = [row["ms"][-1] if isinstance(row.get("ms"), list) and row["ms"] else row.get("ms") for row in (was, now)]
        ratios = [row.get("ratio") for row in (was, now)]
        part = times[1] / times[0] if all(times) and same else None
        shown = [f"{value:.3g}" if isinstance(value, (int, float)) else "–" for value in (*times, part, *ratios)]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    if not both:
        raise UserError("the two results have no row in common: they are of different scripts or shapes")
    only = len(before) + len(new["rows"]) - 2 * len(both)
    if not same:
        lines += ["", "Other processors: milliseconds do not compare, ratios against the same peer do."]
    if only:
        lines += ["", f"{only} rows stand in one of the two only."]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = options.add_subparsers(dest="kind", required=True)
    keeping = kinds.add_parser("keep", help="run a script and keep its figures")
    keeping.add_argument("script", help="script to run, such as speed/one_bit.py")
    keeping.add_argument("words", nargs=argparse.REMAINDER, help="arguments of the script")
    comparing = kinds.add_parser("compare", help="two results side by side")
    comparing.add_argument(
        "files", nargs="+", metavar="NAME|FILE.jsonl", help="one file (two of its lines), or two files (their last lines)"
    )
    comparing.add_argument("--old", type=int, help="line of the first result (default: the one before the last; for two files the last)")
    comparing.add_argument("--new", type=int, default=-1, help="line of the second result (default: the last)")
    args = options.parse_args(arguments)
    try:
        if args.kind == "keep":
            print(keep(args.script, args.words))
            return 0
        if len(args.files) > 2:
            raise UserError(f"{len(args.files)} files are given: name one, or two")
        first, second = read(args.files[0]), read(args.files[-1])
        line = args.old if args.old is not None else -1 if len(args.files) == 2 else -2
        print("\n".join(compare(pick(first, line, args.files[0]), pick(second, args.new, args.files[-1]))))
    except UserError as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
