"""The whole way through on a small synthetic corpus: the commands that a user would type, one after the other.

Each step runs as a command of its own and is kept when it has succeeded, so that an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ..utils.files import config_dir, write_json
from ..utils.locks import locked
from .base import Steps, best_validation, path_overrides, plugin_dir

CLUSTERS = 50
UNTRAINED = "conformer-debug@0"


class Demo(Steps):
    """Runs the steps into one folder."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.checkpoint = self.out / "pretrain" / "checkpoint_best.pt"
        paths: dict[str, str | Path] = {
            "common.user_dir": plugin_dir(), "task.data": self.out / "data", "task.label_dir": self.out / "labels-mfcc",
            "checkpoint.save_dir": self.checkpoint.parent, "common.log_file": self.out / "train.log",
        }  # fmt: skip
        self.training = path_overrides(paths)

    def run(self) -> dict[str, Any]:
        """All steps; returns the figures. Raises `UserError` where another process has the folder, and `StepFailed`."""
        with locked(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
        out, checkpoint = self.out, self.checkpoint
        corpus, data, keywords = out / "corpus", out / "data", out / "keywords"
        first, second = out / "labels-mfcc", out / "labels-layer"
        seconds = {
            "corpus": self.step("A speech corpus", "hubert-eff", "corpus", "demo", "--out", corpus, "--speakers", 24),
            "manifest": self.step("Check the audio, split it", "hubert-eff", "manifest", corpus, "--out", data, "--valid-percent", 10),
            "labels": self.step(
                "First labels: k-means on MFCC",
                "hubert-eff", "labels", data, "--out", first, "--features", "mfcc", "--clusters", CLUSTERS,
            ),
            "pre-training": self.step(
                "Pre-train a Conformer HuBERT",
                "fairseq-hydra-train", "--config-dir", config_dir() / "pretrain", "--config-name", "debug",
                *self.training,
            ),
            "second labels": self.step(
                "Second labels: k-means on the model's last layer",
                "hubert-eff", "labels", data, "--out", second, "--checkpoint", checkpoint, "--layer", 2, "--clusters", CLUSTERS,
            ),
            "keyword corpus": self.step(
                "A Speech-Commands-shaped corpus", "hubert-eff", "corpus", "superb", "--out", keywords, "--task", "ks"
            ),
            "keyword spotting, pre-trained": self.step(
                "Keyword spotting on the pre-trained model, through S3PRL",
                "hubert-eff", "superb", "run", "--task", "ks", "--upstream", checkpoint, "--data", keywords, "--out", out / "ks-pretrained",
                "--steps", 300, "--lr", 0.01,
            ),
            "keyword spotting, untrained": self.step(
                "The same probe on an untrained model",
                "hubert-eff", "superb", "run", "--task", "ks", "--upstream", UNTRAINED, "--data", keywords, "--out", out / "ks-untrained",
                "--steps", 300, "--lr", 0.01,
            ),
        }  # fmt: skip
        alignments = corpus / "alignments.tsv"
        results = {
            "valid": best_validation(out / "train.log"),
            "labels": {
                name: self.figures("hubert-eff", "labels", "quality", folder, "--alignments", alignments)
                for name, folder in (("mfcc", first), ("layer 2", second))
            },
            "keyword spotting": {
                name: json.loads((out / f"ks-{name}" / "ks" / "result.json").read_text()) for name in ("pretrained", "untrained")
            },
            "profile": self.figures("hubert-eff", "profile", checkpoint, "--seconds", 10),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }
        write_json(out / "summary.json", results)
        return results


def table(results: dict[str, Any], out: Path) -> Table:
    """What was made, where, and the figures."""
    valid, spotting, cost = results["valid"], results["keyword spotting"], results["profile"]
    rows = [
        (
            "masked accuracy, valid",
            f"{valid['accuracy']:.1%} (most frequent label: {valid['majority']:.1%})",
            "pretrain/checkpoint_best.pt",
        ),
        ("code perplexity, valid", f"{valid['code perplexity']:.1f} of {CLUSTERS} (labels: {valid['label perplexity']:.1f})", ""),
    ]
    for name, folder in (("mfcc", "labels-mfcc"), ("layer 2", "labels-layer")):
        quality = results["labels"][name]["splits"]["valid"]
        figure = f"PNMI {quality['pnmi']:.3f}, phone purity {quality['phone_purity']:.3f}"
        rows.append((f"labels from {name}, valid", figure, folder))
    for name, folder in (("pretrained", "ks-pretrained"), ("untrained", "ks-untrained")):
        run = spotting[name]
        rows.append((f"keyword spotting, {name}", f"{run['accuracy']:.1%} (largest class: {run['chance']:.1%})", folder))
    rows += [
        ("parameters", f"{cost['params_without_labels']:,}, {cost['storage_mb']['file']:.2f} MB as a file", ""),
        ("operations, 10 s", f"{cost['macs'] / 1e9:.3f} GMAC = {cost['gflop']:.3f} GFLOP", ""),
        ("time", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items()), ""),
        ("all figures", "", "summary.json"),
    ]
    grid = Table("what", "figure", "where", title=f"Made in {out}", title_justify="left")
    for what, figure, where in rows:
        grid.add_row(what, figure, where)
    return grid
