"""Float layers against stock torch: linear layers, fused and as trained, and attention, over the shapes of the presets.

    python benchmarks/speed/float_layers.py [--threads 1] [--cpu-time] [--json]

Which form ours takes is the rule of `hubert_eff/layers/choice.py` for this processor (`hubert-eff doctor` prints it); where that is
torch's own both sides run the same code. The target is at least 0.97x in each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import nn
from torch.nn import functional as F

from hubert_eff.kernels.cpu import cpu
from hubert_eff.layers.attention import attention
from hubert_eff.layers.choice import rule_for
from hubert_eff.layers.linear import Linear

TARGET = 0.97
ROWS, DIMS = (16, 499, 1499), (144, 256, 512, 768)
ATTENTION = ((4, 499, 36), (4, 1499, 36), (12, 499, 64))
WORK = 5e7  # multiplications of a call: smaller ones are repeated, so that the clock resolves them


def repeated(call: Callable[[], object], macs: int) -> Callable[[], object]:
    """Repeat `call` until a round takes about a millisecond."""
    times = max(1, int(WORK / macs))

    def run() -> None:
        for _ in range(times):
            call()

    return run


def linear_rows(rounds: int, clock: Callable[[Callable[[], object]], float]) -> list[dict[str, Any]]:
    """Each width onto itself and to four times as much and back, with weights as they train and as `fuse` leaves them."""
    result = []
    for dim in DIMS:
        for inputs, outputs in ((dim, dim), (dim, 4 * dim), (4 * dim, dim)):
            for rows in ROWS:
                x, stock = torch.randn(1, rows, inputs), nn.Linear(inputs, outputs)
                layer, fused = Linear(inputs, outputs), Linear(inputs, outputs).fold()
                macs = rows * inputs * outputs
                sides = {
                    "torch": repeated(lambda x=x, stock=stock: stock(x), macs),
                    "hubert_eff": repeated(lambda x=x, layer=layer: layer(x), macs),
                    "fused": repeated(lambda x=x, fused=fused: fused(x), macs),
                }
                times = harness.compare(sides, rounds, clock)
                for ours in ("hubert_eff", "fused"):
                    what = f"linear ({rows}, {inputs} -> {outputs})" + (", fused" if ours == "fused" else "")
                    pair = {name: [t / max(1, int(WORK / macs)) for t in times[name]] for name in ("torch", ours)}
                    result.append(harness.row(what, pair, TARGET))
    return result


def attention_rows(rounds: int, clock: Callable[[Callable[[], object]], float]) -> list[dict[str, Any]]:
    """Dense attention without dropout."""
    result = []
    for heads, frames, width in ATTENTION:
        q, k, v = torch.randn(1, frames, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        sides: dict[str, Callable[[], object]] = {
            "torch": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "hubert_eff": lambda q=q, k=k, v=v: attention(q, k, v, None, 0.0),
        }
        result.append(harness.row(f"attention ({heads}, {frames}, {width})", harness.compare(sides, rounds, clock), TARGET))
    return result


@torch.no_grad()
def main() -> None:
    """Time, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=9)
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    args = options.parse_args()
    clock = harness.cpu_seconds if args.cpu_time else harness.seconds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = harness.guard("before the run")
    rows = [*linear_rows(args.rounds, clock), *attention_rows(args.rounds, clock)]
    facts = {
        "vendor": cpu().vendor,
        "sets": " ".join(cpu().sets),
        "rule": rule_for(cpu()).name,
        "clock": "CPU" if args.cpu_time else "wall",
    }
    harness.show(rows, harness.machine() | facts | {"probe": [round(before, 1), round(harness.guard("after the run"), 1)]}, args.json)


if __name__ == "__main__":
    main()
