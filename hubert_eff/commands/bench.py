"""`hubert-eff bench PRESET|CHECKPOINT...`: measured latency, memory and throughput, and where the time goes; `--roofline`: this CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..config import COUNT
from ..errors import UserError
from ._numbers import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff bench`."""
    parser.add_argument(
        "models", nargs="*", metavar="PRESET|CHECKPOINT",
        help="presets or checkpoints to measure in turn; one-bit models run from packed bits"
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[1.0, 5.0, 10.0, 30.0], metavar="S", help="lengths of audio (default: 1 5 10 30)"
    )
    parser.add_argument("--batch", type=whole(COUNT), nargs="+", default=[1], metavar="B", help="batch sizes in utterances (default: 1)")
    parser.add_argument("--threads", type=whole(COUNT), default=1, help="number of torch threads (default: %(default)d)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument(
        "--precision", type=_precision, choices=("float32", "bfloat16", "int8", "w1a1"), nargs="+", default=["float32"],
        help="precisions to measure, each in the form that is shipped: fused, with int8 linear layers in the encoder, or at one bit and "
        "packed; one-bit models always run from bits (default: float32)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=whole(COUNT), default=20, help="timed calls of each model on each input (default: %(default)d)")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="count CPU time of one thread instead of wall time in the first table, for a machine that others use too",
    )  # fmt: skip
    parser.add_argument(
        "--roofline", action="store_true", help="measure the peak rates of this CPU and write a device file for hubert-eff profile"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for bench.json, bench.svg and bench.png; for cpu.yaml with --roofline"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _precision(name: str) -> str:
    """The name of a precision in this command, which also takes those of `export --dtype`."""
    if name in ("fp16", "float16"):
        raise argparse.ArgumentTypeError(f"{name} is a storage format on a CPU: such a file computes in float32; give float32 or bfloat16")
    return {"fp32": "float32", "bf16": "bfloat16"}.get(name, name)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0, or 1 if this process runs abnormally slowly."""
    import torch

    from ..profiling.machine import SlowProcessError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; hubert-eff doctor says more")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _roofline(args) if args.roofline else _bench(args)
    except SlowProcessError as error:
        print(f"hubert-eff bench: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)


def _bench(args: argparse.Namespace) -> int:
    from ..checkpoints.open import open_model
    from ..profiling.latency import measure, measure_shares, plain
    from ..profiling.machine import busy, machine
    from ..profiling.precision import ONE_BIT, at_precision, require, shipped
    from ..reports import bench as bench_report
    from ..reports.tables import show
    from ..utils.files import writable, write_json

    if not args.models:
        raise UserError("name one or more presets or checkpoints, or ask for --roofline")
    if args.out is not None:
        writable(args.out)  # before minutes of measuring
    for precision in dict.fromkeys(args.precision):
        require(precision, args.device)
    if args.cpu_time and (args.threads > 1 or args.device != "cpu"):
        raise UserError("--cpu-time counts one thread of a CPU: leave out --threads and --device")
    models = {}
    for name in args.models:
        model = open_model(name)
        for precision in args.precision:
            if precision == ONE_BIT:
                models[name if model.config.quant == ONE_BIT else f"{name}+{ONE_BIT}"] = at_precision(model, precision)
            else:
                models[name if precision == "float32" else f"{name} {precision}"] = at_precision(shipped(model), precision)
    timings = measure(models, args.seconds, args.batch, args.rounds, args.device, args.cpu_time)
    shares = [
        measure_shares(name, model, length, max(1, args.rounds // 4), args.device)
        for length in dict.fromkeys(args.seconds)
        for name, model in models.items()
    ]
    longest = [s for s in shares if s.seconds == max(args.seconds)]
    if args.device == "cpu" and not args.cpu_time and (said := busy()):
        print(f"hubert-eff bench: warning: {said}; measure again on an idle machine, or use --cpu-time", file=sys.stderr)
    facts = machine(args.device) | {"clock": "CPU time" if args.cpu_time else "wall"}
    result = {"basis": "measured", "machine": facts, "timings": [plain(t) for t in timings], "shares": [plain(s) for s in shares]}
    if args.out is not None:
        write_json(args.out / "bench.json", result)
        bench_report.draw(timings, longest, args.out)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(bench_report.render(timings, longest, facts))
    return 0


def _roofline(args: argparse.Namespace) -> int:
    from ..profiling.machine import guard, measure_roofline
    from ..utils.files import writable, write_text

    if args.models or args.device != "cpu":
        raise UserError("--roofline measures this CPU and nothing else: leave out the models and --device")
    if args.out is not None:
        writable(args.out)
    guard("before the roofline")
    device = measure_roofline()
    if args.out is not None:
        write_text(args.out / "cpu.yaml", device.to_yaml())
    if args.json:
        print(json.dumps({"basis": "measured", **device.to_dict()}, indent=2))
    else:
        print(device.to_yaml(), end="")
    return 0
