"""The whole way through on a small synthetic corpus: the commands that a user would type, one after the other.

An interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ..utils.files import write_json
from .base import Recipe, Step, best_validation, figures, training

CLUSTERS = 50
UNTRAINED = "conformer-debug@0"


class Demo(Recipe):
    """The steps in one folder, whose figures go into its `summary.json`."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.checkpoint = self.out / "pretrain" / "checkpoint_best.pt"

    def steps(self) -> list[Step]:
        """The steps in order."""
        return list(self._steps().values())

    def _steps(self) -> dict[str, Step]:
        """The steps by what the summary calls them."""
        out, checkpoint = self.out, self.checkpoint
        corpus, data, keywords = out / "corpus", out / "data", out / "keywords"
        first, second = out / "labels-mfcc", out / "labels-layer"
        paths: dict[str, str | Path] = {
            "task.data": data, "task.label_dir": first, "checkpoint.save_dir": checkpoint.parent, "common.log_file": out / "train.log"
        }  # fmt: skip
        return {
            "corpus": Step("A speech corpus", ("hubert-eff", "corpus", "demo", "--out", corpus, "--speakers", 24)),
            "manifest": Step("Check the audio, split it", ("hubert-eff", "manifest", corpus, "--out", data, "--valid-percent", 10)),
            "labels": Step(
                "First labels: k-means on MFCC",
                ("hubert-eff", "labels", data, "--out", first, "--features", "mfcc", "--clusters", CLUSTERS),
            ),
            "pre-training": Step("Pre-train a Conformer HuBERT", training("pretrain", "debug", paths)),
            "second labels": Step(
                "Second labels: k-means on the model's last layer",
                ("hubert-eff", "labels", data, "--out", second, "--checkpoint", checkpoint, "--layer", 2, "--clusters", CLUSTERS),
            ),
            "keyword corpus": Step(
                "A Speech-Commands-shaped corpus", ("hubert-eff", "corpus", "superb", "--out", keywords, "--task", "ks")
            ),
            "keyword spotting, pre-trained": Step(
                "Keyword spotting on the pre-trained model, through S3PRL", self._probe(checkpoint, keywords, out / "ks-pretrained")
            ),
            "keyword spotting, untrained": Step(
                "The same probe on an untrained model", self._probe(UNTRAINED, keywords, out / "ks-untrained")
            ),
        }

    def _probe(self, upstream: str | Path, keywords: Path, out: Path) -> tuple[object, ...]:
        return (
            "hubert-eff", "superb", "run", "--task", "ks", "--upstream", upstream, "--data", keywords, "--out", out, "--steps", 300,
            "--lr", 0.01,
        )  # fmt: skip

    def results(self) -> dict[str, Any]:
        """All figures, which are written to `summary.json` too."""
        out, alignments = self.out, self.out / "corpus" / "alignments.tsv"
        results = {
            "valid": best_validation(out / "train.log"),
            "labels": {
                name: figures("hubert-eff", "labels", "quality", out / folder, "--alignments", alignments)
                for name, folder in (("mfcc", "labels-mfcc"), ("layer 2", "labels-layer"))
            },
            "keyword spotting": {
                name: json.loads((out / f"ks-{name}" / "ks" / "result.json").read_text()) for name in ("pretrained", "untrained")
            },
            "profile": figures("hubert-eff", "profile", self.checkpoint, "--seconds", 10),
            "seconds": {name: round(self.seconds(step), 1) for name, step in self._steps().items()},
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
