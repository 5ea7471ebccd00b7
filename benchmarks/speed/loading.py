"""`train_gpu.py --loader`: how much audio one loading process delivers, and how many a GPU needs."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.tasks import setup_task
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import fairseq_plugins  # noqa: F401  (registers the task)
from hubert_eff.profiling.machine import cpu_name

CONFIG = "transformer_base"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
UPDATES = (1, 2, 5, 10)  # per second
GPUS = (1, 8, 32)


def make_corpus(folder: Path, utterances: int, seconds: float) -> None:
    """FLAC of noise with the long-term spectrum and the pauses of speech, and labels at 100 per second."""
    rng, samples = np.random.default_rng(0), round(seconds * 16_000)
    rows, labels = [str(folder)], []
    for i in range(utterances):
        noise = np.fft.irfft(np.fft.rfft(rng.normal(size=samples)) / np.sqrt(1 + np.arange(samples // 2 + 1) / samples * 64), samples)
        loud = np.repeat(rng.choice([0.02, 0.3, 1.0], samples // 1600 + 1), 1600)[:samples]
        soundfile.write(folder / f"{i}.flac", 0.1 * noise * loud / noise.std(), 16_000)
        rows.append(f"{i}.flac\t{samples}")
        labels.append(" ".join(map(str, rng.integers(0, 100, (samples - 400) // 160 + 1))))
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "train.km").write_text("\n".join(labels) + "\n", encoding="utf-8")
    (folder / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(100)), encoding="utf-8")


def make_task(data: Path) -> Any:
    """The pre-training task on `data`, as fairseq-hydra-train would set it up."""
    hydra_init(CONFIG)
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        folder = str(data.resolve())
        cfg = compose(CONFIG, overrides=[f"task.data={folder}", f"task.label_dir={folder}", "common.user_dir=unused", "common.fp16=false"])
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return setup_task(cfg.task)


def rates(data: Path, audio: float, seconds: float) -> dict[str, float]:
    """Audio-seconds out of the task's iterator in this process, per second of the clock and of CPU time: over at least `seconds`, after
    one pass to fill caches."""
    task = make_task(data)
    task.load_dataset("train")
    batches = task.get_batch_iterator(
        task.dataset("train"), max_tokens=round(audio * 16_000), required_batch_size_multiple=1, num_workers=0
    )

    def pass_over() -> int:
        return sum(batch["net_input"]["source"].numel() for batch in batches.next_epoch_itr())

    pass_over()
    start, work, samples = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        samples += pass_over()
    clock, work = time.perf_counter() - start, time.process_time() - work
    return {"clock": samples / 16_000 / clock, "cpu": samples / 16_000 / work}


def measure(data: Path | None, audio: list[float], debug: bool) -> dict[str, Any]:
    """Measure and print; the result for --out."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            make_corpus(Path(folder), 4 if debug else 64, 3.0 if debug else 12.5)
        one = rates(data or Path(folder), max(audio), 0.1 if debug else 10.0)
    what = f"{data or 'generated FLAC of 12.5 s'}, {cpu_name()}, libsndfile {soundfile.__libsndfile_version__}"
    print(f"one loading process ({what}): {one['cpu']:.0f} audio-seconds per second of CPU time, {one['clock']:.0f} by the clock")
    print("loading processes needed, each with a core of its own, of all GPUs together (dataset.num_workers is per GPU):")
    print("  audio per update  updates/s " + "".join(f"{n:>4} {'GPU ' if n == 1 else 'GPUs'}" for n in GPUS))
    rows = []
    for seconds in audio:
        for updates in UPDATES:
            needed = {n: n * math.ceil(seconds * updates / one["cpu"]) for n in GPUS}
            rows.append({"audio_s": seconds, "updates_per_s": updates, "processes": needed})
            print(f"  {seconds:>14.1f} s  {updates:>9} " + "".join(f"{n:>9}" for n in needed.values()))
    return {"data": what, "audio_s_per_s": one, "rows": rows}
