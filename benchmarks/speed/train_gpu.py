"""One pre-training update on a GPU: ours, plain and compiled, against fairseq's HuBERT of the same sizes, weights, audio and masks.

    python benchmarks/speed/train_gpu.py [--only transformer conformer sparse] [--audio 87.5 36.5] [--precision bf16] [--out FILE.json]
    python benchmarks/speed/train_gpu.py --loader [--data DIR]          audio-seconds per second of one loading process (needs fairseq)
    python benchmarks/speed/train_gpu.py --device cpu --debug           everything on tiny models: that it runs, no figure worth reading

Without fairseq the other side is restated.py, marked `restated` in every line; --restated asks for it. Loss and gradients of all sides are
compared in float32 without dropout, on a short batch, before anything is timed. What is compared:

    bf16       bf16 weights, float32 copies for the optimizer, which is what fairseq makes of common.bf16=true, on both sides
    autocast   float32 weights under torch.autocast(bfloat16) on both sides; fairseq itself offers no such training
    float32    (TF32 off)

Sides: the peer with fairseq's Adam; ours `eager` with the same Adam; `+ fused` with the optimizer fused_adam;
`+ compiled` also with model.compile_blocks=true and, as task.length_buckets makes them, batches without padding mask. LayerDrop is off. The
sparse row is sparseformer-dn-s at 60 s with FlexAttention, which needs attention_dropout=0, set on both sides; its peer is the dense
Transformer of the same sizes. Medians over interleaved rounds; MFU is 3 x the FLOP of a forward pass (`hubert_eff.profile`, loss head left
out) over time and the peak of configs/device. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sides import PAIRS, Bench, Pair, Side, check, make_sides, samples_of

import hubert_eff
from hubert_eff.layers import compiling
from hubert_eff.utils.files import write_json


def seconds_per_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean time of some calls in a row, by the GPU's own clock where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def peak_bytes(side: Side, device: torch.device) -> int | None:
    """Peak of an update on a GPU, with what the side holds all the time; other sides' weights left out."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + side.resident()


def forward_flop(bench: Bench, pair: Pair, seconds: float) -> dict[str, float] | None:
    """FLOP of a forward pass of one utterance, of ours and of the peer; None without pyyaml, which the profiler needs."""
    try:
        from hubert_eff import profile
    except ImportError:
        return None
    ours = 2.0 * profile(bench.our_model(pair).cpu(), seconds=seconds).macs
    if not pair.sparse:
        return {"ours": ours, "peer": ours}
    config = bench.our_model(pair).config
    keys = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_feature_layers")
    dense = hubert_eff.build("transformer-base", **{key: getattr(config, key) for key in keys})
    return {"ours": ours, "peer": 2.0 * profile(dense, seconds=seconds).macs}


def peak_rate(device: torch.device, bits: int) -> float | None:
    """FLOP per second of this GPU by the file in configs/device whose name is part of the GPU's; None: there is none."""
    if device.type != "cuda":
        return None
    try:
        from hubert_eff.profiling import list_devices, read_device
    except ImportError:
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((1e12 * read_device(d).rate(bits) for d in list_devices() if d in name), None)


