"""Compares our operation counter with others on the same models: torch's FlopCounterMode, and DeepSpeed, fvcore and thop where installed.

Each counter runs in a process of its own, since some of them leave their patches behind. All are given the model with torch's own
linear layers and attention in place of oneDNN's products, which only our counter knows. The figure to agree with is the formula for
dense models: extractor, projection, positional convolution, and per layer the weights and two T x T products.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.layers import linear
from hubert_eff.profiling.cost import noise
from hubert_eff.utils.evaluating import evaluating

PRESETS = ("transformer-base", "conformer-s-table1", "squeezeformer-xs-table1", "conformer-s")
FASTCONV = 3_295_436_160  # MACs of the extractor on 10 s


class LastState(nn.Module):
    """(B, S) -> (B, T, D), as a module that any counter can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, wave: Tensor) -> Tensor:
        return self.model.hidden_states(wave)[0][-1]


def ours(model: nn.Module, wave: Tensor) -> int:
    return hubert_eff.profile(model.model, seconds=wave.size(1) / 16_000).macs


def torch_counter(model: nn.Module, wave: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(wave)
    return counter.get_total_flops() // 2


def deepspeed(model: nn.Module, wave: Tensor) -> int:
    from deepspeed.profiling.flops_profiler import get_model_profile

    return int(get_model_profile(model, args=[wave], print_profile=False, detailed=False, as_string=False, warm_up=0)[1])


def fvcore(model: nn.Module, wave: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    return int(FlopCountAnalysis(model, wave).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def thop(model: nn.Module, wave: Tensor) -> int:
    from thop import profile

    return int(profile(model, inputs=(wave,), verbose=False)[0])


COUNTERS: dict[str, Callable[[nn.Module, Tensor], int]] = {
    "hubert-eff": ours, "torch": torch_counter, "deepspeed": deepspeed, "fvcore": fvcore, "thop": thop
}  # fmt: skip


def formula(preset: str, frames: int = 499) -> int | None:
    """MACs of a dense model at 10 s worked out from its sizes; None for one with relative positions."""
    model = hubert_eff.build(preset)
    config = model.config
    dim, inner, layers = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.encoder_layers
    if preset not in ("transformer-base", "conformer-s-table1"):
        return None
    per_frame = 4 * dim**2 + 2 * dim * inner if preset == "transformer-base" else 7 * dim**2 + 4 * dim * inner + 31 * dim
    padded = frames + frames % config.required_seq_len_multiple
    before = FASTCONV + (512 * dim if dim != 512 else 0) * frames + 8 * dim**2 * frames
    return before + layers * (per_frame * padded + 2 * padded**2 * dim)


def count(counter: str, preset: str) -> int:
    """MACs of one preset by one counter, in this process."""
    linear._PRODUCT = None  # torch's own products
    model = LastState(hubert_eff.build(preset))
    with evaluating(model):
        return COUNTERS[counter](model, noise(model, 10.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="models to count (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--one", nargs=2, metavar=("COUNTER", "PRESET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(count(*args.one))
        return
    installed = [name for name in COUNTERS if name in ("hubert-eff", "torch") or importlib.util.find_spec(name)]
    rows = []
    for preset in args.presets:
        row = {"preset": preset, "formula": formula(preset)}
        for counter in installed:
            done = subprocess.run([sys.executable, __file__, "--one", counter, preset], capture_output=True, text=True, check=False)
            row[counter] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
            if done.returncode != 0:
                print(f"{counter} fails on {preset}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("".join(f"{name:>26}" for name in rows[0]))
    for row in rows:
        print("".join(f"{'-' if v is None else f'{v:,}' if isinstance(v, int) else v:>26}" for v in row.values()))
    missing = [name for name in COUNTERS if name not in installed]
    if missing:
        print(f"not installed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
