"""Runs all steps on a small synthetic corpus: the commands that a user would type, one after the other.

An interrupted demo resumes where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from ..data.lines import read_json
from ..utils.files import write_json
from .base import Recipe, Step, best_validation, figures, training

CLUSTERS = 50
CHOICES = (50, 100)  # numbers of classes of the second labels
UNTRAINED = "conformer-debug@0"
LAST, FEW = 2, CHOICES[0]  # layer and classes before their quality is known


class Demo(Recipe):
    """The steps in one folder; their figures go into its `summary.json`."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.checkpoint = self.out / "pretrain" / "checkpoint_best.pt"

    def steps(self) -> Iterator[Step]:
        """The steps in order; the second labels are of the layer and number of classes that those before found best."""
        yield from self._first().values()
        yield from self._second().values()

    def _first(self) -> dict[str, Step]:
        """The first iteration, by what the summary calls its steps, up to the quality of its layers."""
        out, checkpoint, data = self.out, self.checkpoint, self.out / "data"
        quality = ("hubert-eff", "labels", "quality", data, "--layers", "all", "--checkpoint", checkpoint, "--alignments", self.alignments)
        return {
            "corpus": Step("A speech corpus", ("hubert-eff", "corpus", "demo", "--out", out / "corpus", "--speakers", 24)),
            "manifest": Step("Check the audio, split it", ("hubert-eff", "manifest", out / "corpus", "--out", data, "--valid-percent", 10)),
            "labels": self._mfcc(CLUSTERS),
            "pre-training": Step("Pre-train a Conformer HuBERT", self._training(checkpoint, self._mfcc_folder(CLUSTERS))),
            "keyword corpus": Step(
                "A Speech-Commands-shaped corpus", ("hubert-eff", "corpus", "superb", "--out", self.keywords, "--task", "ks")
            ),
            "keyword spotting, pretrained": Step(
                "Keyword spotting on the pre-trained model, through S3PRL", self._probe(checkpoint, out / "ks-pretrained")
            ),
            "keyword spotting, untrained": Step("The same probe on an untrained model", self._probe(UNTRAINED, out / "ks-untrained")),
            **{
                f"layers, {k} classes": Step(
                    f"Which layer knows phones best, in {k} classes", (*quality, "--clusters", k, "--json"), stdout=self._quality(k)
                )
                for k in CHOICES
            },
        }  # fmt: skip

    def _second(self) -> dict[str, Step]:
        """The second iteration: labels of the best layer, and a model that is trained on them from random weights, for as many updates."""
        layer, clusters = self.chosen()
        labels, checkpoint = self.out / f"labels-layer{layer}-{clusters}", self.out / "pretrain-second" / "checkpoint_best.pt"
        source = ("--checkpoint", self.checkpoint, "--layer", layer, "--clusters", clusters)
        same = {} if clusters == CLUSTERS else {"MFCC labels, as many": self._mfcc(clusters)}
        return {
            **same,
            "second labels": Step(
                f"Second labels: k-means on the model's layer {layer}",
                ("hubert-eff", "labels", self.out / "data", "--out", labels, *source),
            ),
            "second pre-training": Step(
                "Pre-train as before, on the second labels", self._training(checkpoint, labels, "task.label_rate=50")
            ),
            "keyword spotting, second": Step("The same probe on the second model", self._probe(checkpoint, self.out / "ks-second")),
        }  # fmt: skip

    @property
    def alignments(self) -> Path:
        """The true times of phones."""
        return self.out / "corpus" / "alignments.tsv"

    @property
    def keywords(self) -> Path:
        """The corpus of the probe."""
        return self.out / "keywords"

    def _quality(self, clusters: int) -> Path:
        return self.out / f"layers-{clusters}.json"

    def _mfcc_folder(self, clusters: int) -> Path:
        return self.out / ("labels-mfcc" if clusters == CLUSTERS else f"labels-mfcc-{clusters}")

    def _mfcc(self, clusters: int) -> Step:
        title = "First labels: k-means on MFCC" if clusters == CLUSTERS else f"MFCC labels of {clusters} classes, to compare with"
        words = ("hubert-eff", "labels", self.out / "data", "--out", self._mfcc_folder(clusters), "--features", "mfcc")
        return Step(title, (*words, "--clusters", clusters))

    def _training(self, checkpoint: Path, labels: Path, *overrides: str) -> tuple[object, ...]:
        log = self.out / ("train.log" if checkpoint == self.checkpoint else "train-second.log")
        paths: dict[str, str | Path] = {
            "task.data": self.out / "data", "task.label_dir": labels, "checkpoint.save_dir": checkpoint.parent, "common.log_file": log
        }  # fmt: skip
        return training("pretrain", "debug", paths, *overrides)

    def chosen(self) -> tuple[int, int]:
        """The layer and the number of classes of the second labels: those of the highest PNMI; layer 2 while that is not known."""
        found = {}
        for clusters in CHOICES:
            if self._quality(clusters).is_file():
                hint = "delete it, and the step is run again"
                for row in read_json(self._quality(clusters), hint)["layers"]:
                    found[row["layer"], clusters] = float(row["all"]["pnmi"])
        return max(found, key=lambda key: found[key]) if len(found) > len(CHOICES) else (LAST, FEW)

    def _probe(self, upstream: str | Path, out: Path) -> tuple[object, ...]:
        return (
            "hubert-eff", "superb", "run", "--task", "ks", "--upstream", upstream, "--data", self.keywords, "--out", out, "--steps", 300,
            "--lr", 0.01,
        )  # fmt: skip

    def results(self) -> dict[str, Any]:
        """All figures, which are also written to `summary.json`."""
        out, (layer, clusters) = self.out, self.chosen()
        folders = {"mfcc": self._mfcc_folder(CLUSTERS), f"layer {layer}": out / f"labels-layer{layer}-{clusters}"}
        if clusters != CLUSTERS:
            folders[f"mfcc, {clusters} classes"] = self._mfcc_folder(clusters)
        results = {
            "valid": best_validation(out / "train.log"),
            "second valid": best_validation(out / "train-second.log"),
            "chosen": {"layer": layer, "clusters": clusters},
            "labels": {
                name: figures("hubert-eff", "labels", "quality", folder, "--alignments", self.alignments)
                for name, folder in folders.items()
            },
            "keyword spotting": {
                name: json.loads((out / f"ks-{name}" / "ks" / "result.json").read_text()) for name in ("pretrained", "second", "untrained")
            },
            "profile": figures("hubert-eff", "profile", self.checkpoint, "--seconds", 10),
            "seconds": {name: round(self.seconds(step), 1) for name, step in (self._first() | self._second()).items()},
        }
        write_json(out / "summary.json", results)
        return results


