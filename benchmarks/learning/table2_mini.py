"""Table 2 of "Attention or Convolution" in miniature: what one bit costs encoders of attention only, and those with convolution.

    python benchmarks/learning/table2_mini.py --out runs/table2-mini

Jeon et al. 2023 (arXiv:2311.02772) find that encoders of attention alone lose less at one bit (W1A1) than those with convolutions. Here
five encoders of 0.3 to 0.5 million parameters, in the shapes of the paper's rows, are pre-trained on the same generated speech, with the
same labels (k-means on MFCC) for the same number of updates, twice: in float, and at one bit on labels from the first update on, which
learns best at equal updates (docs/binarization.md), by the paper's policy, which binarizes depthwise convolutions too. Heads of five tasks
of mini-SUPERB (docs/superb.md, `--small`) are trained on these ten frozen models, and on the five without any training. The first seed has
all of it; the others have the Conformer and the deep-narrow Sparseformer on three tasks.

The defaults take about two hours of a core for the first seed (AMD EPYC, Zen 5). Everything that has finished is kept in OUT: the same
command goes on where it was stopped, and does nothing when all is done. With more seeds or tasks it adds what is missing. Writes
OUT/table2_mini.json and OUT/table2_mini.md, which is also printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reporting import last_validation
from side_by_side import Chain, SideBySide, main_of
from table2_figures import page, values_of

import hubert_eff
from hubert_eff.errors import UserError, unknown
from hubert_eff.recipes.base import Step, training
from hubert_eff.utils.files import write_json, write_text
from superb_tasks.tasks import choose

FORMS = ("float", "w1a1", "untrained")
TASKS = ("ks", "sid", "asr", "pr", "ic")
REPEATED_TASKS = ("ks", "sid", "pr")
REPEATED = ("sparseformer-dn", "conformer")


@dataclass(frozen=True)
class Mini:
    """A model: the preset and configuration that it resizes, what it changes of them, its row in the paper, its kind."""

    preset: str
    row: str
    attention_only: bool
    sizes: dict[str, Any]

    @property
    def config(self) -> str:
        """The group `encoder` that trains the preset."""
        return self.preset.replace("-", "_")


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}  # models this small do not learn minutes of speech by heart in this budget


def _sizes(layers: int, dim: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {"encoder_layers": layers, "encoder_embed_dim": dim, "encoder_ffn_embed_dim": inner}
    return {**sizes, "encoder_attention_heads": 4, "conv_pos_groups": 16, **NO_DROPOUT, **more}


SPARSE = {"sparse_stride": 32, "sparse_expressivity": 8}  # as in the presets of the paper's sizes
MODELS = {  # the most wanted first
    "sparseformer-dn": Mini("sparseformer-debug", "Sparseformer-DN-S", True, _sizes(6, 80, 288, **SPARSE)),
    "conformer": Mini("conformer-debug", "Conformer-S", False, _sizes(4, 64, 256)),
    "transformer": Mini("transformer-debug", "Vanilla Trans", True, _sizes(4, 96, 384)),
    "sparseformer-sw": Mini("sparseformer-debug", "Sparseformer-SW-S", True, _sizes(3, 112, 416, **SPARSE)),
    "squeezeformer": Mini("squeezeformer-debug", "Squeeze-XS", False, _sizes(4, 64, 256)),
}


@dataclass(frozen=True)
class Cell:
    """A model in one form, trained or made by one seed, and the tasks that it is probed by."""

    model: str
    form: str
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.model}-{self.form}-{self.seed}"


@dataclass
class Table2Mini(SideBySide):
    """See the module. `minutes`: of speech to pre-train on; `superb_minutes`: of each data set of mini-SUPERB; `batch_seconds`: of speech
    per update; `head_steps`: of all heads (default: those of --small)."""

    SETTINGS = ("models", "updates", "minutes", "superb_minutes", "batch_seconds", "rate", "clusters", "head_steps", "policy")

    out: Path
    models: tuple[str, ...] = tuple(MODELS)
    tasks: tuple[str, ...] = TASKS
    seeds: int = 1
    repeat: tuple[str, ...] = REPEATED
    updates: int = 2000
    minutes: float = 20.0
    superb_minutes: float = 20.0
    batch_seconds: float = 16.0
    rate: float = 0.003
    clusters: int = 50
    head_steps: int | None = None
    policy: str = "paper"
    processes: int = 2
    cells: list[Cell] = field(init=False)

    def __post_init__(self) -> None:
        for name in (*self.models, *self.repeat):
            if name not in MODELS:
                raise unknown("model", name, MODELS)
        if len(set(self.models)) < len(self.models) or len(set(self.tasks)) < len(self.tasks):
            raise UserError("--models and --tasks: name each once")
        for task in choose(",".join(self.tasks)):
            if not task.trains or task.name in ("asv", "er"):
                raise UserError(
                    f"--tasks {task.name}: its figure is not a share of right answers on one test set: take some of {','.join(TASKS)}"
                )
        for name in ("seeds", "updates", "minutes", "superb_minutes", "batch_seconds", "rate", "clusters", "processes"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
        self.out = self.out.resolve()
        rest = tuple(task for task in self.tasks if task in REPEATED_TASKS) or self.tasks
        self.cells = [Cell(model, form, 1, self.tasks) for model in self.models for form in FORMS]
        repeated = [model for model in self.models if model in self.repeat]
        self.cells += [Cell(m, form, seed, rest) for seed in range(2, self.seeds + 1) for m in repeated for form in FORMS]

    def check(self) -> None:
        """Raise `UserError` for what would only fail later, and for fewer seeds or tasks than OUT has."""
        super().check()
        cells = [folder for folder in (self.out / "cells").glob("*-*-*") if folder.name.rpartition("-")[2].isdigit()]
        last = max((int(folder.name.rpartition("-")[2]) for folder in cells), default=1)
        if last > self.seeds:
            raise UserError(f"{self.out} holds seeds 1 to {last}, --seeds is {self.seeds}: give {last} or more, or another --out")
        known = {result.parent.name for folder in cells for result in folder.glob("superb/*/result.json")}
        if left_out := sorted(known - set(self.tasks)):
            raise UserError(f"{self.out} holds results of {', '.join(left_out)}, which --tasks leaves out: name them too, or another --out")

    # -- the commands ------------------------------------------------------------------------------------------------

    def rounds(self) -> list[list[Chain]]:
        """Corpora and labels; then the models."""
        speech, data, labels = self.out / "speech", self.out / "data", self.out / "labels"
        corpus = ("hubert-eff", "corpus", "demo", "--out", speech, "--minutes", f"{self.minutes:g}", "--speakers", 24)
        make = ("hubert-eff", "labels", data, "--out", labels, "--features", "mfcc", "--clusters", self.clusters, "--workers", 1)
        superb = ("hubert-eff", "corpus", "superb", "--out", self.superb, "--minutes", f"{self.superb_minutes:g}")
        first = [
            [
                Step("Speech to pre-train on", corpus),
                Step("Its manifest", ("hubert-eff", "manifest", speech, "--out", data, "--valid-percent", 10)),
                Step("Its labels", make),
            ],
            [Step("The data of mini-SUPERB", (*superb, "--task", ",".join(self.tasks)))],
        ]
        return [first, [self._chain(cell) for cell in self.cells]]

    @property
    def superb(self) -> Path:
        """The data of the tasks."""
        return self.out / "superb"

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's results."""
        return self.out / "cells" / cell.name

    def upstream(self, cell: Cell) -> Path:
        """Its model."""
        return self.folder(cell) / ("model.safetensors" if cell.form == "untrained" else "train/checkpoint_last.pt")

    def _chain(self, cell: Cell) -> Chain:
        words = (
            "hubert-eff", "superb", "run", "--task", ",".join(cell.tasks), "--upstream", self.upstream(cell), "--data", self.superb,
            "--out", self.folder(cell) / "superb", "--small", "--cache", self.folder(cell) / "cache", "--seed", cell.seed,
            *(("--steps", self.head_steps) if self.head_steps else ()),
        )  # fmt: skip
        probe = Step(f"{cell.name}: heads of {' '.join(cell.tasks)}", words)
        return [probe] if cell.form == "untrained" else [Step(f"{cell.name}: pre-training", self._training(cell)), probe]

    def _training(self, cell: Cell) -> tuple[object, ...]:
        mini, place = MODELS[cell.model], self.folder(cell) / "train"
        quant = ["quant=w1a1", f"model.quant_policy={self.policy}"] if cell.form == "w1a1" else []
        paths = {"task.data": self.out / "data", "task.label_dir": self.out / "labels", "checkpoint.save_dir": place}
        return training(
            "pretrain", "debug", {**paths, "common.log_file": self.folder(cell) / "train.log"}, f"encoder={mini.config}", *quant,
            *(f"model.{key}={value}" for key, value in mini.sizes.items()), f"common.seed={cell.seed}",
            f"optimization.max_update={self.updates}", f"optimization.lr=[{self.rate:g}]",
            f"dataset.max_tokens={round(self.batch_seconds * hubert_eff.config.SAMPLE_RATE)}",
        )  # fmt: skip

    def build(self, model: str, seed: int = 1, **more: Any) -> Any:
        """A model without training, whose masks and labels stay out of it."""
        mini = MODELS[model]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return hubert_eff.build(mini.preset, **mini.sizes, normalize=True, **more)

    def prepare(self) -> None:
        """Write the models that are not trained."""
        for cell in self.cells:
            file = self.upstream(cell)
            if cell.form == "untrained" and not file.is_file():
                hubert_eff.export(self.build(cell.model, cell.seed), file)

    # -- the figures -------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """All figures, which are written to `table2_mini.json`, and as a page to `table2_mini.md`."""
        values = values_of(self)
        write_json(self.out / "table2_mini.json", values)
        write_text(self.out / "table2_mini.md", page(values))
        return values

    def validation(self, cell: Cell) -> dict[str, float]:
        """The validation of a cell's pre-training."""
        return last_validation(self.folder(cell) / "train.log")

    def seconds_of(self, cell: Cell) -> dict[str, float]:
        """How long training and heads took."""
        steps = self._chain(cell)
        return dict(zip(("heads",) if len(steps) == 1 else ("pre-training", "heads"), map(self.seconds, steps), strict=True))

    def finished(self) -> list[Cell]:
        """The cells whose steps have all succeeded."""
        return [cell for cell in self.cells if all(self._is_done(step, ()) for step in self._chain(cell))]


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    options.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N; the first has all models and tasks (default: 1)")
    options.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"some of {' '.join(MODELS)}")
    options.add_argument("--tasks", default=",".join(TASKS), metavar="TASK,...", help="tasks of mini-SUPERB (default: %(default)s)")
    options.add_argument("--updates", type=int, default=Table2Mini.updates, help="updates of each pre-training (default: %(default)s)")
    options.add_argument(
        "--minutes", type=float, default=Table2Mini.minutes, help="minutes of speech to pre-train on (default: %(default)g)"
    )
    options.add_argument(
        "--superb-minutes",
        type=float,
        default=Table2Mini.superb_minutes,
        help="minutes of speech in each data set of the tasks (default: %(default)g)",
    )
    options.add_argument(
        "--batch-seconds", type=float, default=Table2Mini.batch_seconds, help="seconds of speech per update (default: %(default)g)"
    )
    options.add_argument("--head-steps", type=int, metavar="N", help="steps of every head (default: those of `superb run --small`)")
    options.add_argument("--processes", type=int, default=2, metavar="N", help="commands that run side by side (default: %(default)s)")
    options.add_argument("--tables", action="store_true", help="run nothing: tables of what has finished")
    args = vars(options.parse_args(arguments))
    tables = args.pop("tables")

    def work() -> None:
        args["models"] = tuple(args["models"])
        args["tasks"] = tuple(name.strip() for name in args["tasks"].split(","))
        bench = Table2Mini(**args)
        if tables:
            bench.check()
        print(page(bench.results() if tables else bench.run()))

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return main_of(Path(sys.argv[0]).name, work)


if __name__ == "__main__":
    sys.exit(main())