def measure(bench: Bench, pair: Pair, audio: float, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Time all sides of one pair at about `audio` seconds per update."""
    utterances = max(1, round(audio / pair.utterance))
    samples = samples_of(min(audio / utterances, pair.utterance) if not pair.sparse else pair.utterance)
    if bench.debug:
        utterances, samples = 2, samples_of(1.6)
    seconds = utterances * samples / 16_000
    flop, rate = forward_flop(bench, pair, samples / 16_000), peak_rate(bench.device, 32 if bench.precision == "float32" else 16)
    sides: dict[str, Side] = {}
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, make in make_sides(bench, pair, utterances, samples).items():
        try:
            sides[name] = make()
            for _ in range(1 if bench.debug else 4):  # the first compiles
                sides[name].step()
            times[name] = []
        except torch.cuda.OutOfMemoryError:
            sides.pop(name, None)
            torch.cuda.empty_cache()
            failed[name] = "out of memory"
    peaks = {name: peak_bytes(side, bench.device) for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(seconds_per_call(side.step, calls, bench.device))
    rows = []
    for name in (*sides, *failed):
        row: dict[str, Any] = {
            "what": f"{pair.name}, {utterances} x {samples / 16_000:.2f} s", "side": name, "peer": bench.peer_name,
            "precision": bench.precision, "target": pair.target if name == "+ compiled" else None,
        }  # fmt: skip
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        middle, peak = statistics.median(times[name]), peaks[name]
        work = None if flop is None else 3 * utterances * flop["peer" if name == bench.peer_name else "ours"]
        ratios = [a / b for a, b in zip(times.get(bench.peer_name, []), times[name])]
        rows.append(
            row
            | {
                "ms": 1e3 * middle,
                "updates_per_s": 1 / middle,
                "audio_s_per_s": seconds / middle,
                "peak_gb": None if peak is None else peak / 1e9,
                "mfu": None if work is None or rate is None else work / middle / rate,
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_range": [min(ratios), max(ratios)] if ratios else None,
            }
        )
    return rows


def facts(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "none: a smoke test, no measurement"
    return {
        "gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "precision": bench.precision, "peer": bench.peer_name,
        "compiler": compiling.BACKEND, "debug": bench.debug, "cpus": os.cpu_count(),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    width, side = max(len(r["what"]) for r in rows), max(len(r["side"]) for r in rows)
    columns = f"{'ms':>9} {'updates/s':>10} {'audio-s/s':>10} {'peak GB':>8} {'MFU':>6}"
    print(f"{'':<{width}}  {'':<{side}} {columns}  faster than {rows[0]['peer']}")
    for r in rows:
        if "failed" in r:
            print(f"{r['what']:<{width}}  {r['side']:<{side}} {r['failed']}")
            continue
        peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.2f}"
        mfu = "-" if r["mfu"] is None else f"{100 * r['mfu']:.1f}%"
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}x ({r['ratio_range'][0]:.2f} - {r['ratio_range'][1]:.2f})"
        target = "" if r["target"] is None else f"; target {r['target']:g}x"
        print(
            f"{r['what']:<{width}}  {r['side']:<{side}} {r['ms']:9.2f} {r['updates_per_s']:10.2f} {r['audio_s_per_s']:10.0f} {peak:>8} "
            f"{mfu:>6}  {ratio}{target}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS), help="some of the pairs (default: all)")
    options.add_argument("--audio", type=float, nargs="+", default=[87.5, 36.5], help="seconds of audio per update (default: 87.5 36.5)")
    options.add_argument("--precision", choices=("bf16", "autocast", "float32"), default="bf16")
    options.add_argument("--rounds", type=int, default=7, help="timed rounds of each side (default: 7)")
    options.add_argument("--calls", type=int, default=5, help="number of updates in a round (default: 5)")
    options.add_argument("--restated", action="store_true", help="compare with restated.py even if fairseq is installed")
    options.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --debug (default: cuda)")
    options.add_argument("--debug", action="store_true", help="use tiny models and one round, to see whether it runs")
    options.add_argument("--loader", action="store_true", help="measure one loading process instead, on the CPU (needs fairseq)")
    options.add_argument("--data", type=Path, help="with --loader: a folder of train.tsv and labels at 100 per second (default: generated)")
    options.add_argument("--out", type=Path, help="write the figures to this JSON file, after each pair")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check and time every pair; print a table. Returns the exit code."""
    args = parse(arguments)
    if args.loader:
        try:
            from loading import measure as measure_loading
        except ImportError as error:
            print(f"not measured: --loader needs fairseq ({error})", file=sys.stderr)
            return 2
        loading = measure_loading(args.data, args.audio, args.debug)
        if args.out:
            write_json(args.out, loading)
        return 0
    if args.device == "cpu" and not args.debug:
        print("--device cpu only goes with --debug: a CPU says nothing about a GPU", file=sys.stderr)
        return 2
    if args.device != "cpu" and not torch.cuda.is_available():
        print("not measured: no CUDA device (--device cpu --debug shows that the benchmark runs)", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the check compares in float32
    if args.debug:
        compiling.BACKEND = "eager"  # inductor would take minutes to show the same
        args.rounds = args.calls = 1
    bench = Bench(args)
    result: dict[str, Any] = {"machine": facts(bench), "relative_difference": {}, "rows": []}
    print(", ".join(f"{name}: {value}" for name, value in result["machine"].items()), flush=True)
    for name in args.only:
        pair = PAIRS[name]
        result["relative_difference"][pair.name] = errors = check(bench, pair)
        print(f"{pair.name}: relative differences " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()), flush=True)
        # the sparse pair has one length of 60 s; the longest audio says how many of them
        for audio in args.audio[:1] if pair.sparse or args.debug else args.audio:
            rows = measure(bench, pair, audio, args.rounds, args.calls)
            show(rows)
            result["rows"] += rows
            if args.out:
                write_json(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
