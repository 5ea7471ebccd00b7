"""Whole models at one bit against their own float forms, and where the time of the one-bit ones goes.

    python benchmarks/speed/one_bit_model.py [--models transformer-base sparseformer-dn-s conformer-s] [--seconds 10] [--rounds 7] [--json]

Sides, all in the same rounds: the float model with torch's own products (`F.linear`, `F.scaled_dot_product_attention`), as this package
runs it, in bfloat16 (`model.bfloat16()`; fused; fused, with oneDNN's int8 products in its encoder, int8_linear.py), with torch's dynamic
int8 linear layers; one bit with what is not binary in float32 and in bfloat16. All share what this package makes of the parts that are
float on both sides. What counts is the ratio against the fastest float build, which the last lines say. Before anything is timed the packed
model's hidden states are compared with the simulation's, bit by bit. HUBERT_EFF_KERNEL chooses a kernel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import harness
import int8_linear
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.layers import attention, linear
from hubert_eff.models.fuse import fuse
from hubert_eff.profiling.cost import noise
from hubert_eff.profiling.latency import measure_shares
from hubert_eff.profiling.precision import at_precision
from hubert_eff.quant import pack
from hubert_eff.quant.runtime import kernel_in_use

MODELS = ("transformer-base", "sparseformer-dn-s", "conformer-s")
FLOAT, ONEDNN, BFLOAT16, INT8 = "F.linear", "hubert-eff float32", "bfloat16", "int8 dynamic"
FUSED, MIXED = "bfloat16, fused", "bfloat16, oneDNN int8"
PEERS = (FLOAT, ONEDNN, BFLOAT16, FUSED, MIXED, INT8)
ONE_BIT, ONE_BIT_BFLOAT16 = "one bit", "one bit, bfloat16 rest"
TARGETS = {  # times as fast as the fastest float build, with AMX; and as FLOAT, with AVX2 only
    "transformer-base": (1.5, 4.2),
    "sparseformer-dn-s": (1.4, 2.0),
    "conformer-s": (1.15, 1.5),
}
SIDES = (*PEERS, ONE_BIT, ONE_BIT_BFLOAT16)
Clock = Callable[[Callable[[], object]], float]
SLOW = 3.0  # a side that takes so many times as long as the first one is timed once


@contextmanager
def stock_products() -> Iterator[None]:
    """Linear layers and attention as torch has them."""
    refuse: Callable[..., bool] = lambda *_: False  # noqa: E731
    with mock.patch.object(linear, "takes_onednn", refuse), mock.patch.object(attention, "takes_onednn", refuse):
        yield


def started(name: str) -> hubert_eff.models.hubert.HubertModel:
    """A binarized preset with scales as after a first batch."""
    model = hubert_eff.build(f"{name}+w1a1").train()
    model(noise(model, 2.0, 2), mask=False, features_only=True)
    return model.eval()


def differing(a: list[Tensor], b: list[Tensor]) -> int:
    """Elements of hidden states that are not the same to the last bit."""
    return sum(int((x.view(torch.int32) != y.view(torch.int32)).sum()) for x, y in zip(a, b, strict=True))


def times_of(sides: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each side in every round; of one that is far slower than the first, its one call to warm up."""
    first = {name: clock(call) for name, call in sides.items()}
    limit = SLOW * next(iter(first.values()))
    times = harness.compare({name: call for name, call in sides.items() if first[name] <= limit}, rounds, clock)
    return {name: times.get(name, [first[name]] * rounds) for name in sides}


def rows_of(name: str, seconds: float, rounds: int, chosen: Sequence[str], clock: Clock) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row for each pair of a float and a one-bit form; and facts of the model."""
    float_model, binary = hubert_eff.build(name).eval(), started(name)
    packed, half = pack(binary), pack(binary, rest=torch.bfloat16)
    wave = noise(float_model, seconds)
    differ = differing(packed.hidden_states(wave)[0], binary.hidden_states(wave)[0])
    assert differ == 0, f"{differ} elements of {name}'s hidden states differ from the simulation: there is nothing to compare"
    wide, small = at_precision(float_model, "bfloat16"), at_precision(float_model, "int8")
    fused = fuse(float_model).bfloat16()
    mixed = fuse(float_model).bfloat16()
    mixed.encoder = int8_linear.with_int8_linears(mixed.encoder)

    def stock() -> None:
        with stock_products():
            float_model.hidden_states(wave)

    sides: dict[str, Callable[[], object]] = {
        FLOAT: stock,
        ONEDNN: lambda: float_model.hidden_states(wave),
        BFLOAT16: lambda: wide.hidden_states(wave),
        FUSED: lambda: fused.hidden_states(wave),
        MIXED: lambda: mixed.hidden_states(wave),
        INT8: lambda: small.hidden_states(wave),
        ONE_BIT: lambda: packed.hidden_states(wave),
        ONE_BIT_BFLOAT16: lambda: half.hidden_states(wave),
    }
    if mixed.encoder is None:  # this torch has no such products
        del sides[MIXED]
    times = times_of({side: call for side, call in sides.items() if side in chosen}, rounds, clock)
    on_amx, on_avx2 = TARGETS[name]
    rows: list[dict[str, Any]] = []
    for ours in (side for side in (ONE_BIT, ONE_BIT_BFLOAT16) if side in times):
        pairs = harness.best_marked(
            [harness.row(f"{name}, {seconds:g} s", {peer: times[peer], ours: times[ours]}, 1.0) for peer in PEERS if peer in times]
        )
        for row in pairs:
            peer = row["sides"][0]
            target = on_avx2 if peer == FLOAT and kernel_in_use() == "avx2" else on_amx if row["best"] else 1.0
            rows.append({**row, "target": target, "model": name, "kernel": kernel_in_use()})
    shares = measure_shares(ONE_BIT, packed, seconds, 3)
    grouped = {name: [dataclasses.asdict(share) for share in getattr(shares, name)] for name in ("parts", "kinds")}
    return rows, {"differing": differ, **grouped}


@torch.no_grad()
def main() -> None:
    """Check, time, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=7)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="presets to time (default: all)")
    options.add_argument("--seconds", type=float, default=10.0, help="length of the audio (default: 10)")
    options.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help=f"sides to time, {FLOAT!r} among them (default: all)")
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    args = options.parse_args()
    if FLOAT not in args.sides:
        options.error(f"--sides must have {FLOAT!r}, which the others are compared with")
    clock = harness.cpu_seconds if args.cpu_time else harness.seconds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before, rows, facts = harness.guard("before the run"), [], {}
    for name in args.models:
        found, facts[name] = rows_of(name, args.seconds, args.rounds, args.sides, clock)
        rows += found
    probe = [round(before, 1), round(harness.guard("after the run"), 1)]
    kernel = kernel_in_use()
    facts_of_run = {
        "kernel": kernel,
        "targets": "of the fastest peer: with AMX",
        "clock": "CPU" if args.cpu_time else "wall",
        "probe": probe,
    }
    machine = harness.machine() | facts_of_run
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows, "models": facts}, indent=2))
        return
    harness.show(rows, machine, False)
    for name, fact in facts.items():
        for grouped in ("parts", "kinds"):
            shown = [f"{p['name']} {p['ms']:.1f} ms ({p['time_percent']:.0f}%)" for p in fact[grouped] if p["time_percent"] >= 1]
            print(f"{name}, {ONE_BIT}, by {grouped}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
