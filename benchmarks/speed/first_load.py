"""Measures what a fresh process waits for beyond `import torch`: the first file it loads, and `hubert-eff run` of one second of audio.

Every measurement is a fresh process; the sides take turns, so a slow moment affects all. Times are medians of wall time and of processor
time (user and system) of the process, less those of `import torch` in the same rounds. Aims: 0.5 s for the load, 0.3 s for the command.

    python benchmarks/speed/first_load.py --preset conformer-s+w1a1 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile

import hubert_eff
from hubert_eff.profiling.machine import cpu_name

TORCH = "import torch"
LOAD = "import torch, hubert_eff; hubert_eff.load({file!r})"
RUN = "import torch; from hubert_eff.cli import main; assert main(['run', {file!r}, {audio!r}, '--out', {out!r}]) == 0"
AIMS = {"load": 0.5, "run": 0.3}  # seconds beyond torch


def once(code: str) -> tuple[float, float]:
    """(wall, processor) seconds of a process that runs this."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="conformer-s+w1a1", help="model that is exported and loaded (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, audio, out = (str(Path(folder) / name) for name in ("model.safetensors", "one.wav", "features.npz"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scales that never saw data
            hubert_eff.export(hubert_eff.open_model(args.preset), file)
        soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 16_000).astype("f4"), 16_000)
        sides = {"torch": TORCH, "load": LOAD.format(file=file), "run": RUN.format(file=file, audio=audio, out=out)}
        for code in sides.values():
            once(code)  # fills caches of the disk, compiles kernels
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, code in sides.items():
                times[name].append(once(code))
    medians = {name: tuple(statistics.median(column) for column in zip(*rows)) for name, rows in times.items()}
    facts = {"preset": args.preset, "cpu": cpu_name(), "load": [round(x, 1) for x in os.getloadavg()], "rounds": args.rounds}
    beyond = {name: [value - base for value, base in zip(medians[name], medians["torch"])] for name in AIMS}
    if args.json:
        print(json.dumps({"machine": facts, "seconds": medians, "beyond_torch": beyond, "aims": AIMS}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'import torch':<14} wall {medians['torch'][0]:.2f} s, processor {medians['torch'][1]:.2f} s")
    for name, aim in AIMS.items():
        print(f"{name:<14} wall +{beyond[name][0]:.2f} s, processor +{beyond[name][1]:.2f} s (aim {aim:g} s beyond torch)")


if __name__ == "__main__":
    main()
