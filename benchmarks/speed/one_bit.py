"""Linear layers at one bit, packing of their input included, against torch's float and int8 ones.

    python benchmarks/speed/one_bit.py [--kernels avx512vpopcntdq avx2] [--threads 1] [--rounds 15] [--cpu-time]

One binary layer of each shape is packed and compared with its simulation to the last bit before anything is timed; the others are
`F.linear` in float32 (what `nn.Linear` calls), the same product by oneDNN, bfloat16, int8 with dynamic quantization of the input (torch's,
and oneDNN's products on bfloat16: int8_linear.py), and larq-compute-engine's binary layer where that is installed. What counts is the
ratio against the fastest of them, which the last lines say. A feed-forward module is two such layers with a ReLU between them, in float
with a GELU; its first layer hands bits to the second one. The depthwise convolution and the attention products are for information.

On a processor with AMX products by tiles and by popcounts are timed side by side too, for the rule that chooses between them
(`hubert_eff.kernels.loader.for_product`). HUBERT_EFF_KERNEL chooses a kernel anywhere else.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import harness
import int8_linear
import larq_layer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubert_eff.kernels import loader
from hubert_eff.layers.convolution import DepthwiseConv
from hubert_eff.layers.kinds import FEED_FORWARD, Kind
from hubert_eff.layers.linear import product
from hubert_eff.quant import BinaryConv1d, BinaryLinear, Quantizer, pack
from hubert_eff.quant.attention import BinaryAttention
from hubert_eff.quant.runtime import KERNELS, kernel_in_use, ops

CHUNK = 16  # frames
SHAPES = ((499, 768, 3072), (499, 3072, 768), (499, 256, 1024), (CHUNK, 768, 3072), (3000, 768, 3072))
ATTENTION_TARGETS = {"avx2": 2.0, loader.POPCOUNT: 3.5, loader.AMX: 3.5}  # times as fast as SDPA
RULE_ROWS, RULE_INPUTS, RULE_OUTPUTS = (4, 8, 16, 32, 128, 499), (64, 128, 256, 768, 3072), 768
cpu_time = False  # --cpu-time


class FeedForward(nn.Module):
    """Two linear layers and what stands between them."""

    def __init__(self, dim: int, inner: int, binary: bool) -> None:
        super().__init__()
        self.fc1: nn.Module = BinaryLinear(dim, inner) if binary else nn.Linear(dim, inner)
        self.fc2: nn.Module = BinaryLinear(inner, dim, signed=False) if binary else nn.Linear(inner, dim)
        self.activation: Callable[[Tensor], Tensor] = F.relu if binary else F.gelu

    def kinds(self) -> dict[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {"fc1": Kind(FEED_FORWARD), "fc2": Kind(FEED_FORWARD, signed=False, activation="activation")}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


def started(module: nn.Module) -> nn.Module:
    """The module with scales as after a first batch."""
    for part in module.modules():
        if isinstance(part, Quantizer):
            nn.init.constant_(part.scale, 0.7)
    return module.eval()


def checked(module: nn.Module, *inputs: Any) -> nn.Module:
    """The packed form of a binary module, which must give the same result."""
    packed = pack(started(module))
    differ = int((packed(*inputs) != module(*inputs)).sum())
    assert differ == 0, f"{differ} results of {module} differ from the simulation: there is nothing to compare"
    return packed


def int8(module: nn.Module) -> nn.Module:
    """Dynamic int8 quantization of the linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)


def rows_of(
    what: str, others: dict[str, Callable[[], object]], ours: Callable[[], object], rounds: int, target: float = 1.0, calls: int = 1
) -> list[dict[str, Any]]:
    """One row per peer: all sides in the same rounds, so many calls of each in a row."""
    clock = harness.cpu_seconds if cpu_time else harness.seconds
    times = harness.compare({**others, "one bit": ours}, rounds, lambda call: clock(lambda: [call() for _ in range(calls)]) / calls)
    return harness.best_marked([harness.row(what, {name: times[name], "one bit": times["one bit"]}, target) for name in others])


def int8_on_bfloat16(half: nn.Module, wide: Tensor) -> dict[str, Callable[[], object]]:
    """The same module with oneDNN's int8 products, where there are any."""
    small = int8_linear.with_int8_linears(half)
    return {} if small is None else {"bfloat16, oneDNN int8": lambda: small(wide)}


