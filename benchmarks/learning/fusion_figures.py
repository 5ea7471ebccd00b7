"""Figures 2, 4 and 5 of FusionFormer (Song et al. 2022), drawn from runs of our own: where a norm stands, and what comes of it.

    python benchmarks/learning/fusion_figures.py SPEECH --out runs/fusion

SPEECH is any folder of speech. Four models learn the same k-means labels of MFCC with the recipe of configs/pretrain/debug.yaml. They are
of debug size but for the number of blocks, and have absolute positions:

    none         a Conformer without its LayerNorms; the BatchNorm of its convolution module stays, in all three Conformers
    batch_norm   a Conformer with BatchNorm in the places of LayerNorm
    layer_norm   a Conformer
    fusion       a FusionFormer: BatchNorm after every linear and convolutional layer

Every `--every` updates a run records mean and variance of every layer's output on its batch (`task.trends_interval`). A run that stops
because its loss or gradient is not finite is a result, too. What has finished is kept in OUT: the same command goes on where it was
stopped. Writes fusion.json and three pictures, 800 px wide, to OUT; `--tables DIR` writes them to DIR from what has finished, and
runs nothing.

    fusion-curves.svg   loss in training, and masked accuracy of the valid split
    fusion-trends.svg   mean and variance of the output of every layer, over updates
    fusion-depth.svg    variance of input, weight and output of every layer, over depth, at the last checkpoint, on the valid split
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import markdown, run_of
from side_by_side import Chain, SideBySide, main_of
from torch import Tensor, nn

import hubert_eff
from hubert_eff.analysis.layer_trends import ATTENUATED, EXPLODED, FILE, LayerTrends, alarms, place, read_trends
from hubert_eff.analysis.plots import FIRST
from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.tsv import read_manifest
from hubert_eff.errors import UserError
from hubert_eff.recipes.base import Step, training
from hubert_eff.recognition.recordings import read_recording
from hubert_eff.reports.training_log import read_log
from hubert_eff.utils.files import write_text

MODELS = {  # name -> title, configuration, keys
    "none": ("no norm", "debug", ("model.block_norm=none", "model.pos_enc_type=abs")),
    "batch_norm": ("BatchNorm in place of LayerNorm", "debug", ("model.block_norm=batch_norm", "model.pos_enc_type=abs")),
    "layer_norm": ("LayerNorm", "debug", ("model.pos_enc_type=abs",)),
    "fusion": ("FusionFormer", "fusionformer_debug", ()),
}
COLORS = dict(zip(MODELS, (FIRST[3], FIRST[1], FIRST[0], FIRST[2]), strict=True))
# layers of a block in order of depth, as a Conformer's are called; queries stand for keys and values
LAYERS = (
    "ffn1.w_1", "ffn1.w_2", "self_attn.q_proj", "self_attn.out_proj", "conv_module.pointwise_conv1", "conv_module.depthwise_conv",
    "conv_module.pointwise_conv2", "ffn2.w_1", "ffn2.w_2",
)  # fmt: skip
UTTERANCES = 8  # of the valid split, over which depth is looked at
Figures = dict[str, dict[str, float | None]]


@dataclass
class FusionFigures(SideBySide):
    """See the module."""

    SETTINGS = ("speech", "layers", "updates", "batch_seconds", "clusters", "lr", "every", "seed")

    speech: Path
    out: Path
    layers: int = 6
    updates: int = 750
    batch_seconds: float = 32.0
    clusters: int = 50
    lr: float = 0.006
    every: int = 25
    seed: int = 1
    processes: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "updates", "batch_seconds", "clusters", "lr", "every", "processes"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
        self.speech, self.out = self.speech.resolve(), self.out.resolve()

    def folder(self, model: str) -> Path:
        """Checkpoints and trends of a model; its log stands beside it."""
        return self.out / model

    def rounds(self) -> list[list[Chain]]:
        """Manifest and labels; then the four runs."""
        data = self.out / "data"
        words = ("hubert-eff", "manifest", self.speech, "--out", data, "--join", 4, "--split-by", "file", "--valid-percent", 10)
        source = ("--features", "mfcc", "--clusters", self.clusters, "--workers", 1)
        labels = Step("labels", ("hubert-eff", "labels", data, "--out", data / "mfcc", *source))
        return [[[Step("manifest", words), labels]], [[self.training(model)] for model in MODELS]]

    def training(self, model: str) -> Step:
        """The run of a model."""
        _, config, keys = MODELS[model]
        paths = {
            "task.data": self.out / "data", "task.label_dir": self.out / "data" / "mfcc", "checkpoint.save_dir": self.folder(model),
            "common.log_file": self.out / f"{model}.log",
        }  # fmt: skip
        overrides = (
            f"common.seed={self.seed}", "common.log_interval=10", f"optimization.max_update={self.updates}", f"optimization.lr=[{self.lr}]",
            f"dataset.max_tokens={round(self.batch_seconds * SAMPLE_RATE)}", f"task.trends_interval={self.every}",
            "task.trends_input=batch", f"model.encoder_layers={self.layers}",
        )  # fmt: skip
        return Step(f"training, {model}", training("pretrain", config, paths, *overrides, *keys))

    def accepts(self, step: Step, code: int) -> bool:
        """A run that diverges is a result."""
        return code == 0 or (code == 1 and self.stopped(step) is not None)

    def stopped(self, step: Step) -> str | None:
        """At which update a training run found what is not finite, in words of its last line; None if it did not."""
        log = self.log_of(step)
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if log.is_file() else []
        found = re.search(r"stopped at (update \d+: .+ is (?:-?inf|nan)) \(utterances", "".join(last))
        return found[1] if found else None

    # -- the figures -------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """All figures, which are written to `out` with the pictures."""
        return self.write(self.out)

    def write(self, place: Path) -> dict[str, Any]:
        """Write figures and pictures of what has finished to `place`."""
        finished = [model for model in MODELS if self._is_done(self.training(model), ())]
        if not finished:
            raise UserError(f"no run of {self.out} has finished: run the command without --tables")
        values = {
            "settings": {**self.settings, "speech": self.speech.name}, "run": run_of(self.commits()),
            "models": {model: self.figures(model) for model in finished},
        }  # fmt: skip
        write_text(place / "fusion.json", json.dumps(values) + "\n")
        for name, draw in (("curves", curves), ("trends", trends), ("depth", depth)):
            with drawn(place / f"fusion-{name}.svg") as figure:
                draw(values, figure)
        return values

    def figures(self, model: str) -> dict[str, Any]:
        """Curves, trends and depth of a model."""
        log = read_log(self.out / f"{model}.log")
        records = read_trends(self.folder(model) / FILE)
        names = list(records[-1].layers)
        found = alarms(records)
        checkpoint = self.folder(model) / "checkpoint_last.pt"
        return {
            "title": MODELS[model][0],
            "stopped": self.stopped(self.training(model)),
            "loss": [[int(row["num_updates"]), row["loss"]] for row in log.train if math.isfinite(row["loss"])],
            "valid": [[int(row["num_updates"]), row["correct_m_0"], row["majority_m_0"]] for row in log.valid],
            "alarms": [str(alarm) for alarm in found],
            "trends": {
                "updates": [record.update for record in records],
                **{
                    key: {name: [_short(record.layers[name][i]) for record in records] for name in names}
                    for i, key in enumerate(("mean", "variance"))
                },
            },
            "depth": variances(checkpoint, self.valid_speech()) if checkpoint.is_file() else None,
        }

    def valid_speech(self) -> list[Tensor]:
        """Utterances of the valid split, (1, S) each."""
        manifest = read_manifest(self.out / "data" / "valid.tsv")
        return [read_recording(manifest.root / name) for name in manifest.names[:UTTERANCES]]


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


@torch.no_grad()
def variances(checkpoint: Path, speech: Sequence[Tensor]) -> Figures:
    """Variance of what enters a layer, of its weights and of its output, by "BLOCK NAME", on speech (1, S) in eval mode."""
    model = hubert_eff.load(checkpoint).eval()
    found: dict[str, list[tuple[float, float]]] = {}
    entered: dict[str, float] = {}
    handles = []
    for index, block in enumerate(model.encoder.layers):
        for name in LAYERS:
            # projections to queries, keys and values may be one product, which then is no layer of this name: all see what attention sees
            module = block.get_submodule("self_attn" if name.endswith("q_proj") else name)

            def entering(_m: nn.Module, inputs: tuple[Tensor, ...], key: str = f"{index + 1} {name}") -> None:
                entered[key] = float(inputs[0].float().var())

            handles.append(module.register_forward_pre_hook(entering))
    try:
        for wav in speech:
            with LayerTrends(model.encoder).watching() as outputs:
                model.hidden_states(wav)
            for layer, (_, variance, _) in outputs.items():
                block_name, name = place(layer)
                if name in LAYERS:
                    key = f"{block_name.removeprefix('block ')} {name}"
                    found.setdefault(key, []).append((entered[key], variance))
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: {
            "input": _mean(value for value, _ in rows), "weight": _short(float(weight(model, key).var())),
            "output": _mean(value for _, value in rows),
        }
        for key, rows in found.items()
    }  # fmt: skip


def _mean(values: Iterator[float]) -> float | None:
    rows = list(values)
    return _short(sum(rows) / len(rows))


def weight(model: Any, key: str) -> Tensor:
    """The weights of a layer, "BLOCK NAME"."""
    number, _, name = key.partition(" ")
    block = model.encoder.layers[int(number) - 1]
    if name == "self_attn.q_proj" and not hasattr(block.self_attn, "q_proj"):
        fused: Tensor = block.self_attn.qkv_proj.weight
        return fused.chunk(3)[0]
    found: Tensor = block.get_submodule(name).weight
    return found


# -- the pictures ----------------------------------------------------------------------------------------------------


@contextmanager
def drawn(path: Path) -> Iterator[Any]:
    """A figure 800 px wide, which is written to `path`. The same values give the same file. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "hubert-eff", "font.size": 9, "axes.grid": True, "grid.color": "#d1d9e0"}):
        figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
        yield figure
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        short = re.sub(r"^L .*$", lambda line: re.sub(r"(\.\d)\d+", r"\1", line[0]), text.getvalue(), flags=re.MULTILINE)
        write_text(path, short)  # points of lines to a tenth of 1/72 inch


