"""What training at one bit keeps, and which way there keeps most: valid masked accuracy at equal total updates, stages included.

    hubert-eff manifest $FSDD --out runs/digits --join 4 --split-by file
    hubert-eff labels runs/digits --out runs/digits/mfcc --features mfcc --clusters 50
    python benchmarks/learning/binarize.py runs/digits runs/digits/mfcc --out runs/binarize

With 5n updates in all, 3n of them for the float model, which has to learn before it can teach:

    float           W32A32 on labels for 3n updates
    multi-step      from there W1A2, then W1A1, n updates each, each stage taught by the one before (`hubert-eff binarize-recipe`)
    single-step     from there W1A1, 2n updates, taught by the float model
    on labels       from there W1A1, 2n updates on labels, without a teacher (first encoder, one seed)
    from scratch    W1A1 on labels for 5n updates

Then what is kept of a float model that has learned all it can here (configs/pretrain as it stands): W1A2 and W1A1 of it, 2n updates each,
W1A1 by 2n updates with parts of the blocks binarised only, and W1A1 by the other ways with the updates of W32A32 -> W1A2 -> W1A1 in all.
Prints Markdown, and writes it to --out with the same figures in JSON.
Runs that have ended are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from learning import config_name, records

import hubert_eff
from hubert_eff.models.hubert import normalize_waveform
from hubert_eff.recipes.base import plugin_dir
from hubert_eff.utils.files import config_dir

KINDS = ("attention_projection", "attention_product", "feed_forward", "pointwise_conv", "depthwise_conv")
PARTS = {  # what is binarised in the ablation
    "convolutions": ("pointwise_conv", "depthwise_conv"),
    "attention": ("attention_projection", "attention_product"),
    "feed-forward": ("feed_forward",),
    "everything": KINDS,
}
DRAWS = 20
SPECIAL = 4  # symbols with which fairseq's dictionaries begin
FLOAT_UPDATES = 750  # of configs/pretrain/*debug.yaml
WAYS = ("float", "multi-step", "single-step", "on labels", "from scratch")


@torch.no_grad()
def masked_accuracy(checkpoint: Path, data: Path, labels: Path) -> float:
    """Accuracy at masked frames of the valid split, over `DRAWS` draws of masks: one draw has a few hundred frames only."""
    model = hubert_eff.load(checkpoint)
    root, *rows = (data / "valid.tsv").read_text(encoding="utf-8").splitlines()
    symbols = [line.split()[0] for line in (labels / "dict.km.txt").read_text(encoding="utf-8").splitlines()]
    classes = {symbol: index + SPECIAL for index, symbol in enumerate(symbols)}
    correct = total = 0
    for number, (row, line) in enumerate(zip(rows, (labels / "valid.km").read_text(encoding="utf-8").splitlines(), strict=True)):
        wav = torch.from_numpy(soundfile.read(str(Path(root) / row.split("\t")[0]), dtype="float32")[0])[None]
        if model.config.normalize:
            wav = normalize_waveform(wav)
        target = torch.tensor([[classes[symbol] for symbol in line.split()]])
        for draw in range(DRAWS):
            output = model(wav, [target], sample_ids=torch.tensor([DRAWS * number + draw]))
            correct += int((output["logits_m"][0].argmax(-1) == output["targets_m"][0]).sum())
            total += output["targets_m"][0].numel()
    return correct / total


class Bench:
    """Runs, and their figures by name."""

    def __init__(self, data: Path, labels: Path, out: Path, updates: int) -> None:
        self.data, self.labels, self.out, self.updates = data, labels, out, updates
        self.file = out / "binarize.json"
        self.runs: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        out.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, run: str) -> Path:
        return self.out / run / "checkpoint_last.pt"

    def train(self, run: str, group: str, config: str, updates: int, *overrides: str) -> float:
        """Valid masked accuracy at the end of a run. `SystemExit` with the end of the log if it fails."""
        if run not in self.runs:
            command = [
                sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(config_dir() / group), "--config-name", config,
                f"common.user_dir={plugin_dir()}", f"task.data={self.data}", f"task.label_dir={self.labels}",
                f"checkpoint.save_dir={self.out / run}", f"optimization.max_update={updates}",
                f"dataset.validate_interval_updates={updates}", f"checkpoint.save_interval_updates={updates}",
                "common.log_format=json", *overrides,
            ]  # fmt: skip
            log = self.out / f"{run.replace('/', '-')}.log"
            start = time.monotonic()
            with log.open("w", encoding="utf-8") as stream:
                environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
                code = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
            lines = log.read_text(encoding="utf-8").splitlines()
            if code:
                sys.exit(f"{run} ended with exit code {code}; the end of {log}:\n" + "\n".join(lines[-5:]))
            valid = records(lines, "[valid]")[-1]
            self.runs[run] = {
                "accuracy": masked_accuracy(self.checkpoint(run), self.data, self.labels),
                "logged_accuracy": float(valid["valid_correct_m_0"]),
                "majority": float(valid["valid_majority_m_0"]),
                "agreement": float(valid["valid_correct_t_0"]) if "valid_correct_t_0" in valid else None,
                "loss": float(valid["valid_loss"]),
                "updates": int(valid["valid_num_updates"]),
                "seconds": round(time.monotonic() - start, 1),
                "health": records(lines, "[train_inner]")[-1],
            }
            self.file.write_text(json.dumps(self.runs, indent=2) + "\n", encoding="utf-8")
            print(f"{run}: {self.runs[run]['accuracy']:.1%} ({self.runs[run]['seconds']} s)", file=sys.stderr, flush=True)
        return float(self.runs[run]["accuracy"])

    def taught(self, run: str, config: str, by: str, updates: int, *overrides: str) -> float:
        return self.train(run, "quantize", f"{config}_distill", updates, f"criterion.teacher={self.checkpoint(by)}", *overrides)

    def ways(self, encoder: str, seed: int, labels: bool) -> dict[str, float]:
        """Accuracy of each way of `WAYS`; `labels`: "on labels" too."""
        name, config, n, s = f"{encoder}-{seed}", config_name(encoder), self.updates, f"common.seed={seed}"
        found = {"float": self.train(f"{name}/float", "pretrain", config, 3 * n, s)}
        self.taught(f"{name}/w1a2", config, f"{name}/float", n, "model.quant=w1a2", s)
        found["multi-step"] = self.taught(f"{name}/multi", config, f"{name}/w1a2", n, s)
        found["single-step"] = self.taught(f"{name}/single", config, f"{name}/float", 2 * n, s)
        found["from scratch"] = self.train(f"{name}/scratch", "quantize", f"{config}_w1a1", 5 * n, s)
        if labels:
            start = f"task.init_from={self.checkpoint(f'{name}/float')}"
            found["on labels"] = self.train(f"{name}/labels", "quantize", f"{config}_w1a1", 2 * n, start, s)
        return found

    def kept(self, encoder: str) -> dict[str, dict[str, Any]]:
        """Figures of a float model, of what is left of it at one bit, and of what is left with only some parts at one bit."""
        config, n, whole = config_name(encoder), 2 * self.updates, f"{encoder}-kept"
        rows = {"nothing: float": f"{whole}/float", "W1A2": f"{whole}/w1a2", "W1A1, from W1A2": f"{whole}/multi"}
        self.train(rows["nothing: float"], "pretrain", config, FLOAT_UPDATES)
        self.taught(rows["W1A2"], config, f"{whole}/float", n, "model.quant=w1a2")
        self.taught(rows["W1A1, from W1A2"], config, f"{whole}/w1a2", n)
        for part, binary in PARTS.items():
            policy = self.out / f"{part}.yaml"
            policy.write_text(yaml.safe_dump({kind: "binary" if kind in binary else "float" for kind in KINDS}))
            rows[f"W1A1, {part}, single-step"] = f"{whole}/{part}"
            self.taught(f"{whole}/{part}", config, f"{whole}/float", n, f"model.quant_policy={policy}")
        rows["nothing: float, as many updates"] = f"{whole}/float-all"
        self.train(f"{whole}/float-all", "pretrain", config, FLOAT_UPDATES + 2 * n)
        rows["W1A1, single-step, as many updates"] = f"{whole}/single"
        self.taught(f"{whole}/single", config, f"{whole}/float", 2 * n)
        rows["W1A1, from scratch, as many updates"] = f"{whole}/scratch"
        self.train(f"{whole}/scratch", "quantize", f"{config}_w1a1", FLOAT_UPDATES + 2 * n)
        return {name: self.runs[run] for name, run in rows.items()}


def table(ways: dict[str, list[dict[str, float]]]) -> list[str]:
    """One row per encoder: means, and over several seeds the standard deviation."""
    lines = ["| encoder | seeds | " + " | ".join(WAYS) + " |", "|---|---|" + "---|" * len(WAYS)]
    for encoder, seeds in ways.items():
        cells = []
        for way in WAYS:
            values = [100 * seed[way] for seed in seeds if way in seed]
            if not values:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {encoder} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def kept_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| binarised | masked accuracy, valid, % | same class as its teacher, % | loss of distillation, bits |", "|---|---|---|---|"]
    for name, run in rows.items():
        agreement, loss = ("", "") if run["agreement"] is None else (f"{100 * run['agreement']:.1f}", f"{run['loss']:.2f}")
        lines.append(f"| {name} | {100 * run['accuracy']:.1f} | {agreement} | {loss} |")
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="directory that `hubert-eff manifest` wrote")
    options.add_argument("labels", type=Path, help="directory that `hubert-eff labels` wrote (MFCC: 100 labels per second)")
    options.add_argument("--updates", type=int, default=100, help="n: a fifth of the updates (default: 100)")
    options.add_argument("--encoders", nargs="+", default=["conformer", "transformer", "sparseformer"], metavar="NAME")
    options.add_argument("--seeds", type=int, default=3, help="seeds of the first encoder; the others have one (default: 3)")
    options.add_argument("--out", type=Path, required=True, help="where logs, checkpoints, binarize.json and binarize.md go")
    args = options.parse_args()
    bench = Bench(args.data.resolve(), args.labels.resolve(), args.out.resolve(), args.updates)
    ways: dict[str, list[dict[str, float]]] = {}
    first = args.encoders[0]
    kept: list[str] = []
    order = [(encoder, 1) for encoder in args.encoders] + [(first, seed) for seed in range(2, args.seeds + 1)]
    for encoder, seed in order:
        ways.setdefault(encoder, []).append(bench.ways(encoder, seed, labels=(encoder, seed) == order[0]))
        kept = kept or kept_table(bench.kept(first))
        page = [*table(ways), "", *kept]
        (bench.out / "binarize.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
