"""One-bit attention by integers: its speed and its memory.

    python benchmarks/speed/one_bit_attention.py [--kernels avx512vpopcntdq avx2] [--shape 12 499 64] [--rounds 15] [--cpu-time]
    python benchmarks/speed/one_bit_attention.py --memory [10000 20000 40000]

The first times every form, packing of its operands included, against `F.scaled_dot_product_attention` in float32 (dense, without
relative positions), and the simulation in eval mode against the simulation with softmax, all in the same rounds; packed forms are
compared with their simulation to the last bit before. The second runs two packed layers of transformer-base on so many frames, each
length in a process of its own, and prints how much memory they took (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubert_eff.kernels import loader
from hubert_eff.layers.sparse_pattern import SparsePattern
from hubert_eff.quant import Quantizer, pack
from hubert_eff.quant.attention import (
    BinaryAttention,
    BinaryMix,
    BinaryRelativeAttention,
    BinarySparseAttention,
    BinaryWeights,
    Probabilities,
)
from hubert_eff.quant.runtime import KERNELS

FRAMES = (10_000, 20_000, 40_000)
TARGETS = {("dense", "avx512vpopcntdq"): 3.5, ("dense", "avx2"): 2.0}
SIMULATED = 1 / 1.3  # of the simulation with softmax
PEAK = """
import pathlib, re, sys, torch, hubert_eff
from hubert_eff.quant.packing import packed_copy
torch.set_num_threads(1)
model = packed_copy(hubert_eff.build("transformer-base+w1a1", encoder_layers=2))
def kilobytes(of):
    return int(re.search(of + ":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
with torch.no_grad():
    model.encoder(torch.randn(1, 100, 768))
    x = torch.randn(1, int(sys.argv[1]), 768)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    model.encoder(x)
print((kilobytes("VmHWM") - before) / 1024)
"""


class Shared(nn.Module):
    """Zipformer's weights and one user of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.mix = BinaryWeights(1, {}), BinaryMix(1, {})

    def forward(self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, d), p (B, H, T, 4), offsets (H, 2T - 1, 4)."""
        mixed: Tensor = self.mix(v, self.weights(q, k, p, offsets, None, 0.0))
        return mixed


def forms(heads: int, frames: int, width: int) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Every form, and what to call it with."""
    q, k, v = torch.randn(3, 1, heads, frames, width).unbind(0)
    r = torch.randn(heads, 2 * frames - 1, width)
    found: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "dense": (BinaryAttention(1, {}), (q, k, v, None, 0.0)),
        "relative": (BinaryRelativeAttention(1, {}), (q, q, k, r, v, None, 0.0)),
        "blocked": (BinarySparseAttention(1, {}), (q, k, v, None, 0.0, SparsePattern("fixed", 32, 8, 64))),
        "local": (BinarySparseAttention(1, {}), (q, k, v, None, 0.0, SparsePattern("local", 32, 8, 64))),
        "shared": (Shared(), (q / 8, k, q[..., :4], r[..., :4], v)),
    }
    for module, _ in found.values():
        for part in module.modules():
            if isinstance(part, Quantizer):
                nn.init.constant_(part.scale, 0.9)
                part.initialized.fill_(True)
        module.eval()
    return found


def with_softmax(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The simulation as it computes in training."""
    with mock.patch.object(Probabilities, "by_softmax", True):
        mixed: Tensor = module(*inputs)
    return mixed


def speed(
    shape: tuple[int, int, int], kernels: list[str], rounds: int, clock: Callable[[Callable[[], object]], float]
) -> list[dict[str, Any]]:
    """One row for each form and kernel, and one for each form's simulation."""
    q = torch.randn(1, *shape)
    rows = []

    def on(kernel: str, packed: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        os.environ[loader.VARIABLE] = kernel
        mixed: Tensor = packed(*inputs)
        return mixed

    for name, (module, inputs) in forms(*shape).items():
        packed, expected = pack(module), module(*inputs)
        for kernel in kernels:
            differ = int((on(kernel, packed, inputs) != expected).sum())
            assert differ == 0, f"{differ} results of {name} attention on {kernel} differ from the simulation"
        sides: dict[str, Callable[[], object]] = {"SDPA": lambda: F.scaled_dot_product_attention(q, q, q)}
        sides |= {kernel: partial(on, kernel, packed, inputs) for kernel in kernels}
        sides |= {"softmax": partial(with_softmax, module, inputs), "integers": partial(module, *inputs)}
        times = harness.compare(sides, rounds, clock)
        for kernel in kernels:
            target = TARGETS.get((name, kernel), 1.0)
            rows.append(harness.row(f"{name}, {kernel}", {"SDPA": times["SDPA"], "one bit": times[kernel]}, target))
        simulated = {side: times[side] for side in ("softmax", "integers")}
        rows.append(harness.row(f"{name}, simulation in eval mode", simulated, SIMULATED))
    return rows


def memory(lengths: list[int]) -> list[dict[str, Any]]:
    """Peak memory of two packed layers beyond that of 100 frames, by length."""
    found = []
    for frames in lengths:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, str(frames)], check=True, capture_output=True, text=True)
        found.append({"frames": frames, "mb": float(done.stdout), "kb_per_frame": float(done.stdout) * 1024 / frames})
    return found


def main() -> None:
    """Measure, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=15)
    options.add_argument("--kernels", nargs="+", choices=KERNELS, help="kernels to time (default: all that run here)")
    options.add_argument("--shape", nargs=3, type=int, default=(12, 499, 64), metavar=("HEADS", "FRAMES", "DIM"), help="default: 12 499 64")
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    options.add_argument("--memory", nargs="*", type=int, metavar="FRAMES", help=f"measure memory instead (default: {FRAMES})")
    args: argparse.Namespace = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory is not None:
        print(json.dumps(memory(args.memory or list(FRAMES)), indent=2))
        return
    runs = [name for name in KERNELS[:-1] if isinstance(loader._load(name), loader.Kernel)] or [KERNELS[-1]]
    clock = harness.cpu_seconds if args.cpu_time else harness.seconds
    with torch.no_grad():
        rows = speed(tuple(args.shape), args.kernels or runs, args.rounds, clock)
    harness.show(rows, harness.machine() | {"shape": tuple(args.shape), "clock": "CPU" if args.cpu_time else "wall"}, args.json)


if __name__ == "__main__":
    main()
