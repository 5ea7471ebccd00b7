"""Measures what training at one bit keeps, and which way keeps most: valid masked accuracy at equal total updates, stages included.

    hubert-eff manifest $FSDD --out runs/digits --join 4 --split-by file
    hubert-eff labels runs/digits --out runs/digits/mfcc --features mfcc --clusters 50
    python benchmarks/learning/binarize.py runs/digits runs/digits/mfcc --out runs/binarize

A float model trains for 750 updates as configs/pretrain says; what follows has 400 more, so that all that is compared has 1,150:

    float            from the teacher's weights W32A32 on labels, as `labels` but for the bits (and the teacher itself, for the record)
    float, one schedule         W32A32 on labels for 1,150 updates
    labels           from the teacher's weights W1A1 on labels (configs/quantize/*_w1a1)
    distilled        from the teacher's weights W1A1 on labels and teacher (configs/quantize/*_distill)
    multi-step       the same through W1A2, 200 updates each, both taught by the float model; each stage with its own schedule
    multi-step, one schedule    the same, the learning rate of both stages on one schedule
    from scratch     W1A1 on labels for 1,150 updates
    W1A4, W1A8       as distilled, with activations of 4 and of 8 bits
    PART only        as distilled, with only convolutions, attention or feed-forward modules binarized

The first encoder takes all seeds; parts are of its first seed. Each finished run is a line of OUT/binarize.jsonl and is not run again, so
that the same command goes on where it was stopped. Prints Markdown tables of what has finished, also written to OUT/binarize.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from learning import config_name, records

import hubert_eff
from hubert_eff.models.hubert import normalize_waveform
from hubert_eff.recipes.schedule import shared_schedule
from hubert_eff.utils.configurations import load_config, plugin_dir
from hubert_eff.utils.files import config_dir

KINDS = ("attention_projection", "attention_product", "feed_forward", "pointwise_conv", "depthwise_conv")
PARTS = {  # what is binarized in the ablation
    "convolutions": ("pointwise_conv", "depthwise_conv"),
    "attention": ("attention_projection", "attention_product"),
    "feed-forward": ("feed_forward",),
}
DRAWS = 20
SPECIAL = 4  # symbols with which fairseq's dictionaries begin
TEACHER, STUDENT = 750, 400  # updates
TOTAL = TEACHER + STUDENT
SHOWN = {  # run -> column
    "teacher": "float, 750", "float": "float", "float-one": "float, one schedule", "labels": "W1A1 labels",
    "distilled": "W1A1 distilled", "multi": "multi-step", "multi-one": "multi-step, one schedule", "scratch": "from scratch",
    "w1a4": "W1A4", "w1a8": "W1A8",
}  # fmt: skip


@torch.no_grad()
def masked_accuracy(checkpoint: Path, data: Path, labels: Path) -> tuple[float, float]:
    """Accuracy at masked frames of the valid split, and the share of the most frequent label there.

    Over `DRAWS` draws of masks: one draw has a few hundred frames only.
    """
    model = hubert_eff.load(checkpoint)
    root, *rows = (data / "valid.tsv").read_text(encoding="utf-8").splitlines()
    symbols = [line.split()[0] for line in (labels / "dict.km.txt").read_text(encoding="utf-8").splitlines()]
    classes = {symbol: index + SPECIAL for index, symbol in enumerate(symbols)}
    correct, counts = 0, Counter[int]()
    for number, (row, line) in enumerate(zip(rows, (labels / "valid.km").read_text(encoding="utf-8").splitlines(), strict=True)):
        wav = torch.from_numpy(soundfile.read(str(Path(root) / row.split("\t")[0]), dtype="float32")[0])[None]
        if model.config.normalize:
            wav = normalize_waveform(wav)
        target = torch.tensor([[classes[symbol] for symbol in line.split()]])
        for draw in range(DRAWS):
            output = model(wav, [target], sample_ids=torch.tensor([DRAWS * number + draw]))
            correct += int((output["logits_m"][0].argmax(-1) == output["targets_m"][0]).sum())
            counts.update(output["targets_m"][0].tolist())
    return correct / counts.total(), max(counts.values()) / counts.total()


@dataclass
class Run:
    """One training: `group`/`config` of configs, its updates, and what it needs to have run before it."""

    name: str  # ENCODER-SEED/what
    group: str
    config: str
    updates: int
    overrides: tuple[str, ...] = ()


class Bench:
    """Runs and their figures by name."""

    def __init__(self, data: Path, labels: Path, out: Path) -> None:
        self.data, self.labels, self.out = data, labels, out
        self.file = out / "binarize.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        self.done: dict[str, dict[str, Any]] = {run["run"]: run for run in map(json.loads, lines)}

    def checkpoint(self, run: str) -> Path:
        """The checkpoint of a run."""
        return self.out / run / "checkpoint_last.pt"

    def plan(self, encoders: list[str], seeds: int) -> list[Run]:
        """The runs, the most important first; a run comes after those that it needs."""
        first, rest = encoders[0], encoders[1:]
        main = ("teacher", "float", "labels", "distilled")
        more = ("w1a8", "w1a4", "w1a2", "multi", "scratch", "float-one", "w1a2-one", "multi-one")
        runs = [self.run(first, seed, way) for seed in range(1, seeds + 1) for way in main]
        runs += [self.run(first, 1, way) for way in more[:4]]
        runs += [self.run(encoder, 1, way) for encoder in rest for way in main]
        runs += [self.run(first, 1, way) for way in (*more[4:], *PARTS)]
        runs += [self.run(first, seed, way) for way in more for seed in range(2, seeds + 1)]
        runs += [self.run(encoder, 1, way) for way in more for encoder in rest]
        return runs

    def run(self, encoder: str, seed: int, way: str) -> Run:
        """One run of a plan."""
        base, name = f"{encoder}-{seed}", config_name(encoder)
        seeded = f"common.seed={seed}"
        teacher = self.checkpoint(f"{base}/teacher")
        if way in ("teacher", "float-one"):
            return Run(f"{base}/{way}", "pretrain", name, TEACHER if way == "teacher" else TOTAL, (seeded,))
        if way == "float":
            return Run(f"{base}/{way}", "pretrain", name, STUDENT, (seeded, f"+task.init_from={teacher}"))
        if way == "labels":
            return Run(f"{base}/{way}", "quantize", f"{name}_w1a1", STUDENT, (seeded, f"task.init_from={teacher}"))
        if way == "scratch":
            return Run(f"{base}/{way}", "quantize", f"{name}_w1a1", TOTAL, (seeded,))
        taught, updates = [seeded, f"criterion.teacher={teacher}"], STUDENT
        if way in ("w1a2", "multi", "w1a2-one", "multi-one"):
            updates = STUDENT // 2
            stage = way.startswith("multi")
            if way.endswith("-one"):
                config = load_config(f"quantize/{name}_distill", [f"optimization.max_update={STUDENT}"])
                taught += shared_schedule(config, STUDENT // 2 if stage else 0, STUDENT)
            start = "w1a2-one" if way == "multi-one" else "w1a2"
            taught.append(f"task.init_from={self.checkpoint(f'{base}/{start}')}" if stage else "model.quant=w1a2")
        elif way in ("w1a4", "w1a8"):
            taught.append(f"model.quant={way}")
        elif way in PARTS:
            policy = self.out / f"{way}.yaml"
            policy.write_text(yaml.safe_dump({kind: "binary" if kind in PARTS[way] else "float" for kind in KINDS}))
            taught.append(f"model.quant_policy={policy}")
        return Run(f"{base}/{way}", "quantize", f"{name}_distill", updates, tuple(taught))

    def train(self, run: Run) -> None:
        """Train, unless it is done, and keep the figures. `SystemExit` with the end of the log if it fails."""
        if run.name in self.done:
            return
        command = [
            sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(config_dir() / run.group), "--config-name", run.config,
            f"common.user_dir={plugin_dir()}", f"task.data={self.data}", f"task.label_dir={self.labels}",
            f"checkpoint.save_dir={self.out / run.name}", f"optimization.max_update={run.updates}",
            f"dataset.validate_interval_updates={run.updates}", f"checkpoint.save_interval_updates={run.updates}",
            "common.log_format=json", *run.overrides,
        ]  # fmt: skip
        log = self.out / f"{run.name.replace('/', '-')}.log"
        start = time.monotonic()
        with log.open("a", encoding="utf-8") as stream:  # of a run that had ended but for its figures the log has the validation
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
            code = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
        lines = log.read_text(encoding="utf-8").splitlines()
        if code:
            sys.exit(f"{run.name} ended with exit code {code}; the end of {log}:\n" + "\n".join(lines[-5:]))
        valid = records(lines, "[valid]")[-1]
        accuracy, majority = masked_accuracy(self.checkpoint(run.name), self.data, self.labels)
        figures = {
            "run": run.name,
            "accuracy": accuracy,
            "majority": majority,
            "agreement": float(valid["valid_correct_t_0"]) if "valid_correct_t_0" in valid else None,
            "loss": float(valid["valid_loss"]),
            "updates": int(valid["valid_num_updates"]),
            "seconds": round(time.monotonic() - start, 1),
            "overrides": run.overrides,
        }
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")
        self.done[run.name] = figures
        print(f"{run.name}: {accuracy:.1%} ({figures['seconds']} s)", file=sys.stderr, flush=True)

    def tables(self) -> list[str]:
        """Markdown of what has finished."""
        by_encoder: dict[str, dict[str, list[float]]] = {}
        for name, figures in self.done.items():
            model, _, way = name.partition("/")
            by_encoder.setdefault(model.rpartition("-")[0], {}).setdefault(way, []).append(100 * figures["accuracy"])
        columns = [way for way in SHOWN if any(way in found for found in by_encoder.values())]
        lines = ["| encoder | " + " | ".join(SHOWN[way] for way in columns) + " |", "|---|" + "---|" * len(columns)]
        for encoder, found in by_encoder.items():
            lines.append(f"| {encoder} | " + " | ".join(_cell(found.get(way, [])) for way in columns) + " |")
        lines += ["", "| binarized | masked accuracy, valid, % | same class as its teacher, % |", "|---|---|---|"]
        for name, figures in self.done.items():
            part = name.partition("/")[2]
            if part in PARTS or (part == "distilled" and name.partition("/")[0].endswith("-1")):
                what = f"{part} only" if part in PARTS else f"all of {name.partition('-')[0]}"
                lines.append(f"| {what} | {100 * figures['accuracy']:.1f} | {100 * figures['agreement']:.1f} |")
        most = max((figures["majority"] for figures in self.done.values()), default=0.0)
        return [*lines, "", f"Share of the most frequent label at masked frames: {most:.1%}."]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="directory that `hubert-eff manifest` wrote")
    options.add_argument("labels", type=Path, help="directory that `hubert-eff labels` wrote (MFCC: 100 labels per second)")
    options.add_argument("--encoders", nargs="+", default=["conformer", "transformer", "sparseformer"], metavar="NAME")
    options.add_argument("--seeds", type=int, default=3, help="seeds of the first encoder; the others have one (default: 3)")
    options.add_argument("--out", type=Path, required=True, help="folder for logs, checkpoints, binarize.jsonl and binarize.md")
    options.add_argument("--tables", action="store_true", help="train nothing: tables of what has finished")
    args = options.parse_args()
    bench = Bench(args.data.resolve(), args.labels.resolve(), args.out.resolve())
    for run in [] if args.tables else bench.plan(args.encoders, args.seeds):
        bench.train(run)
    page = bench.tables()
    (bench.out / "binarize.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