def curves(values: dict[str, Any], figure: Any) -> None:
    """Loss in training and masked accuracy of the valid split."""
    left, right = figure.subplots(1, 2)
    for model, found in values["models"].items():
        style = {"color": COLORS[model], "linewidth": 1.3}
        left.plot(*zip(*found["loss"], strict=True), label=found["title"], **style)
        if found["stopped"]:
            left.plot(*found["loss"][-1], marker="x", markersize=8, markeredgewidth=2, color=COLORS[model])
        if found["valid"]:
            updates, right_share, _ = zip(*found["valid"], strict=True)
            right.plot(updates, [100 * share for share in right_share], marker=".", **style)
    majority = [100 * row[2] for found in values["models"].values() for row in found["valid"][-1:]]
    if majority:
        right.axhline(max(majority), color="#57606a", linestyle="--", linewidth=1)
        place_of = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        right.annotate("most frequent label", (0.99, max(majority)), color="#57606a", **place_of)
    left.set(title="loss in training, bits", xlabel="updates")
    right.set(title="masked accuracy, valid split, %", xlabel="updates")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(MODELS), frameon=False)


def trends(values: dict[str, Any], figure: Any) -> None:
    """Mean and variance of every layer's output over updates: a column per model, a line per layer, darker with depth."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator, SymmetricalLogLocator

    figure.set_size_inches(8, 4.6)
    blocks = values["settings"]["layers"]
    axes = figure.subplots(2, len(MODELS), sharex=True, sharey="row")
    for column, (model, (title, *_)) in zip(axes.T, MODELS.items(), strict=True):
        column[0].set_title(title.replace(" in place", "\nin place"), fontsize=9)
        column[1].set_xlabel("updates")
        found = values["models"].get(model)
        if found is None:
            continue
        for row, (axis, key) in enumerate(zip(column, ("variance", "mean"), strict=True)):
            for layer, series in found["trends"][key].items():
                block, name = place(layer)
                if name in LAYERS:
                    color = colormaps["viridis_r"](0.1 + 0.9 * int(block.removeprefix("block ")) / blocks)
                    shown = [value if value is not None and (row or value > 0) else math.nan for value in series]
                    axis.plot(found["trends"]["updates"], shown, color=color, linewidth=0.7)
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.axhline(EXPLODED, color=FIRST[3], linestyle=":", linewidth=1)
    for axis in axes[1]:
        axis.set_yscale("symlog", linthresh=1.0)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=1000, linthresh=1.0))
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0][0].set_ylabel("variance of the output")
    axes[1][0].set_ylabel("mean of the output")
    marks = [Line2D([], [], color=colormaps["viridis_r"](0.1 + 0.9 * n / blocks), label=f"block {n}") for n in range(1, blocks + 1)]
    marks.append(Line2D([], [], color=FIRST[3], linestyle=":", label="alarm: explosion"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)


def depth(values: dict[str, Any], figure: Any) -> None:
    """Variance of input, weight and output of every layer, from the first to the last."""
    from matplotlib.ticker import NullFormatter

    figure.set_size_inches(8, 5.6)
    axes = figure.subplots(3, 1, sharex=True)
    places = [f"{n} {name}" for n, name in itertools.product(range(1, values["settings"]["layers"] + 1), LAYERS)]
    for model, found in values["models"].items():
        if found["depth"] is None:
            continue
        for axis, key in zip(axes, ("input", "weight", "output"), strict=True):
            axis.plot(
                [i for i, key_of in enumerate(places) if key_of in found["depth"]],
                [found["depth"][name][key] for name in places if name in found["depth"]],
                color=COLORS[model], linewidth=1.2, marker=".", markersize=3, label=found["title"],
            )  # fmt: skip
    for axis, key in zip(axes, ("input", "weights", "output"), strict=True):
        axis.set(yscale="log", ylabel=f"variance, {key}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(visible=False, axis="x")
        for edge in range(len(LAYERS), len(places), len(LAYERS)):
            axis.axvline(edge - 0.5, color="#d1d9e0", linewidth=1)
    axes[-1].set_xticks([n * len(LAYERS) + (len(LAYERS) - 1) / 2 for n in range(values["settings"]["layers"])])
    axes[-1].set_xticklabels([f"block {n + 1}" for n in range(values["settings"]["layers"])])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(MODELS), frameon=False)


def page(values: dict[str, Any]) -> str:
    """A row per model."""
    rows = []
    for found in values["models"].values():
        last = found["trends"]["variance"]
        ends = sorted(series[-1] for series in last.values() if series[-1] is not None)
        valid = found["valid"][-1] if found["valid"] else None
        rows.append((
            found["title"], found["loss"][-1][0], f"{found['loss'][-1][1]:.2f}",
            f"{100 * valid[1]:.1f} ({100 * valid[2]:.1f})" if valid else "–",
            f"{ends[0]:.2g} to {ends[-1]:.2g}" if ends else "–",
            f"{max((v for series in last.values() for v in series if v is not None), default=math.nan):.2g}",
            found["alarms"][0] if found["alarms"] else "none",
            found["stopped"] or "no",
        ))  # fmt: skip
    head = (
        "model", "updates", "loss, bits", "masked accuracy, valid (most frequent label), %", "variances of the outputs at the end",
        "largest on the way", "first alarm", "stopped",
    )  # fmt: skip
    settings, run = values["settings"], values["run"]
    text = (
        f"{settings['layers']} blocks, {settings['updates']} updates of {settings['batch_seconds']:g} s, learning rate {settings['lr']:g}, "
        f"seed {settings['seed']}; alarms: variance above {EXPLODED:g} or below {ATTENUATED:g}. {run['cpu']}; torch {run['torch']}, commit "
        f"{run['commit']}, {run['date']}."
    )
    return "\n".join([*markdown(head, rows), text])


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("speech", type=Path, metavar="SPEECH", help="folder of speech")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs, figures and pictures")
    for option, what in (
        ("--layers", "blocks of each model"), ("--updates", "updates of each run"), ("--batch-seconds", "seconds of speech per update"),
        ("--clusters", "classes of the labels"), ("--lr", "peak learning rate"), ("--every", "updates between two records of layer trends"),
        ("--seed", "seed of all runs"), ("--processes", "commands that run side by side"),
    ):  # fmt: skip
        default = getattr(FusionFigures, option[2:].replace("-", "_"))
        options.add_argument(option, type=type(default), default=default, help=f"{what} (default: %(default)g)")
    options.add_argument("--tables", type=Path, metavar="DIR", help="run nothing: write figures and pictures of what has finished to DIR")
    args = vars(options.parse_args(arguments))
    tables = args.pop("tables")

    def work() -> None:
        bench = FusionFigures(**args)
        if tables is not None:
            bench.check()
        print(page(bench.run() if tables is None else bench.write(tables)))

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return main_of(Path(sys.argv[0]).name, work)


if __name__ == "__main__":
    sys.exit(main())