def table(results: dict[str, Any], out: Path) -> Table:
    """A table of what was made, where it is, and the figures."""
    valid, second, spotting, cost = (results[name] for name in ("valid", "second valid", "keyword spotting", "profile"))
    layer, clusters = results["chosen"]["layer"], results["chosen"]["clusters"]
    rows = [
        (
            "masked accuracy, valid",
            f"{valid['accuracy']:.1%} (most frequent label: {valid['majority']:.1%})",
            "pretrain/checkpoint_best.pt",
        ),
        ("code perplexity, valid", f"{valid['code perplexity']:.1f} of {CLUSTERS} (labels: {valid['label perplexity']:.1f})", ""),
    ]
    for name, found in results["labels"].items():
        quality = found["splits"]["valid"]
        of = f", {clusters} classes" if name.startswith("layer") else ""
        rows.append((f"labels from {name}{of}, valid", f"PNMI {quality['pnmi']:.3f}, phone purity {quality['phone_purity']:.3f}", ""))
    rows.append(
        (
            f"masked accuracy on labels from layer {layer}",
            f"{second['accuracy']:.1%} (most frequent label: {second['majority']:.1%})",
            "pretrain-second/checkpoint_best.pt",
        )
    )
    models = {"untrained": "untrained", "pretrained": "pre-trained on MFCC labels", "second": f"pre-trained on labels from layer {layer}"}
    for name, said in models.items():
        run = spotting[name]
        rows.append((f"keyword spotting, {said}", f"{run['accuracy']:.1%} (largest class: {run['chance']:.1%})", f"ks-{name}"))
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
