"""HuBERT on real speech, without overlap: keywords and speakers by models pre-trained on minutes of digits, beside filter banks.

    python benchmarks/learning/real_speech.py $FSDD --out runs/real-speech

$FSDD is the Free Spoken Digit Dataset (see superb_fsdd.py for the layouts). No recording stands in two of four parts, by its index: 0 to 4
test, 5 to 7 validation and 8 to 22 training of the heads, 23 and above pre-training. In the second protocol one speaker is held out of
everything but the test, which is then all that this speaker says.

Conformers of 0.2 and of at most 2 million parameters are pre-trained, each in float and at one bit (W1A1 on labels from the first update
on), for equal updates, on k-means labels of

    mfcc       MFCC
    layer      a layer of the float model that was trained on the MFCC labels
    teacher    a layer of a trained model, --teacher, as `hubert-eff labels --checkpoint` takes it

and probed with all labels and with a tenth of them: keyword spotting and speaker identification, S3PRL's heads, `--small`. Beside them
stand the untrained models and S3PRL's `fbank`, `fbank_no_cmvn` and `mfcc`. What has finished is kept in OUT: the same command goes on where
it was stopped, and adds seeds, sizes or the teacher. Writes OUT/real_speech.json and OUT/real_speech.md, which is also printed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile as sf
import torch
from real_speech_figures import page, values_of
from reporting import last_validation
from side_by_side import Chain, SideBySide, main_of
from superb_fsdd import Recording, read, recordings, write

import hubert_eff
from hubert_eff.config import SAMPLE_RATE
from hubert_eff.errors import UserError, unknown
from hubert_eff.recipes.base import Step, training
from hubert_eff.utils.files import temporary_folder, write_json, write_text

PARTS = {"test": range(5), "valid": range(5, 8), "train": range(8, 23)}
PRETRAINING = 23  # the first index of it
SHARE = 0.1  # of the labels
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "large": {"encoder_layers": 4, "encoder_embed_dim": 128, "encoder_ffn_embed_dim": 512, "conv_pos_groups": 16},
}
RATES = {"large": 0.002}  # learning rates other than the recipe's, at which five blocks of 128 channels learned nothing from MFCC labels
LABELS = ("mfcc", "layer", "teacher")
FORMS = ("float", "w1a1")
BASELINES = ("s3prl:fbank", "s3prl:fbank_no_cmvn", "s3prl:mfcc")
PROTOCOLS = {  # data of the heads -> tasks, and what pre-training heard: all speakers, or all but one
    "all": (("ks", "sid"), "shared"),
    "tenth": (("ks", "sid"), "shared"),
    "held-out": (("ks",), "held-out"),
}


@dataclass(frozen=True)
class Cell:
    """A model to be probed: an upstream of S3PRL, an untrained one, or one trained on some labels in some form."""

    heard: str  # shared | held-out
    size: str  # "" of an upstream of S3PRL
    labels: str  # of an upstream of S3PRL its name; "untrained"
    form: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join(part for part in (self.heard, self.size, self.labels.removeprefix("s3prl:"), self.form, str(self.seed)) if part)

    @property
    def trained(self) -> bool:
        """Whether it is pre-trained."""
        return self.labels in LABELS


def sides(found: dict[Recording, Path], protocol: str, held_out: str) -> dict[Recording, str]:
    """The side of each recording that a protocol gives to the heads."""
    if protocol == "held-out":
        ours = {key: side for key, side in sides(found, "all", held_out).items() if key[0] != held_out and side != "test"}
        return {key: ours.get(key, "test") for key in found if key in ours or key[0] == held_out}
    chosen = {key: side for key in found for side, indices in PARTS.items() if key[2] in indices}
    if protocol == "tenth":  # of each digit
        generator, kept = random.Random(0), set[Recording]()
        for digit in sorted({key[1] for key in chosen}):
            train = sorted(key for key, side in chosen.items() if side == "train" and key[1] == digit)
            kept.update(generator.sample(train, max(1, round(SHARE * len(train)))))
        chosen = {key: side for key, side in chosen.items() if side != "train" or key in kept}
    return chosen


@dataclass
class RealSpeech(SideBySide):
    """See the module."""

    SETTINGS = ("fsdd", "held_out", "updates", "batch_seconds", "clusters", "teacher", "teacher_layer")
    LATER = ("teacher", "teacher_layer")

    fsdd: Path
    out: Path
    seeds: int = 1
    sizes: tuple[str, ...] = ("small",)
    held_out: str = "theo"
    updates: int = 750
    batch_seconds: float = 32.0
    clusters: int = 50
    teacher: str | None = None
    teacher_layer: int | None = None
    processes: int = 2
    found: dict[Recording, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.found = recordings(self.fsdd)
        speakers = sorted({speaker for speaker, _, _ in self.found})
        if self.held_out not in speakers:
            raise unknown("speaker", self.held_out, speakers)
        for size in self.sizes:
            if size not in SIZES:
                raise unknown("size", size, SIZES)
        if (self.teacher is None) != (self.teacher_layer is None):
            raise UserError("--teacher and --teacher-layer go together: a model, and which of its hidden states is clustered")
        for name in ("seeds", "updates", "batch_seconds", "clusters", "processes"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
        self.fsdd, self.out = self.fsdd.resolve(), self.out.resolve()
        self.kinds = LABELS if self.teacher else LABELS[:2]

    # -- the cells ---------------------------------------------------------------------------------------------------

    def baselines(self) -> list[Cell]:
        """The cells without training, for the first seed only, since S3PRL's upstreams have no seeds."""
        return [Cell(heard, "", name, "", 1) for heard in ("shared", "held-out") for name in BASELINES]

    def cells(self) -> list[Cell]:
        """All cells, the most important first."""
        found = self.baselines()
        for seed in range(1, self.seeds + 1):
            for size in self.sizes:
                for heard in ("shared", "held-out"):
                    found += [Cell(heard, size, labels, form, seed) for labels in self.kinds for form in FORMS]
                    found.append(Cell(heard, size, "untrained", "float", seed))
        return found

    def protocols(self, cell: Cell) -> list[str]:
        """The protocols by which a cell is probed."""
        return [name for name, (_, heard) in PROTOCOLS.items() if heard == cell.heard]

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's results."""
        return self.out / "cells" / cell.name

    def upstream(self, cell: Cell) -> str:
        """Its model."""
        if not cell.size:
            return cell.labels
        return str(self.folder(cell) / ("train/checkpoint_last.pt" if cell.trained else "model.safetensors"))

    # -- the commands ------------------------------------------------------------------------------------------------

    def rounds(self) -> list[list[Chain]]:
        """Manifests and labels that need no model of ours; then, all speakers before all but one: models on these labels and what stands
        beside them; labels of their layers; models on those."""
        speech = ("shared", "held-out")
        rounds: list[list[Chain]] = [[[self._manifest(heard), *self._first_labels(heard)] for heard in speech]]
        for seed in range(1, self.seeds + 1):
            for heard in speech:
                cells = [cell for cell in self.cells() if cell.heard == heard and cell.seed == seed]
                # float models first, then what they are compared with, then one bit
                order = sorted(cells, key=lambda cell: 2 if cell.form == "w1a1" else 0 if cell.trained else 1)
                rounds.append([self._chain(cell) for cell in order if cell.labels != "layer"])
                layers = [cell for cell in cells if cell.labels == "layer"]
                rounds.append([[self._layer_labels(cell)] for cell in layers if cell.form == "float"])
                rounds.append([self._chain(cell) for cell in layers])
        return rounds

    def _manifest(self, heard: str) -> Step:
        words = ("hubert-eff", "manifest", self.out / "speech" / heard, "--out", self.out / heard, "--join", 4, "--split-by", "file")
        return Step(f"{heard}: manifest", (*words, "--valid-percent", 10))

    def _first_labels(self, heard: str) -> list[Step]:
        steps = [self._labels(heard, "mfcc", self.out / heard / "mfcc", "--features", "mfcc")]
        if self.teacher:
            words = ("--checkpoint", self.teacher, "--layer", self.teacher_layer)
            steps.append(self._labels(heard, "teacher", self.out / heard / "teacher", *words))
        return steps

    def _labels(self, heard: str, name: str, out: Path, *source: object) -> Step:
        words = ("hubert-eff", "labels", self.out / heard, "--out", out, *source, "--clusters", self.clusters, "--workers", 1)
        return Step(f"{heard}: labels of {name}", words)

    def labels_of(self, cell: Cell) -> Path:
        """The labels that a cell is trained on; those of a layer are of the float model of its size, seed and speech."""
        return self.out / cell.heard / (cell.labels if cell.labels != "layer" else f"layer-{cell.size}-{cell.seed}")

    def _layer_labels(self, cell: Cell) -> Step:
        before = Cell(cell.heard, cell.size, "mfcc", "float", cell.seed)
        depth = SIZES[cell.size].get("encoder_layers", 2)
        source = ("--checkpoint", self.upstream(before), "--layer", (depth + 1) // 2)
        return self._labels(cell.heard, f"a layer, {cell.size}, seed {cell.seed}", self.labels_of(cell), *source)

    def _chain(self, cell: Cell) -> Chain:
        steps = [Step(f"{cell.name}: pre-training", self._training(cell))] if cell.trained else []
        for protocol in self.protocols(cell):
            tasks, _ = PROTOCOLS[protocol]
            words = (
                "hubert-eff", "superb", "run", "--task", ",".join(tasks), "--upstream", self.upstream(cell), "--data", self.heads(protocol),
                "--out", self.folder(cell) / protocol, "--small", "--cache", self.folder(cell) / "cache", "--seed", cell.seed,
            )  # fmt: skip
            steps.append(Step(f"{cell.name}: heads, {protocol}", words))
        return steps

    def _training(self, cell: Cell) -> tuple[object, ...]:
        quant = ["quant=w1a1"] if cell.form == "w1a1" else []
        rate = 100 if cell.labels == "mfcc" else 50
        paths = {
            "task.data": self.out / cell.heard, "task.label_dir": self.labels_of(cell), "checkpoint.save_dir": self.folder(cell) / "train",
            "common.log_file": self.folder(cell) / "train.log",
        }  # fmt: skip
        return training(
            "pretrain", "debug", paths, *quant, *(f"model.{key}={value}" for key, value in SIZES[cell.size].items()),
            f"common.seed={cell.seed}", f"optimization.max_update={self.updates}", f"task.label_rate={rate}",
            f"dataset.max_tokens={round(self.batch_seconds * SAMPLE_RATE)}",
            *([f"optimization.lr=[{RATES[cell.size]:g}]"] if cell.size in RATES else ()),
        )  # fmt: skip

    def heads(self, protocol: str) -> Path:
        """The data of the heads."""
        return self.out / "heads" / protocol

    def prepare(self) -> None:
        """Write the speech, the data of the heads and the models that are not trained."""
        for protocol in PROTOCOLS:
            if not (place := self.heads(protocol)).is_dir():
                with temporary_folder(place) as draft:
                    write(self.found, sides(self.found, protocol, self.held_out), draft / "data")
                    (draft / "data").rename(place)
        for heard in ("shared", "held-out"):
            if not (place := self.out / "speech" / heard).is_dir():
                with temporary_folder(place) as draft:
                    self._write_speech(heard, draft / "speech")
                    (draft / "speech").rename(place)
        for cell in self.cells():
            if cell.labels == "untrained" and not (file := Path(self.upstream(cell))).is_file():
                hubert_eff.export(self.build(cell.size, cell.seed), file)

    def _write_speech(self, heard: str, out: Path) -> None:
        for (speaker, digit, index), file in self.found.items():
            if index >= PRETRAINING and not (heard == "held-out" and speaker == self.held_out):
                target = out / speaker / f"{digit}_{speaker}_{index}.flac"
                target.parent.mkdir(parents=True, exist_ok=True)
                sf.write(target, read(file), SAMPLE_RATE, subtype="PCM_16")

    def build(self, size: str, seed: int = 1) -> Any:
        """A model without training."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return hubert_eff.build("conformer-debug", **SIZES[size], normalize=True)

    # -- the figures -------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """All figures, which are written to `real_speech.json`, and as a page to `real_speech.md`."""
        values = values_of(self)
        write_json(self.out / "real_speech.json", values)
        write_text(self.out / "real_speech.md", page(values))
        return values

    def validation(self, cell: Cell) -> dict[str, float]:
        """The validation of a cell's pre-training."""
        return last_validation(self.folder(cell) / "train.log")

    def finished(self) -> list[Cell]:
        """The cells whose steps have all succeeded."""
        return [cell for cell in self.cells() if all(self._is_done(step, ()) for step in self._chain(cell))]


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("fsdd", type=Path, metavar="FSDD", help="folder of the Free Spoken Digit Dataset")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N (default: 1)")
    options.add_argument(
        "--sizes", nargs="+", default=["small"], metavar="SIZE", help="small: 0.2 M parameters, large: 1.7 M (default: small)"
    )
    options.add_argument(
        "--held-out", default=RealSpeech.held_out, metavar="SPEAKER", help="the speaker of the second protocol (%(default)s)"
    )
    options.add_argument("--updates", type=int, default=RealSpeech.updates, help="updates of each pre-training (default: %(default)s)")
    options.add_argument(
        "--batch-seconds", type=float, default=RealSpeech.batch_seconds, help="seconds of speech per update (default: %(default)g)"
    )
    options.add_argument(
        "--clusters", type=int, default=RealSpeech.clusters, help="number of clusters of all labels (default: %(default)s)"
    )
    options.add_argument("--teacher", metavar="CKPT", help="a trained model, for labels of one of its layers")
    options.add_argument("--teacher-layer", type=int, metavar="L", help="hidden state of the teacher; 0 enters its first block")
    options.add_argument("--processes", type=int, default=2, metavar="N", help="commands that run side by side (default: %(default)s)")
    options.add_argument("--tables", action="store_true", help="run nothing: tables of what has finished")
    args = vars(options.parse_args(arguments))
    tables = args.pop("tables")

    def work() -> None:
        args["sizes"] = tuple(args["sizes"])
        bench = RealSpeech(**args)
        if tables:
            bench.check()
        print(page(bench.results() if tables else bench.run()))

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return main_of(Path(sys.argv[0]).name, work)


if __name__ == "__main__":
    sys.exit(main())
