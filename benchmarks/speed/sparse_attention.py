"""Sparse self-attention against dense scaled dot-product attention, projections included.

    python benchmarks/speed/sparse_attention.py [--frames 499 1500 6000] [--threads 1] [--no-memory]

One layer of D 256 with 4 heads on random input: the dense side is the same module around torch's F.scaled_dot_product_attention; both have
the same weights. Training is forward and backward, without dropout (where torch's dense attention is at its fastest) and with 0.1, as in
the presets (where it runs unfused). Before anything is timed, each pattern is compared with dense attention under its mask. Memory is the
peak of a process of its own above what it held before, in training with dropout, up to 24,000 frames = 8 minutes of audio.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from hubert_eff.layers.attention import SelfAttention
from hubert_eff.layers.sparse import SparsePattern, SparseSelfAttention

DIM, HEADS = 256, 4
PATTERNS = {
    "fixed 128/8": SparsePattern("fixed", 128, 8, 64),
    "fixed 32/8": SparsePattern("fixed", 32, 8, 64),
    "local 64": SparsePattern("local", 128, 8, 64),
}
TARGETS = {("fixed 128/8", 6000, "inference"): 5.0, ("fixed 128/8", 6000, "training"): 5.0}
LONGEST = (6_000, 12_000, 24_000)
DROPOUT = {"inference": 0.0, "training": 0.0, "training, dropout 0.1": 0.1}


class DenseAttention(SelfAttention):
    """The same projections around torch's own attention."""

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `attend`: bool, broadcastable to (B, H, T, T)."""
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*self.heads_of(x), attn_mask=attend, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def sides(dropout: float) -> dict[str, SelfAttention]:
    """Dense attention, then every pattern, all with the same weights."""
    dense = DenseAttention(DIM, HEADS, dropout)
    modules: dict[str, SelfAttention] = {"dense": dense}
    for name, pattern in PATTERNS.items():
        modules[name] = SparseSelfAttention(DIM, HEADS, dropout, pattern)
        modules[name].load_state_dict(dense.state_dict())
    return modules


def check() -> float:
    """The largest difference between a pattern and dense attention under its mask."""
    frames, modules = 700, sides(0.0)
    i, j = torch.arange(frames)[:, None], torch.arange(frames)
    x, worst = torch.randn(1, frames, DIM), 0.0
    for name, pattern in PATTERNS.items():
        blocks = (i // pattern.stride == j // pattern.stride) | (j % pattern.stride >= pattern.stride - pattern.expressivity)
        mask = (i - j).abs() <= pattern.window if pattern.kind == "local" else blocks
        with torch.no_grad():
            worst = max(worst, float((modules[name](x) - modules["dense"](x, mask)).abs().max()))
    assert worst < 1e-5, f"the patterns differ from dense attention under their masks by {worst}: there is nothing to compare"
    return worst


def call(module: SelfAttention, x: Tensor, mode: str) -> Callable[[], object]:
    """One timed call."""
    module.train(mode != "inference")

    def infer() -> None:
        with torch.no_grad():
            module(x)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        module(x.detach().requires_grad_()).square().sum().backward()

    return infer if mode == "inference" else train


def peak(name: str, frames: int) -> float:
    """MB above the start of the process at the peak of one training step with dropout; run in a process of its own."""
    module, x = sides(DROPOUT["training, dropout 0.1"])[name], torch.randn(1, frames, DIM)
    call(module, x[:, :256], "training")()  # what the libraries set up once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(module, x, "training")()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_of_process(name: str, frames: int) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(frames)]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Check, time, measure memory, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--frames", type=int, nargs="+", default=[499, 1500, 6000], help="lengths to time (default: 499 1500 6000)")
    options.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory up to 24,000 frames")
    options.add_argument("--peak", nargs=2, metavar=("SIDE", "FRAMES"), help="print only the peak memory of one side, in MB")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1])))
        return
    # first, since a process starts with the peak of the one that starts it
    memory = {name: {frames: peak_of_process(name, frames) for frames in LONGEST} for name in PATTERNS} if args.memory else {}
    before, error = harness.guard("before the run"), check()
    rows = []
    for frames in args.frames:
        x = torch.randn(1, frames, DIM)
        for mode, dropout in DROPOUT.items():
            times = harness.compare({name: call(module, x, mode) for name, module in sides(dropout).items()}, args.rounds)
            for name in PATTERNS:
                pair = {"dense": times["dense"], name: times[name]}
                rows.append(harness.row(f"T {frames}, {mode}", pair, TARGETS.get((name, frames, mode), 1.0)))
    after = harness.guard("after the run")
    facts = harness.machine() | {"largest_difference": error, "probe": [round(before, 1), round(after, 1)]}
    if memory:
        facts["peak_mb_training_dropout"] = memory
    harness.show(rows, facts, args.json)


if __name__ == "__main__":
    main()
