"""Kills a training run again and again, and checks whether anything is lost or different in the end.

    python benchmarks/reliability/kill_training.py --kills 30 --out runs/kill-training.json

A model of few channels trains by fairseq-hydra-train on noise that is made here, and saves every other update. First it runs through, then
runs are killed (SIGKILL to the whole process group, loading processes and all) and started again by the same command: two kills of three
at a moment drawn evenly from what is left of the run, imports included, the third as soon as a checkpoint is being written. After each kill
every file under the name of a checkpoint must load, and no update from before the last save may be gone. A run is left to finish after
`KILLS_PER_RUN` kills; every update that it logged, in any attempt, must have the figures of the run that was never killed, and its last
checkpoint the same weights and the same optimizer state, bit for bit. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import hubert_eff
from hubert_eff.checkpoints.load import read_fairseq, updates_of
from hubert_eff.config import SAMPLE_RATE
from hubert_eff.errors import UserError
from hubert_eff.utils.configurations import plugin_dir
from hubert_eff.utils.files import config_dir, write_json
from hubert_eff.utils.progress import progress

KILLS_PER_RUN = 6
INTERVAL = 2  # updates between two saves
CLASSES = 5
TIMES = {"train_wall", "wall", "ups", "wps", "audio_per_s", "mem_gb"}  # what the log says of time and memory is never the same twice
SMALL = (
    "model.conv_feature_layers='[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2'", "model.encoder_layers=1", "model.encoder_embed_dim=16",
    "model.encoder_ffn_embed_dim=32", "model.encoder_attention_heads=2", "model.final_dim=8", "model.conv_pos=8",
)  # fmt: skip


@dataclass
class Kill:
    """One kill: the run, seconds after its start, what it hit, the last update logged, the update of checkpoint_last.pt."""

    run: int
    seconds: float
    hit: str
    reached: int
    kept: int

    @property
    def lost(self) -> int:
        """Updates that have to be made again."""
        return max(self.reached - self.kept, 0)


@dataclass
class Result:
    """What came of it; `faults` is empty if nothing was lost."""

    updates: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    compared: int = 0  # logged updates, over all attempts
    faults: list[str] = field(default_factory=list)


def make_data(folder: Path, seed: int) -> None:
    """Twelve utterances of noise to train on and one to validate, with random labels at 100 per second."""
    rng = np.random.default_rng(seed)
    audio = folder / "audio"
    audio.mkdir(parents=True)
    for split, count in (("train", 12), ("valid", 1)):
        rows, labels = [str(audio)], []
        for i in range(count):
            samples = int((0.8 + 0.1 * (i % 5)) * SAMPLE_RATE)
            soundfile.write(audio / f"{split}{i}.flac", rng.normal(0, 0.1, samples), SAMPLE_RATE)
            rows.append(f"{split}{i}.flac\t{samples}")
            labels.append(" ".join(map(str, rng.integers(0, CLASSES, (samples - 400) // 160 + 1))))
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        (folder / f"{split}.km").write_text("\n".join(labels) + "\n")
    (folder / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(CLASSES)))


def start(data: Path, save_dir: Path, updates: int, log: Path) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it, in a process group of its own."""
    command = [
        sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(config_dir() / "pretrain"), "--config-name", "debug",
        f"common.user_dir={plugin_dir()}", f"task.data={data}", f"task.label_dir={data}", f"checkpoint.save_dir={save_dir}",
        f"checkpoint.save_interval_updates={INTERVAL}", f"optimization.max_update={updates}", "dataset.max_tokens=64000",
        "common.log_format=json", "common.log_interval=1", *SMALL,
    ]  # fmt: skip
    with log.open("w") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env={"OMP_NUM_THREADS": "1", **os.environ}
        )


def logged(log: Path) -> dict[int, dict[str, Any]]:
    """What was logged of each update, without times. A last line that the kill cut short is none."""
    found = {}
    for line in log.read_text().splitlines():
        if "[train_inner]" in line and line.endswith("}"):
            entry = json.loads(line[line.index("{") :])
            found[int(entry["num_updates"])] = {key: value for key, value in entry.items() if key not in TIMES}
    return found


def hit(log: Path) -> str:
    """What a killed run was doing."""
    text = log.read_text()
    if "Start iterating over samples" not in text:
        return "start-up"
    if text.rfind("Preparing to save checkpoint") > text.rfind("Saved checkpoint"):
        return "saving"
    return "validation" if text.rfind("begin validation on") > text.rfind("[valid]") else "training"


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Files under a temporary name, by name and time of writing."""
    found = set()
    for file in folder.glob(".checkpoint*.tmp*"):
        try:
            found.add((file.name, file.stat().st_mtime_ns))
        except FileNotFoundError:  # it has just been renamed
            pass
    return found


def wait(process: subprocess.Popen[bytes], seconds: float, folder: Path, in_save: bool, delay: float) -> bool:
    """Wait until it is time to kill the run: after `seconds`, or `delay` into the save after that. False if the run ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    if in_save:
        old = half_written(folder)
        while half_written(folder) <= old:
            if process.poll() is not None:
                return False
            time.sleep(0.0005)
        time.sleep(delay)
    return process.poll() is None


def check(folder: Path, saved: int, faults: list[str]) -> int:
    """Look at what a kill left, where update `saved` was the last whose save was reported. Returns the update of checkpoint_last.pt."""
    for file in sorted(folder.glob("checkpoint*.pt")):
        try:
            hubert_eff.load(file)
        except UserError as error:
            faults.append(f"after a kill {error}")
    last = folder / "checkpoint_last.pt"
    try:
        kept = updates_of(last) if last.is_file() else 0
    except UserError:
        return 0  # named above
    if kept < saved:
        faults.append(f"{last} is of update {kept}, but {saved} was saved")
    return kept


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two checkpoints' contents differ, tensors compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [place for i in range(len(one)) for place in differences(one[i], other[i], f"{where}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    return [] if same else [where]


