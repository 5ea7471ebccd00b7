"""Small devices: LayerNorm in half precision, what subsampling costs, and a rewritten encoder beside the plain one.

    python benchmarks/speed/edge.py norms
    python benchmarks/speed/edge.py subsampling
    python benchmarks/speed/edge.py graph --rounds 9

The paper behind all three is Xu et al. 2024, "Conformer-Based Speech Recognition on Extreme Edge-Computing Devices".
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hubert_eff
from hubert_eff.edge import rewrite
from hubert_eff.edge.numerics import UNIT, mad_layer_norm, naive_layer_norm
from hubert_eff.models.fuse import fuse
from hubert_eff.models.logmel import LogMel, Subsampling
from hubert_eff.profiling import profile
from hubert_eff.profiling.counters import count_operations
from hubert_eff.quant.quantization import int8_linears

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as written": naive_layer_norm,
    "MAD": lambda x: mad_layer_norm(x, bounded=False),
    "MAD with D": mad_layer_norm,
}
SECONDS = 10.0


def vectors(channels: int, rows: int = 500) -> Iterator[tuple[str, Tensor]]:
    """What a norm may be given in float16, (rows, channels)."""
    noise = torch.randn(rows, channels)
    yield "N(0, 1)", noise
    yield "N(0, 1e3)", noise * 1e3
    yield "N(0, 1), one value 3e4", noise.index_fill(1, torch.tensor([0]), 3e4)
    yield "zero but for one 65504", torch.zeros(rows, channels).index_fill(1, torch.tensor([0]), 65_504.0)
    yield "+-3e4, others zero", torch.zeros(rows, channels).index_fill(1, torch.tensor([0]), 3e4).index_fill(1, torch.tensor([1]), -3e4)
    yield "65504, one -65504", torch.full((rows, channels), 65_504.0).index_fill(1, torch.tensor([0]), -65_504.0)
    yield "Cauchy", (noise / torch.randn(rows, channels).abs().clamp(min=1e-3)).clamp(-6e4, 6e4)
    yield "N(1000, 50)", noise * 50 + 1_000


def norms() -> list[dict[str, object]]:
    """Share of vectors that are not finite, or further from float64 than the stated bound; and the largest error in units of the bound."""
    table: list[dict[str, object]] = []
    for channels in (144, 768):
        for what, x in vectors(channels):
            exact = x.half().double()
            expected = F.layer_norm(exact, (channels,))
            deviation = (exact.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            bound = 4 * UNIT * (1 + expected.abs() + exact.mean(-1, keepdim=True).abs() / deviation)
            row: dict[str, object] = {"channels": channels, "input": what}
            for name, norm in NORMS.items():
                error = ((norm(x.half()).double() - expected).abs() / bound).nan_to_num(torch.inf).amax(-1)
                row[name] = {"outside": float((error > 1).double().mean()), "worst": float(error.amax())}
            table.append(row)
    return table


class Pipeline(nn.Module):
    """Log-mel, subsampling to 40 ms, the blocks of an encoder: the Conformer of the edge paper."""

    def __init__(self, preset: str, separable: bool) -> None:
        super().__init__()
        model = hubert_eff.build(preset).eval()
        self.mel, self.encoder = LogMel(), model.encoder
        self.front = Subsampling(model.config.input_dim, separable, rates=(2, 2))

    def forward(self, wave: Tensor) -> Tensor:
        x: Tensor = self.front(self.mel(wave))
        frames = self.encoder.frames(x)
        for block in self.encoder.layers:
            x = block(x, frames)
        return x


def subsampling() -> list[dict[str, object]]:
    """Share of the front in all MACs of 10 s, full and separable."""
    table: list[dict[str, object]] = []
    for preset in ("conformer-s", "conformer-m", "conformer-l"):
        for separable in (False, True):
            pipeline = Pipeline(preset, separable)
            with torch.no_grad(), count_operations(pipeline) as counts:
                pipeline(torch.randn(1, round(SECONDS * 16_000)))
            convolutions = sum(counts.total(f"front.{name}").macs for name in ("conv1", "conv2", "depthwise"))
            linear, total = counts.total("front.linear").macs, counts.total().macs
            table.append({"model": f"{preset}, 40 ms", "second convolution": "separable" if separable else "full",
                          "convolutions": convolutions, "linear": linear, "total": total})  # fmt: skip
    for front in ("fastconv", "logmel-conv", "logmel-dws", "conv-embed"):
        cost = profile(hubert_eff.build("conformer-s", conv_feature_layers=front), SECONDS)
        macs = {module.name: module.macs for module in cost.modules.walk()}
        linear = macs.get("feature_extractor.front.linear", 0)
        table.append({"model": "conformer-s HuBERT, 20 ms", "second convolution": front,
                      "convolutions": macs["feature_extractor"] - linear, "linear": linear, "total": cost.macs})  # fmt: skip
    return table


def graph(preset: str, layers: int, frames: int, rounds: int, threads: int) -> list[dict[str, object]]:
    """Time of the encoder as it is (fused), with int8 linear layers, and rewritten: eager, and in onnxruntime."""
    import onnxruntime

    model = hubert_eff.build(preset, encoder_layers=layers).eval()
    plain, grid = fuse(model).encoder, rewrite(model).encoder
    int8 = int8_linears(plain)
    x = torch.randn(1, frames, model.config.input_dim)
    sides: dict[str, Callable[[], object]] = {
        "eager, plain": lambda: plain(x), "eager, rewritten": lambda: grid(x), "eager, plain int8": lambda: int8(x)
    }  # fmt: skip
    errors = {"eager, rewritten": float((grid(x) - plain(x)).abs().max())}
    with tempfile.TemporaryDirectory() as folder:
        for name, encoder in (("plain", plain), ("rewritten", grid)):
            path = str(Path(folder) / f"{name}.onnx")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(encoder, (x,), path, dynamo=True, verbose=False, input_names=["x"], output_names=["y"])
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            sides[f"onnxruntime, {name}"] = lambda s=session: s.run(None, {"x": x.numpy()})
            errors[f"onnxruntime, {name}"] = float((torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) - plain(x)).abs().max())
    times = harness.compare(sides, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"form": name, "ms": seconds * 1e3, "rtf": seconds / (frames / 50), "speed over plain eager": medians["eager, plain"] / seconds,
         "largest difference": errors.get(name)}
        for name, seconds in medians.items()
    ]  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Run the parts that are named, print tables or JSON."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("parts", nargs="+", choices=("norms", "subsampling", "graph"))
    options.add_argument("--preset", default="conformer-s", help="encoder of `graph` (default: conformer-s)")
    options.add_argument("--layers", type=int, default=4, help="its blocks: exporting many takes minutes (default: 4)")
    options.add_argument("--frames", type=int, default=499, help="length of its input: 499 is 10 s (default)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    result: dict[str, object] = {"machine": harness.machine()}
    for part in args.parts:
        if part == "graph":
            before = harness.guard("before the run")
            result[part] = graph(args.preset, args.layers, args.frames, args.rounds, args.threads)
            result["probe"] = [before, harness.guard("after the run")]
        else:
            result[part] = norms() if part == "norms" else subsampling()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(result["machine"])
    for part in args.parts:
        rows: list[dict[str, object]] = result[part]  # type: ignore[assignment]
        print(f"\n{part}")
        {"norms": show_norms, "subsampling": show_subsampling, "graph": show_graph}[part](rows)


def show_norms(rows: list[dict[str, object]]) -> None:
    """Vectors outside the bound, largest error in units of the bound."""
    print(f"{'C':>4}  {'float16 input':<24}" + "".join(f"{name + ': outside, worst':>30}" for name in NORMS))
    for row in rows:
        cells = "".join(f"{row[name]['outside']:>18.1%}, {row[name]['worst']:>10.2g}" for name in NORMS)  # type: ignore[index]
        print(f"{row['channels']:>4}  {row['input']:<24}{cells}")


def show_subsampling(rows: list[dict[str, object]]) -> None:
    """MACs in millions and shares of the total."""
    print(f"{'model':<27}{'front':<12}{'convs M':>9}{'linear M':>10}{'total M':>10}{'convs':>8}{'with linear':>13}")
    for row in rows:
        convolutions, linear, total = (float(row[key]) for key in ("convolutions", "linear", "total"))  # type: ignore[arg-type]
        print(f"{row['model']:<27}{row['second convolution']:<12}{convolutions / 1e6:>9.1f}{linear / 1e6:>10.1f}{total / 1e6:>10.1f}"
              f"{convolutions / total:>8.1%}{(convolutions + linear) / total:>13.1%}")  # fmt: skip


def show_graph(rows: list[dict[str, object]]) -> None:
    """Times, and how many times as fast as the plain eager encoder."""
    for row in rows:
        difference = "" if row["largest difference"] is None else f"   differs by {row['largest difference']:.1e}"
        print(f"{row['form']:<24}{row['ms']:>9.1f} ms   RTF {row['rtf']:.4f}   {row['speed over plain eager']:>6.2f}x{difference}")


if __name__ == "__main__":
    main()
