"""Kills `hubert-eff labels` again and again at random moments, and checks whether anything is lost.

    python benchmarks/reliability/kill_labels.py --kills 30

A reference run is made without disturbance. Then runs of 1 or 2 processes are started in a folder of their own, and their whole process
group is killed with SIGKILL after a time drawn uniformly between the reference's first output and its end. A killed run is started again
in the same folder; once one ends by itself, its labels are compared with the reference and the next folder begins. After every kill

- each file of a shard that has its final name must be complete: as many lines as utterances and the reference's text, or an array with all
  its frames,
- each file that was there at the kill before must still be there, the same one (of features: as long as k-means is not fitted).

A file that breaks this, and labels that differ at the end, count as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hubert_eff.labels import make as targets
from hubert_eff.labels.features import Mfcc

RESULTS = ("train.km", "valid.km", "dict.km.txt", "kmeans.safetensors")


def write_corpus(folder: Path, minutes: float) -> None:
    """Recordings of noise with changing loudness, 5 to 15 s each, and their train.tsv and valid.tsv (a tenth)."""
    rng = np.random.default_rng(0)
    left, lines = minutes * 60.0, []
    while left > 0:
        samples = int(rng.uniform(5, 15) * 16_000)
        wave = rng.normal(size=samples) * 0.2 * np.abs(np.sin(np.arange(samples) / 16_000 * rng.uniform(1, 5)))
        name = f"{len(lines):04d}.flac"
        soundfile.write(folder / name, wave.clip(-1, 1), 16_000)
        lines.append(f"{name}\t{samples}\n")
        left -= samples / 16_000
    held = max(1, len(lines) // 10)
    for split, chosen in (("valid", lines[:held]), ("train", lines[held:])):
        (folder / f"{split}.tsv").write_text(f"{folder}\n" + "".join(chosen))


def command(data: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "hubert_eff.cli", "labels", str(data), "--out", str(out), "--features", "mfcc", "--clusters", "10",
        "--workers", str(workers),
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def reference(data: Path, out: Path, workers: int) -> tuple[float, float]:
    """An undisturbed run; seconds until its first output and until its end."""
    began, first = time.monotonic(), 0.0
    process = start(command(data, out, workers))
    while process.poll() is None:
        if not first and out.exists():
            first = time.monotonic() - began
        time.sleep(0.01)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command(data, out, workers))} failed")
    return first, time.monotonic() - began


def finished(out: Path) -> dict[Path, tuple[int, int, int]]:
    """Shards that have their final names -> what tells whether it is still the same file."""
    files = {f: f.stat() for f in out.glob(".labels-*/*-*") if not f.name.startswith(".")}
    return {f: (s.st_ino, s.st_size, s.st_mtime_ns) for f, s in files.items()}


def expected(data: Path, truth: Path) -> Callable[[Path], bool]:
    """A function that says whether a finished shard is complete."""
    text: dict[str, str] = {}
    for split in ("train", "valid"):
        table = targets.read_manifest(data / f"{split}.tsv")
        lines = (truth / f"{split}.km").read_text().splitlines(keepends=True)
        for file, _, entries in targets.shards_of(table, Path(), split):
            text[file.name], lines = "".join(lines[: len(entries)]), lines[len(entries) :]
    train = targets.read_manifest(data / "train.tsv")
    frames = [sum(Mfcc().frames(n) for _, n in entries) for entries in targets.cut(targets.drawn(train, 10.0, 1))]

    def complete(file: Path) -> bool:
        if file.suffix == ".km":
            return file.read_text() == text[file.name]
        try:
            return np.load(file).shape == (frames[int(file.stem.rpartition("-")[2])], 39)
        except (ValueError, EOFError):
            return False

    return complete


def phase(out: Path) -> str:
    """How far a killed run had come."""
    if (out / "labels.json").exists():
        return "all labels there"
    return "k-means there" if any(out.glob("**/kmeans.safetensors")) else "before k-means"


def kill_labels(kills: int, seed: int, minutes: float = 10.0, workers: int = 2, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Kill runs `kills` times. Returns the counts: kills, those of each phase, runs that ended, shards seen after kills, lost."""
    draw = random.Random(seed)
    phases: Counter[str] = Counter()
    ended = seen = done = 0
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        data, truth = Path(name) / "data", Path(name) / "reference"
        data.mkdir()
        write_corpus(data, minutes)
        first, last = reference(data, truth, workers)
        say(f"a run without disturbance: first output after {first:.1f} s, end after {last:.1f} s")
        complete = expected(data, truth)
        while done < kills:
            out = Path(name) / f"run-{ended}"
            kept: dict[Path, tuple[int, int, int]] = {}
            while True:
                fresh, began = not out.exists(), time.monotonic()
                process = start(command(data, out, draw.randint(1, workers)))
                try:
                    after = draw.uniform(first, last) if done < kills else None
                    process.wait(after)
                    if fresh:  # the machine may be quicker than it was at the reference
                        last = min(last, time.monotonic() - began)
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                done += 1
                now = finished(out) if out.exists() else {}
                fitted = any(out.glob("**/kmeans.safetensors"))
                gone = [f for f, state in kept.items() if now.get(f) != state and not (fitted and f.suffix == ".npy")]
                gone = [] if (out / "labels.json").exists() else gone
                broken = [f for f in now if not complete(f)]
                lost += [f"kill {done}: {f.name} is gone" for f in gone] + [f"kill {done}: {f.name} is broken" for f in broken]
                seen += len(now)
                kept = now
                phases[phase(out)] += 1
                say(f"kill {done} after {after:.2f} s: {len(now)} finished shards, {len(gone) + len(broken)} lost")
            ended += 1
            if process.returncode != 0:
                lost.append(f"run {ended} failed with exit code {process.returncode}")
            lost += [f"run {ended}: {r} differs" for r in RESULTS if (out / r).read_bytes() != (truth / r).read_bytes()]
            lost += [f"run {ended}: {f} is left over" for f in sorted(set(os.listdir(out)) - set(os.listdir(truth)))]
            say(f"run {ended} ended: {'the same labels' if not lost else lost[-1]}")
    return {"kills": done, "lost": len(lost), "losses": lost, "runs": ended, "shards_checked": seen, "phases": dict(phases)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="default: %(default)d")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)d)")
    parser.add_argument("--minutes", type=float, default=10.0, help="audio of the runs (default: %(default)g)")
    parser.add_argument("--workers", type=int, default=2, help="maximum number of processes of a run (default: %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = parser.parse_args()
    result = kill_labels(args.kills, args.seed, args.minutes, args.workers, lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        phases = ", ".join(f"{count} {name}" for name, count in result["phases"].items())
        print(f"{result['kills']} kills / {result['lost']} lost")
        print(f"{result['runs']} runs ended, {result['shards_checked']} finished shards were looked at; killed: {phases}")
        print("".join(f"{line}\n" for line in result["losses"]), end="")
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