def compare(folder: Path, whole: Path, faults: list[str]) -> None:
    """The end of a run that was killed, beside that of the one that was not."""
    one, other = (read_fairseq(path / "checkpoint_last.pt") for path in (folder, whole))
    for part in ("model", "last_optimizer_state"):
        faults.extend(f"{folder.name}: {part}{place} is not that of the run not killed" for place in differences(one[part], other[part]))
    faults.extend(f"{folder / name} was left behind" for name, _ in half_written(folder))


class Victim:
    """A run that is killed and started again, beside the figures of one that ran through."""

    def __init__(self, data: Path, folder: Path, updates: int, expected: dict[int, dict[str, Any]], result: Result) -> None:
        self.data, self.folder, self.updates, self.expected, self.result = data, folder, updates, expected, result
        self.saved = self.kept = self.attempts = 0
        self.seen: set[int] = set()

    def attempt(self, seconds: float | None = None, in_save: bool = False, delay: float = 0.0) -> Kill | None:
        """Start the run, or go on; kill it as `wait` says, or (None) let it finish. Returns the kill, None if it finished."""
        log, faults = self.folder.with_name(f"{self.folder.name}-{self.attempts}.log"), self.result.faults
        self.attempts += 1
        process, began = start(self.data, self.folder, self.updates, log), time.monotonic()
        try:
            killed = seconds is not None and wait(process, seconds, self.folder, in_save, delay)
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        after = time.monotonic() - began
        entries = logged(log)
        for update, entry in entries.items():
            if entry != self.expected.get(update):
                faults.append(f"{log}: update {update} logged {entry}, not {self.expected.get(update)}")
        if entries and min(entries) != self.kept + 1:
            faults.append(f"{log} begins with update {min(entries)}, after checkpoint_last.pt of {self.kept}")
        self.seen |= set(entries)
        self.result.compared += len(entries)
        if not killed:
            if code:
                faults.append(f"{log}: exit code {code}")
            elif self.seen != set(self.expected):
                faults.append(f"{self.folder.name}: updates {sorted(set(self.expected) - self.seen)} were never logged")
            return None
        # the log's last save may be of an earlier attempt
        reports = re.findall(r"Saved checkpoint .*? @ (\d+) updates", log.read_text())
        self.saved = max([self.saved, *map(int, reports)])
        self.kept = check(self.folder, self.saved, faults)
        return Kill(self.result.runs, round(after, 2), hit(log), max(entries, default=self.kept), self.kept)


def torture(work: Path, kills: int, updates: int, seed: int) -> Result:
    """Make `kills` kills in a folder, over as many runs of `updates` updates as they take."""
    rng, result = random.Random(seed), Result(updates)
    data, whole = work / "data", work / "whole"
    make_data(data, seed)
    log, began = work / "whole.log", time.monotonic()
    process = start(data, whole, updates, log)
    try:
        startup = 0.0
        while process.poll() is None:
            time.sleep(0.05)
            if not startup and "Start iterating over samples" in log.read_text():
                startup = time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    training = time.monotonic() - began - startup
    if process.returncode:
        raise SystemExit(f"the run fails without being killed; the end of its log:\n{log.read_text()[-2000:]}")
    expected = logged(log)
    with progress("kills", kills) as advance:
        while len(result.kills) < kills:
            result.runs += 1
            victim = Victim(data, work / f"run{result.runs}", updates, expected, result)
            for _ in range(min(KILLS_PER_RUN, kills - len(result.kills))):
                left = startup + training * (1 - victim.kept / updates)
                # every third kill waits for a save
                kill = victim.attempt(rng.uniform(0, left), len(result.kills) % 3 == 2, rng.uniform(0, 0.05))
                if kill is None:
                    break
                result.kills.append(kill)
                advance(1)
            else:
                victim.attempt()
            if not result.faults:
                compare(victim.folder, whole, result.faults)
            if result.faults:
                break
    return result


def show(result: Result) -> None:
    """Print the table of kills, and what follows from them."""
    print(f"{'kill':>4}  {'run':>3}  {'after':>7}  {'hit':<10}  {'update':>6}  {'kept':>5}  {'lost':>4}")
    for number, kill in enumerate(result.kills, start=1):
        print(f"{number:>4}  {kill.run:>3}  {kill.seconds:>5.1f} s  {kill.hit:<10}  {kill.reached:>6}  {kill.kept:>5}  {kill.lost:>4}")
    hits = [kill.hit for kill in result.kills]
    print(
        f"{len(hits)} kills ({', '.join(f'{hits.count(kind)} in {kind}' for kind in sorted(set(hits)))}) of {result.runs} runs of "
        f"{result.updates} updates; at most {max((kill.lost for kill in result.kills), default=0)} updates to make again, saved every "
        f"{INTERVAL}; {result.compared} logged updates compared"
    )
    print("\n".join(result.faults) or "nothing saved was lost; figures, weights and optimizer state are those of the run not killed")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=30, help="default: %(default)d")
    options.add_argument("--updates", type=int, default=120, help="updates of each run (default: %(default)d)")
    options.add_argument("--seed", type=int, default=0, help="seed of the moments and of the data (default: %(default)d)")
    options.add_argument("--out", type=Path, help="file of figures, JSON")
    args = options.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-training-"))
    result = torture(work, args.kills, args.updates, args.seed)
    show(result)
    if args.out is not None:
        write_json(args.out, {**asdict(result), "kills": [{**asdict(kill), "lost": kill.lost} for kill in result.kills]})
    if result.faults:
        raise SystemExit(f"faults: {len(result.faults)}; the logs are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