def linear(shape: tuple[int, int, int], rounds: int, what: str) -> list[dict[str, Any]]:
    """One layer."""
    frames, inputs, outputs = shape
    x, layer = torch.randn(frames, inputs), nn.Linear(inputs, outputs)
    packed, small = checked(BinaryLinear(inputs, outputs), x), int8(nn.Sequential(layer))
    half, wide = nn.Linear(inputs, outputs).bfloat16(), x.bfloat16()
    folded = layer.weight.t().contiguous().t()
    others: dict[str, Callable[[], object]] = {
        "F.linear": lambda: F.linear(x, layer.weight, layer.bias),
        "oneDNN": lambda: product(x, folded, layer.bias),
        "bfloat16": lambda: half(wide),
        "int8 dynamic": lambda: small(x),
        **int8_on_bfloat16(half, wide),
        **larq_layer.layer(*shape),
    }
    calls = 10 if frames <= CHUNK else 1  # as in a stream, where the layer before has run the same code
    return rows_of(f"{what}, linear {shape}", others, lambda: packed(x), rounds, calls=calls)


def feed_forward(rounds: int, what: str) -> list[dict[str, Any]]:
    """Two layers with bits between them."""
    x, layers = torch.randn(499, 768), FeedForward(768, 3072, False)
    packed, small = checked(FeedForward(768, 3072, True), x), int8(FeedForward(768, 3072, False))
    half, wide = FeedForward(768, 3072, False).bfloat16(), x.bfloat16()
    others: dict[str, Callable[[], object]] = {
        "F.linear": lambda: layers(x), "bfloat16": lambda: half(wide), "int8 dynamic": lambda: small(x), **int8_on_bfloat16(half, wide),
    }  # fmt: skip
    return rows_of(f"{what}, feed-forward (499, 768, 3072)", others, lambda: packed(x), rounds)


def products(rounds: int, what: str) -> list[dict[str, Any]]:
    """Attention products with their softmax, and a depthwise convolution."""
    q, k, v = torch.randn(3, 1, 12, 499, 64).unbind(0)
    attention = checked(BinaryAttention(1, {}), q, k, v, None, 0.0)
    x, float_conv = torch.randn(1, 499, 256), DepthwiseConv(256, 31)
    conv = checked(BinaryConv1d(256, 256, 31, groups=256, bias=False), x)
    sdpa = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}
    target = ATTENTION_TARGETS.get(what, 1.0)
    return [
        *rows_of(f"{what}, attention (12, 499, 64)", sdpa, lambda: attention(q, k, v, None, 0.0), rounds, target),
        *rows_of(f"{what}, depthwise (499, 256), k 31", {"float": lambda: float_conv(x)}, lambda: conv(x), rounds),
    ]


def choices(rounds: int) -> list[dict[str, Any]]:
    """Products by popcounts against the same on AMX, of few and many rows and inputs, and what the rule takes."""
    clock = harness.cpu_seconds if cpu_time else harness.seconds
    kernel, rows = loader._load(loader.AMX), []
    for frames in RULE_ROWS:
        for inputs in RULE_INPUTS:
            a, b = ops.pack(torch.randn(frames, inputs)), ops.panels_from(ops.pack(torch.randn(RULE_OUTPUTS, inputs)))

            def by(name: str, a: Tensor = a, b: Tensor = b, inputs: int = inputs) -> Callable[[], object]:
                def call() -> object:
                    os.environ[loader.VARIABLE] = name
                    return ops.product(a, b, RULE_OUTPUTS, inputs, True)

                return call

            times = harness.compare({name: by(name) for name in (loader.POPCOUNT, loader.AMX)}, rounds, clock)
            os.environ[loader.VARIABLE] = ""
            taken = loader.for_product(kernel, frames, inputs).name
            rows.append(harness.row(f"rule takes {taken}, product {(frames, inputs, RULE_OUTPUTS)}", times, 1.0))
    return rows


@torch.no_grad()
def main() -> None:
    """Check, time, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=15)
    options.add_argument("--kernels", nargs="+", choices=KERNELS, help="kernels to time (default: all that run here)")
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    args = options.parse_args()
    global cpu_time
    cpu_time = args.cpu_time
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    runs = [name for name in KERNELS[:-1] if isinstance(loader._load(name), loader.Kernel)] or [KERNELS[-1]]
    before, rows = harness.guard("before the run"), []
    for kernel in args.kernels or runs:
        os.environ[loader.VARIABLE] = kernel
        assert kernel_in_use() == kernel
        for shape in SHAPES:
            rows += linear(shape, args.rounds, kernel)
        rows += feed_forward(args.rounds, kernel) + products(args.rounds, kernel)
    compared = choices(args.rounds) if loader.AMX in runs else []
    after = harness.guard("after the run")
    facts = harness.machine() | {"kernels": " ".join(args.kernels or runs), "clock": "CPU" if cpu_time else "wall"}
    facts |= {"probe": [round(before, 1), round(after, 1)], "larq-compute-engine": larq_layer.version() or "not installed"}
    if loader.AMX not in runs:
        facts["AMX"] = "none here: not timed"
    if not args.json:
        for line in rows + compared:  # the shared table has 0.1 ms
            line["what"] += f" [{line['ms'][1]:.3f} ms]"
    harness.show(rows + compared, facts, args.json)


if __name__ == "__main__":
    main()
