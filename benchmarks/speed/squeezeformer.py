"""Squeezeformer-XS against our own Conformer-S, both with relative positions: inference of the whole encoder.

python benchmarks/speed/squeezeformer.py [--seconds 10 30] [--threads 1]
"""

from __future__ import annotations

import harness
import torch

import hubert_eff

TARGETS = {30: 1.3}  # by seconds


def main() -> None:
    """Time, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, nargs="+", default=[10, 30], help="lengths of the input (default: 10 30)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = harness.guard("before the run")
    encoders = {preset: hubert_eff.build(preset).eval().encoder for preset in ("conformer-s", "squeezeformer-xs")}
    rows = []
    for seconds in args.seconds:
        x = torch.randn(1, seconds * 50 - 1, 144)
        with torch.no_grad():
            times = harness.compare({name: lambda e=encoder, x=x: e(x) for name, encoder in encoders.items()}, args.rounds)
        rows.append(harness.row(f"Squeezeformer-XS, {seconds} s, inference", times, TARGETS.get(seconds, 1.0)))
    facts = harness.machine() | {"probe": [round(before, 1), round(harness.guard("after the run"), 1)]}
    harness.show(rows, facts, args.json)


if __name__ == "__main__":
    main()
