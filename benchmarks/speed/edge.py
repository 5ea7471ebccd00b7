"""Small devices: LayerNorm in half precision, what subsampling costs, a rewritten encoder beside the plain one, and all parts together.

    python benchmarks/speed/edge.py norms
    python benchmarks/speed/edge.py subsampling
    python benchmarks/speed/edge.py graph --rounds 9
    python benchmarks/speed/edge.py together

The paper behind all four is Xu et al. 2024, "Conformer-Based Speech Recognition on Extreme Edge-Computing Devices".
"""

from __future__ import annotations

import collections
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


class Moves(TorchDispatchMode):
    """Counts what torch runs that makes a tensor, and of that what only moves numbers."""

    MOVING = ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "index_select", "stack")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.copies = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("detach", "_unsafe_view", "empty", "new_empty", "empty_like"):
            self.operations += 1
            if name in self.MOVING:
                self.copies += 1
                self.bytes += result.numel() * result.element_size()
        return result


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that torch holds at most at a time while it runs, beside what is there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def together(layers: int) -> list[dict[str, object]]:
    """Operations, copies and peak memory of a HuBERT before and after each step, 10 s of audio; one-bit models have no such form."""
    import onnx

    from hubert_eff.exporting.onnx import export_onnx

    plain = hubert_eff.build("conformer-s", encoder_layers=layers).eval()
    trained = hubert_eff.build("conformer-edge", encoder_layers=layers).eval()
    forms = {
        "conformer-s, waveform front": fuse(plain), "conformer-edge, as trained": fuse(trained), "channels first": rewrite(trained),
        "and stable norms and softmax": rewrite(trained, stable=True), "and float16": rewrite(trained, half=True),
    }  # fmt: skip
    wav = torch.randn(1, round(SECONDS * 16_000))
    expected = trained.hidden_states(wav)[0][-1]
    table: list[dict[str, object]] = []
    for name, model in forms.items():
        with count_operations(model) as counts:
            states = model.hidden_states(wav)[0][-1]
        with Moves() as moves:
            model.hidden_states(wav)
        with tempfile.TemporaryDirectory() as folder:
            graph_of = export_onnx(model, Path(folder) / "model.onnx")
            nodes = collections.Counter(node.op_type for node in onnx.load(graph_of["file"]).graph.node if node.op_type != "Constant")
        total = counts.total()
        table.append({
            "form": name, "macs": total.macs, "element_ops": total.element_ops, "operations": moves.operations, "copies": moves.copies,
            "copied bytes": moves.bytes, "peak bytes": peak_memory(lambda m=model: m.hidden_states(wav)),
            "weight bytes": sum(t.numel() * t.element_size() for t in model.encoder.parameters()),
            "onnx nodes": nodes.total(), "onnx transposes": nodes["Transpose"], "onnx bytes": graph_of["bytes"],
            "onnx differs": graph_of["difference"],
            "differs": None if "waveform" in name else float((states.float() - expected).abs().max()),
        })  # fmt: skip
    return table


@torch.no_grad()
def main() -> None:
    """Run the parts that are named, print tables or JSON."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("parts", nargs="+", choices=("norms", "subsampling", "graph", "together"))
    options.add_argument("--preset", default="conformer-s", help="encoder of `graph` (default: conformer-s)")
    options.add_argument("--layers", type=int, default=4, help="number of blocks; exporting many takes minutes (default: 4)")
    options.add_argument("--frames", type=int, default=499, help="length of the input in frames (default: 499, 10 s)")
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
            result[part] = {"norms": norms, "subsampling": subsampling, "together": lambda: together(args.layers)}[part]()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(result["machine"])
    for part in args.parts:
        rows: list[dict[str, object]] = result[part]  # type: ignore[assignment]
        print(f"\n{part}")
        {"norms": show_norms, "subsampling": show_subsampling, "graph": show_graph, "together": show_together}[part](rows)


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


def show_together(rows: list[dict[str, object]]) -> None:
    """One line a form."""
    print(f"{'form':<30}{'MACs M':>9}{'element M':>11}{'operations':>12}{'copies':>8}{'MB':>7}{'peak MB':>9}{'weights MB':>12}"
          f"{'ONNX nodes':>12}{'transposes':>12}{'MB':>7}{'ONNX off':>10}{'off':>9}")  # fmt: skip
    for row in rows:
        macs, element, copied, peak, weights, size = (
            float(row[key]) / 1e6
            for key in ("macs", "element_ops", "copied bytes", "peak bytes", "weight bytes", "onnx bytes")  # type: ignore[arg-type]
        )
        off = "" if row["differs"] is None else f"{row['differs']:.1e}"
        print(f"{row['form']:<30}{macs:>9.0f}{element:>11.1f}{row['operations']:>12}{row['copies']:>8}{copied:>7.1f}{peak:>9.1f}{weights:>12.2f}"
              f"{row['onnx nodes']:>12}{row['onnx transposes']:>12}{size:>7.2f}{row['onnx differs']:>10.1e}{off:>9}")  # fmt: skip


if __name__ == "__main__":
    main()
