"""torch.export programs: how near they are to the model at lengths that were not traced, and how fast beside it, as AOTInductor too.

    python benchmarks/speed/exported.py parity
    python benchmarks/speed/exported.py times --presets conformer-s --seconds 1 10

`parity`: one program per preset, at every length alone and in a batch of two with padding. `times`: the model as it is, fused, its program
run by torch, and the program compiled by AOTInductor, in turn. Compiling needs a C++ compiler.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.exporting.pt2 import export_pt2
from hubert_eff.models.fuse import fuse
from hubert_eff.models.hubert import HubertModel

PRESETS = ("transformer-base", "conformer-s", "squeezeformer-xs", "sparseformer-dn-s", "fusionformer-s", "zipformer-s")
SECONDS = (0.1, 1.0, 7.3, 60.0)
EAGER = "eager"


def trained(preset: str) -> HubertModel:
    """A model whose BatchNorms have seen something."""
    torch.manual_seed(0)
    model = hubert_eff.build(preset).train()
    model.hidden_states(torch.randn(2, 16_000))
    return model.eval()


def audio(seconds: float, batch: int) -> tuple[Tensor, Tensor]:
    """Noise and, in a batch, padding of a quarter of its last row."""
    samples = round(seconds * 16_000)
    padding = torch.zeros(batch, samples, dtype=torch.bool)
    if batch > 1:
        padding[-1, 3 * samples // 4 :] = True
    return torch.randn(batch, samples), padding


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of all hidden states."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def program_of(model: HubertModel, folder: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program as its file holds it; what its file is, and seconds to write it."""
    path, figures = folder / "model.pt2", {}
    took = harness.seconds(lambda: figures.update(export_pt2(model, path)))
    return torch.export.load(path), {"megabytes": figures["bytes"] / 1e6, "export_seconds": took}


def parity(preset: str, lengths: list[float]) -> dict[str, Any]:
    """Largest differences by length, alone and in a batch."""
    model = trained(preset)
    with tempfile.TemporaryDirectory() as folder:
        program, figures = program_of(model, Path(folder))
    run = program.module()
    differences = {}
    for seconds in lengths:
        for batch in (1, 2):
            inputs = audio(seconds, batch)
            expected = model.hidden_states(*inputs)[0]
            differences[f"{seconds:g} s x {batch}"] = apart(run(*inputs)[0], expected)
    largest = max(float(state.abs().max()) for state in expected)
    return {"preset": preset, **figures, "largest_value": largest, "differences": differences}


def times(preset: str, lengths: list[float], rounds: int, clock: Callable[..., float]) -> list[dict[str, Any]]:
    """Medians in ms of the model, fused, its program, and what AOTInductor makes of it."""
    model = trained(preset)
    fused = fuse(model)
    with tempfile.TemporaryDirectory() as folder:
        program, figures = program_of(model, Path(folder))
        package = Path(folder) / "compiled.pt2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            took = harness.seconds(lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(package)))
        compiled = torch._inductor.aoti_load_package(str(package))
    run, rows = program.module(), []
    for seconds in lengths:
        inputs = audio(seconds, 1)
        sides: dict[str, Callable[[], Any]] = {
            EAGER: lambda x=inputs: model.hidden_states(*x), "fused": lambda x=inputs: fused.hidden_states(*x),
            "program": lambda x=inputs: run(*x), "AOTInductor": lambda x=inputs: compiled(*x),
        }  # fmt: skip
        expected = sides[EAGER]()[0]
        differences = {name: apart(side()[0], expected) for name, side in sides.items() if name != EAGER}
        medians = {name: statistics.median(t) for name, t in harness.compare(sides, rounds, clock).items()}
        rows.append(
            {"preset": preset, "seconds": seconds, **figures, "compile_seconds": took, "ms": {k: v * 1e3 for k, v in medians.items()},
             "speed": {name: medians[EAGER] / value for name, value in medians.items()}, "differences": differences}
        )  # fmt: skip
    return rows


@torch.no_grad()
def main() -> None:
    """Run one of the two, print a table or JSON."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    options.add_argument("part", choices=("parity", "times"))
    options.add_argument("--presets", nargs="+", default=PRESETS, help="models with random weights (default: one per encoder)")
    options.add_argument("--seconds", nargs="+", type=float, help="lengths (default: 0.1 1 7.3 60 of `parity`, 1 10 of `times`)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": harness.machine(), "rows": []}
    if args.part == "times":
        result["probe"] = [harness.guard("before the run")]
    for preset in args.presets:
        print(f"{preset} ...", file=sys.stderr, flush=True)
        if args.part == "parity":
            result["rows"].append(parity(preset, args.seconds or list(SECONDS)))
        else:
            result["rows"] += times(
                preset, args.seconds or [1.0, 10.0], args.rounds, harness.cpu_seconds if args.cpu_time else harness.seconds
            )
    if args.part == "times":
        result["probe"].append(harness.guard("after the run"))
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(result["machine"])
    (show_parity if args.part == "parity" else show_times)(result["rows"])


def show_parity(rows: list[dict[str, Any]]) -> None:
    """A row per preset, a column per length."""
    columns = list(rows[0]["differences"])
    print("| | MB | export s | largest value | " + " | ".join(columns) + " |\n|---|---|---|---|" + "---|" * len(columns))
    for row in rows:
        cells = " | ".join(f"{value:.1e}" for value in row["differences"].values())
        print(f"| {row['preset']} | {row['megabytes']:.1f} | {row['export_seconds']:.0f} | {row['largest_value']:.1f} | {cells} |")


def show_times(rows: list[dict[str, Any]]) -> None:
    """A row per preset and length: ms, and how many times as fast as the model as it is."""
    columns = list(rows[0]["ms"])
    print("| | s | " + " | ".join(columns) + " | export s | compile s | differs |\n|---|---|" + "---|" * (len(columns) + 3))
    for row in rows:
        cells = " | ".join(f"{row['ms'][name]:.1f} ms, {row['speed'][name]:.2f}x" for name in columns)
        worst = max(row["differences"].values())
        print(
            f"| {row['preset']} | {row['seconds']:g} | {cells} | {row['export_seconds']:.0f} | {row['compile_seconds']:.0f} | {worst:.1e} |"
        )


if __name__ == "__main__":
    main()
