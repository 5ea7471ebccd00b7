"""All encoders against their peers: each script beside this one in a process of its own, one after the other, both sides in each.

    python benchmarks/speed/encoders.py [--out DIR]

Conformer-S against fairseq and torchaudio; where PyPI has no peer, against the plain form of the same computation: sparse attention
against dense, the fused FusionFormer and Squeezeformer-XS against our own Conformer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness

from hubert_eff.utils.files import write_json, write_text

SCRIPTS = ("conformer", "squeezeformer", "sparse_attention", "fusionformer")


def figures(script: str, threads: int) -> dict[str, Any]:
    """What a script beside this one prints."""
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), "--json", "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # the script has said why
    return json.loads(done.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| what | peer | ms | ours | ms | ratio | in rounds | target |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        low, high = r["ratio_range"]
        target = f"{r['target']:g}x" + ("" if r["ratio"] >= r["target"] else ", missed")
        lines.append(
            f"| {r['what']} | {r['sides'][0]} | {r['ms'][0]:.1f} | {r['sides'][1]} | {r['ms'][1]:.1f} | {r['ratio']:.2f}x "
            f"| {low:.2f} - {high:.2f} | {target} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, save."""
    options = harness.parser(__doc__.splitlines()[0], rounds=False)
    options.add_argument("--out", type=Path, help="folder for encoders.json and encoders.md")
    options.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="some of the scripts")
    args = options.parse_args()
    parts = {}
    for script in args.only:
        print(f"{script} ...", file=sys.stderr, flush=True)
        parts[script] = figures(script, args.threads)
        if args.out:
            write_json(args.out / "encoders.json", parts)
    text = table([row for part in parts.values() for row in part["rows"]])
    print(json.dumps(parts, indent=2) if args.json else text)
    if args.out:
        write_text(args.out / "encoders.md", text)


if __name__ == "__main__":
    main()
