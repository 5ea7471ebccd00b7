"""Memory and speed of `hubert-eff labels --features mfcc` on 1, 10 and 100 hours: what the parent process and its workers hold at most.

The manifests list the same 300 recordings of 12 s of noise again and again: what is read, computed and written is as much as for as many
hours of different recordings, only the disk's cache helps. The peak of a process is the `VmHWM` that Linux keeps of it, read every
`PERIOD` seconds while the command runs (getrusage of a process started by another contains the other's peak).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from hubert_eff.profiling.machine import machine

PERIOD = 0.2  # seconds
RECORDINGS, SECONDS = 300, 12
MB = 1 << 20


def write_audio(folder: Path) -> None:
    """An hour of noise as FLAC."""
    for number in range(RECORDINGS):
        samples = np.random.default_rng(number).normal(scale=0.1, size=SECONDS * 16_000)
        soundfile.write(folder / f"{number:03d}-a-name-as-long-as-those-of-librispeech.flac", samples, 16_000)


def write_manifest(folder: Path, audio: Path, hours: int) -> None:
    """train.tsv of so many hours of `audio`."""
    files = sorted(audio.iterdir())
    lines = (f"{files[i % RECORDINGS].name}\t{SECONDS * 16_000}\n" for i in range(hours * 3600 // SECONDS))
    (folder / "train.tsv").write_text(f"{audio}\n" + "".join(lines))


def packages() -> int:
    """Bytes that a process holds once it has imported what the command uses, before any work."""
    code = "import torch, torchaudio.compliance.kaldi, sklearn.cluster; print(open('/proc/self/status').read())"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return high_water(lines)


def peaks(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Largest resident size in bytes of the process and of each of its descendants, once it has ended."""
    found: dict[int, int] = {}
    while process.poll() is None:
        for pid in descendants(process.pid):
            found[pid] = max(found.get(pid, 0), peak(pid))
        time.sleep(PERIOD)
    return found


def descendants(pid: int) -> list[int]:
    """The process and those that it started, and so on."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in descendants(int(child)))]


def peak(pid: int) -> int:
    """VmHWM of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return high_water(lines)


def high_water(status: list[str]) -> int:
    """The entry of /proc/PID/status; a process that is ending has none."""
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)


def measure(hours: int, workers: int, audio: Path) -> dict[str, float]:
    """One run of the command."""
    with tempfile.TemporaryDirectory(dir=audio.parent) as name:
        folder = Path(name)
        write_manifest(folder, audio, hours)
        command = [sys.executable, "-m", "hubert_eff.cli", "labels", name, "--out", name, "--features", "mfcc", "--workers", str(workers)]
        began, before = time.monotonic(), os.times()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        found = peaks(process)
        wall, after = time.monotonic() - began, os.times()
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        children = [v for p, v in found.items() if p != process.pid]
        disk = sum(f.stat().st_size for f in folder.iterdir()) / MB
    return {
        "hours": hours,
        "workers": workers,
        "parent_mb": round(found[process.pid] / MB),
        "largest_worker_mb": round(max(children, default=0) / MB),
        "labels_mb": round(disk, 1),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=int, nargs="+", default=[1, 10, 100], help="default: 1 10 100")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        audio = Path(name) / "audio"
        audio.mkdir()
        write_audio(audio)
        for workers in args.workers:
            for hours in args.hours:
                rows.append(measure(hours, workers, audio))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"machine": machine(), "packages_mb": round(packages() / MB), "rows": rows}, indent=2))
        return
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(f"the imported packages alone: {packages() / MB:.0f} MB")
    print("| hours | processes | parent, MB | largest worker, MB | seconds | CPU seconds |\n|---|---|---|---|---|---|")
    for r in rows:
        worker = r["largest_worker_mb"] or "-"
        print(f"| {r['hours']} | {r['workers']} | {r['parent_mb']} | {worker} | {r['wall_s']:.0f} | {r['cpu_s']:.0f} |")


if __name__ == "__main__":
    main()
