"""The recipe of a paper's model from a folder of recordings to an export: two phases of pre-training, each on labels of its own.

    manifest -> MFCC labels -> phase 1 -> labels of one of its layers -> phase 2 -> mean of the last checkpoints -> export
    or, from a model that there is: manifest -> labels of one of its layers -> phase 2, which starts from it -> ...
        (-> distillation to one bit, from phase 2's model and on its labels -> export) (-> SUPERB)

Every step is a command that a user could type.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.open import open_model
from ..config import SAMPLE_RATE
from ..data.audio import DIRECT_SUFFIXES
from ..data.lhotse_kaldi import read_import
from ..data.sources import list_folder
from ..encoders.registry import encoder_of, written_config
from ..errors import UserError
from ..models.hubert import HubertModel
from ..profiling.training_cost import MFU, MFU_SOURCE, PAPER_GPUS, PAPER_UPDATES, Needs, training_needs
from ..quant.distill import check_teacher, start_from
from ..quant.policy import SPECS
from ..reports.training_log import LOG, read_log
from ..utils.configurations import find_configuration, load_config
from ..utils.files import check_writable
from .base import Recipe, Step, check_keys, path_overrides, say, training
from .binarize import distillation, keep_policy, policy_of, stage_keys

AVERAGED = 5  # checkpoints
CLUSTERS = (100, 500)  # of the two phases
LABEL_RATES = (100, 50)  # Hz, of the two phases: MFCC, the model's frames
PROBED = 100  # number of recordings whose headers a dry run reads
SET_HERE = {
    "common.user_dir", "task.data", "task.label_dir", "task.label_rate", "checkpoint.save_dir", "checkpoint.keep_interval_updates",
    "checkpoint.no_save", "checkpoint.no_last_checkpoints", "optimization.max_update", "distributed_training.distributed_world_size",
}  # fmt: skip
# keys that a model which is gone on from decides: they change what its weights compute
TAKEN = (
    "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "layer_norm_first", "extractor_mode",
    "conv_feature_layers", "conv_bias", "feature_norm", "conv_pos", "conv_pos_groups", "valid_frames",
)  # fmt: skip
SET_BY_QUANT = {"criterion.teacher", "task.init_from", "model.quant", "model.quant_policy", "quant", "objective"}


@dataclass
class Pretraining(Recipe):
    """What to train on what. `updates`: of the two phases (default: the configuration's, and 2.4 times as many, as in the paper);
    `clusters`: of their labels; `layer`: of phase 1's model (default: the middle one); `superb`: folder of SUPERB's data, with small heads
    and few steps where the configuration is one for a CPU; `warm`: phase 2 starts from the weights of phase 1, with new codebooks.
    `start`: a checkpoint, or a folder of Hugging Face, in place of phase 1: its layer gives the labels, phase 2 starts from its weights,
    with its sizes in place of the configuration's, and `updates` and `clusters` are one number each.
    `quant`: the stages that follow, each taught by the model before: ("w1a1",), or ("w1a2", "w1a1"); `quant_updates`: of each (default: as
    many as phase 2), `policy`: what is binarized (default: what the configuration says).

    Between two runs in one folder the number of GPUs and SUPERB's data may change, and `quant` may be added.
    """

    LATER = ("quant", "quant_updates", "policy")
    SETTINGS = (
        "speech", "config", "updates", "clusters", "layer", "folder_level", "valid_percent", "fit_hours", "overrides", "warm", "start",
        *LATER,
    )  # fmt: skip

    speech: Path
    out: Path
    config: str
    gpus: int = 1
    updates: tuple[int, ...] = ()
    clusters: tuple[int, ...] = ()
    layer: int | None = None
    folder_level: int = 1
    valid_percent: float = 1.0
    fit_hours: float = 10.0
    superb: Path | None = None
    overrides: list[str] = field(default_factory=list)
    warm: bool | None = None  # not False: folders of earlier versions have none
    quant: tuple[str, ...] | None = None
    quant_updates: tuple[int, ...] | None = None
    policy: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        find_configuration(f"pretrain/{self.config}")
        if not self.speech.exists():
            raise UserError(f"{self.speech} is not there: name the folder of recordings, such as LibriSpeech as unpacked")
        check_keys(self.overrides, SET_HERE | (SET_BY_QUANT if self.quant else set()), "dataset.max_tokens=1400000")
        if self.warm and any(override.startswith("task.init_from=") for override in self.overrides):
            raise UserError("--warm starts phase 2 from phase 1, --set task.init_from from something else: leave out one of the two")
        self.written = load_config(f"pretrain/{self.config}", self.overrides)
        self.adapted = self._adapted()
        if self.adapted:
            self.written = load_config(f"pretrain/{self.config}", [*self.adapted, *self.overrides])
        with torch.device("meta"):
            depth = len(HubertModel(written_config(self.written)).encoder.layers)
        self.layer = depth // 2 if self.layer is None else self.layer
        if not 0 <= self.layer <= depth:
            raise UserError(f"--layer {self.layer} is not there: the encoder of {self.config} has blocks 1 to {depth}")
        first = int(self.written["optimization"]["max_update"])
        both = (first, round(first * PAPER_UPDATES[1] / PAPER_UPDATES[0]))
        self.updates = self._of_phases("updates", self.updates, (first,) if self.start else both)
        self.clusters = self._of_phases("clusters", self.clusters, CLUSTERS[1:] if self.start else CLUSTERS)
        every = int(self.written["checkpoint"]["save_interval_updates"])
        if every < 1 or self.updates[-1] // every < AVERAGED + 2:  # those at the end of an epoch are not kept under a number
            most = self.updates[-1] // (AVERAGED + 2)
            remedy = f"--set checkpoint.save_interval_updates={most}" if most else f"at least {AVERAGED + 2} --updates"
            raise UserError(
                f"phase 2 of {self.updates[-1]} updates saves every {every}, and the last {AVERAGED} of these are averaged: add {remedy}"
            )
        self.speech, self.out = self.speech.resolve(), self.out.resolve()
        self.superb = self.superb.resolve() if self.superb else None
        self.distilled = self._distilled()

    def _distilled(self) -> dict[str, Any]:
        """The configuration of the stages at one bit, as far as it is known before; empty without any."""
        if not self.quant:
            if self.quant_updates or self.policy:
                raise UserError("--quant-updates and --policy are for the stages of --quant: add --quant w1a1")
            self.quant = self.quant_updates = self.policy = None
            return {}
        bits = [SPECS.get(stage, 0) for stage in self.quant]
        if self.quant[-1] != "w1a1" or 0 in bits or bits != sorted(set(bits), reverse=True):
            raise UserError(f"--quant {' '.join(self.quant)}: the stages go down to w1a1, such as w1a1, or w1a2 w1a1")
        self.quant_updates = self.quant_updates or (self.updates[-1],) * len(self.quant)
        if len(self.quant_updates) != len(self.quant):
            raise UserError(f"--quant-updates {' '.join(map(str, self.quant_updates))}: give one number for each of {' '.join(self.quant)}")
        name = distillation(self.config)
        self.policy = policy_of(name, self.policy or "")
        return load_config(name, [*self.adapted, *self.overrides])

    @property
    def rates(self) -> tuple[int, ...]:
        """Labels per second in each of these phases."""
        return tuple(LABEL_RATES[phase - 1] for phase in self.phases)

    @property
    def phases(self) -> tuple[int, ...]:
        """The numbers of the trained phases."""
        return (2,) if self.start else (1, 2)

    def _of_phases(self, option: str, given: tuple[int, ...], usual: tuple[int, ...]) -> tuple[int, ...]:
        """One number for each trained phase."""
        if given and len(given) != len(self.phases):
            wanted = "one number, since there is only one phase with --from" if self.start else "two numbers, one for each phase"
            raise UserError(f"--{option} {' '.join(map(str, given))}: give {wanted}")
        return given or usual

    def _adapted(self) -> list[str]:
        """Overrides by which the configuration is that of the model which is gone on from, where the two differ."""
        if self.start is None:
            return []
        if self.warm or any(override.startswith(("task.init_from=", "task.new_codebooks=")) for override in self.overrides):
            raise UserError("--from decides the start of training: leave out --warm, and task.init_from and task.new_codebooks in --set")
        if not os.path.exists(self.start):
            raise UserError(f"--from {self.start} is not there: give a checkpoint, or a folder of Hugging Face")
        self.start = os.path.realpath(self.start)
        self.source = open_model(self.start)
        ours, theirs = written_config(self.written), self.source.config
        if encoder_of(ours).name != encoder_of(theirs).name:
            raise UserError(
                f"--from {self.start} is a model with the encoder {encoder_of(theirs).name}, {self.config} one with "
                f"{encoder_of(ours).name}: choose another --config"
            )
        found = {f"model.{key}": getattr(theirs, key) for key in TAKEN if getattr(theirs, key) != getattr(ours, key)}
        if theirs.normalize != ours.normalize:
            found["task.normalize"] = theirs.normalize
        return path_overrides({key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in found.items()})

    @property
    def on_cpu(self) -> bool:
        """Whether the configuration is meant for a CPU; its batch is then that of one process."""
        return bool(self.written["common"].get("cpu"))

    # -- the commands ------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """The steps in order."""
        out, data = self.out, self.out / "data"
        first, second = out / "labels-mfcc", out / "labels-layer"
        fit = ("--fit-hours", f"{self.fit_hours:g}")
        split = ("--folder-level", self.folder_level, "--valid-percent", f"{self.valid_percent:g}")
        layer = ("--checkpoint", self.start or out / "phase1" / "checkpoint_last.pt", "--layer", self.layer)
        whose = "the given" if self.start else "phase 1's"
        phase_1 = [
            Step(
                "Labels of phase 1: k-means on MFCC",
                ("hubert-eff", "labels", data, "--out", first, "--features", "mfcc", "--clusters", self.clusters[0], *fit),
            ),
            Step("Phase 1", self._training(1, first)),
        ]
        found = [
            Step("Check the audio, split it", ("hubert-eff", "manifest", self.speech, "--out", data, *split)),
            *([] if self.start else phase_1),
            Step(
                f"Labels of phase 2: k-means on a layer of {whose} model",
                ("hubert-eff", "labels", data, "--out", second, *layer, "--clusters", self.clusters[-1], *fit),
            ),
            Step("Phase 2", self._training(2, second)),
            Step(
                "The mean of the last checkpoints, as one file",
                ("hubert-eff", "export", out / "phase2", "--average", AVERAGED, "--out", out / "model.safetensors"),
            ),
        ]
        models = {"superb": out / "model.safetensors"}
        if self.quant:
            found += self._stages(second)
            models[f"superb-{self.quant[-1]}"] = self.one_bit
        if self.superb:
            for folder, model in models.items():
                upstream = ("--upstream", model, "--data", self.superb, "--out", out / folder, *(("--small",) if self.on_cpu else ()))
                title = "SUPERB's ten tasks" + (", one bit" if model == self.one_bit else "")
                found.append(Step(title, ("hubert-eff", "superb", "run", "--task", "all", *upstream)))
            results = [out / folder for folder in models]
            found.append(Step("Their table", ("hubert-eff", "superb", "report", *results, "--out", out / "superb-report")))
        return found

    @property
    def one_bit(self) -> Path:
        """The file of the one-bit model."""
        return self.out / "model-w1a1.safetensors"

    def _training(self, phase: int, labels: Path) -> tuple[object, ...]:
        keys = [f"checkpoint.keep_interval_updates={AVERAGED}"] if phase == 2 else []
        source = self.start or (self.out / "phase1" / "checkpoint_last.pt" if self.warm else None)
        if phase == 2 and source:
            keys += [*path_overrides({"task.init_from": source}), "task.new_codebooks=true"]
        updates = self.updates[self.phases.index(phase)] if phase in self.phases else 0
        return self._words(f"pretrain/{self.config}", self.written, f"phase{phase}", labels, phase, updates, keys)

    def _stages(self, labels: Path) -> list[Step]:
        """The training of each stage at one bit, from the model before, which teaches it, and the export of the last."""
        found: list[Step] = []
        teacher = self.out / "phase2" / "checkpoint_last.pt"
        for stage, updates in zip(self.quant or (), self.quant_updates or (), strict=True):
            keys = stage_keys(stage, teacher, str(self.policy), self.out)
            words = self._words(distillation(self.config), self.distilled, stage, labels, 2, updates, keys)
            teacher = self.out / stage / "checkpoint_best.pt"
            found.append(Step(f"Distillation to {stage}", words, teacher))
        export = ("hubert-eff", "export", teacher, "--out", self.one_bit)
        return [*found, Step("The model at one bit, as one file", export, self.one_bit)]

    def _words(
        self, name: str, written: Mapping[str, Any], folder: str, labels: Path, phase: int, updates: int, more: Sequence[str]
    ) -> tuple[object, ...]:
        """The command of a training run of the configuration KIND/NAME, which is `written`, into a folder, on the labels of a phase."""
        keys = [
            f"task.label_rate={LABEL_RATES[phase - 1]}", *path_overrides({"checkpoint.save_dir": self.out / folder}),
            f"optimization.max_update={updates}", *warm_up(written, updates),
        ]  # fmt: skip
        if not self.on_cpu:
            keys.append(f"distributed_training.distributed_world_size={self.gpus}")
        if self._accumulated() != self.written["optimization"]["update_freq"][0]:
            keys.append(f"optimization.update_freq=[{self._accumulated()}]")
        kind, _, config = name.partition("/")
        return training(
            kind, config, {"task.data": self.out / "data", "task.label_dir": labels}, *keys, *more, *self.adapted, *self.overrides
        )

    def _accumulated(self) -> int:
        if self.on_cpu or any(override.startswith("optimization.update_freq=") for override in self.overrides):
            return int(self.written["optimization"]["update_freq"][0])
        return max(1, round(PAPER_GPUS / self.gpus))

    def results(self) -> dict[str, Any]:
        """The best validation of both phases and of the stages at one bit, and the files of the models."""
        phases = {f"phase {n}": read_log(self.out / f"phase{n}" / LOG).best for n in self.phases}
        found = {"phases": phases, "model": str(self.out / "model.safetensors")}
        if self.quant:
            stages = {stage: read_log(self.out / stage / LOG).best for stage in self.quant}
            found |= {"quantization": stages, "one_bit_model": str(self.one_bit)}
        return found

    # -- before anything runs ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `UserError` for what would only fail in a later step. Changes nothing."""
        super().check()
        if self.start:
            try:
                start_from(HubertModel(written_config(self.written), self.clusters), self.source, new_codebooks=True)
            except UserError as error:
                raise UserError(f"--from {self.start}: {error}") from error
        if self.quant:
            self._check_student()
        if self.superb:
            if not self.superb.is_dir():
                raise UserError(f"--superb {self.superb} is not a folder: give the one that holds SUPERB's data sets")
            if importlib.util.find_spec("s3prl") is None:
                raise UserError("--superb needs the package 's3prl': pip install 'hubert-eff[superb]'")

    def _check_student(self) -> None:
        """Build phase 2's model and its last student: the policy may name modules that are not there, other keys set them apart."""
        assert self.quant is not None
        own = {"quant": self.quant[-1], "quant_policy": self.policy}
        student = {**self.distilled, "model": {**self.distilled["model"], **own}}
        classes = self.clusters[-1:]
        with torch.device("meta"):
            check_teacher(HubertModel(written_config(self.written), classes), HubertModel(written_config(student), classes))

    def prepare(self) -> None:
        """Raise `UserError` where GPUs are missing; keep what a policy file said."""
        if not self.on_cpu and torch.cuda.device_count() < self.gpus:
            raise UserError(
                f"--gpus {self.gpus}: this machine has {torch.cuda.device_count()} GPUs that torch can use; `debug` and its siblings train "
                "on a CPU, and --dry-run needs none"
            )
        if self.policy:
            keep_policy(self.policy, self.out)

    def dry_run(self, device: str, mfu: float | None = None) -> dict[str, Any]:
        """Check everything, and say what the steps are and what they need: hours of speech, GPU-hours, memory, disk, 10^9 bytes.

        `device`, `mfu`: see `training_needs`; by default the share at which the paper's own GPU-hours come out. Raises `UserError` as
        `check`, for a folder without recordings, and for too small a disk.
        """
        steps, source = self.plan(), MFU_SOURCE if mfu is None else "--mfu"
        mfu = MFU if mfu is None else mfu
        speech = look_at(self.speech)
        phases = [
            self._needs(self.written, clusters, updates, rate, device, mfu)
            for clusters, updates, rate in zip(self.clusters, self.updates, self.rates, strict=True)
        ]
        stages = []
        for stage, updates in zip(self.quant or (), self.quant_updates or (), strict=True):
            model = {**self.distilled["model"], "quant": stage, "quant_policy": self.policy}
            stages.append(self._needs({**self.distilled, "model": model}, self.clusters[-1], updates, LABEL_RATES[1], device, mfu, True))
        usual = 2 + int(self.written["checkpoint"]["keep_interval_updates"])  # last, best
        kept = [*(usual for _ in phases[1:]), 2 + AVERAGED, *(usual for _ in stages)]
        width = int(self.written["model"]["encoder_embed_dim"])
        fitted = min(self.fit_hours, speech["hours"]) * 3600
        disk = {
            "converted audio": speech["convert_hours"] * 3600 * SAMPLE_RATE * 2 * 0.6e-9,  # FLAC takes about 0.6 of 16-bit samples
            "labels": sum(
                speech["hours"] * 3600 * rate * (len(str(k - 1)) + 1) * 1e-9 for k, rate in zip(self.clusters, self.rates, strict=True)
            ),
            "features while k-means runs": fitted * max(100 * 39, 50 * width) * 4e-9,
            "checkpoints": sum(n * needs.checkpoint_gb for n, needs in zip(kept, [*phases, *stages], strict=True)),
        }
        free = shutil.disk_usage(check_writable(self.out)).free / 1e9
        total = sum(disk.values())
        if total > free:
            raise UserError(f"{self.out} has {free:.1f} GB free, and about {total:.1f} GB are needed: {', '.join(_sizes(disk))}")
        needs = {"phases": list(map(vars, phases)), "quantization": dict(zip(self.quant or (), map(vars, stages), strict=True))}
        return {
            "config": self.config, "speech": speech, "device": device, "mfu": mfu, "mfu_source": source, "gpus": self.gpus,
            **needs, "disk_gb": disk, "disk_free_gb": free, "steps": steps,
        }  # fmt: skip

    def _needs(
        self, written: Mapping[str, Any], clusters: int, updates: int, rate: int, device: str, mfu: float, teacher: bool = False
    ) -> Needs:
        """Of a training run of a configuration with what the recipe changes."""
        sections: dict[str, dict[str, Any]] = {
            "optimization": {"max_update": updates, "update_freq": [self._accumulated()]}, "task": {"label_rate": rate}
        }  # fmt: skip
        whole = {name: {**values, **sections.get(name, {})} for name, values in written.items() if isinstance(values, Mapping)}
        return training_needs(whole, clusters, 1 if self.on_cpu else self.gpus, device, mfu, teacher)


def warm_up(written: Mapping[str, Any], updates: int) -> list[str]:
    """Overrides by which a run of so many updates, in place of the configuration's, warms up for the same share of them."""
    before = int(written["optimization"]["max_update"])
    sections = {"": written}
    if written["optimizer"]["_name"] == "composite":
        sections = {f"optimizer.groups.{name}.": group for name, group in written["optimizer"]["groups"].items()}
    schedules = {prefix: section["lr_scheduler"] for prefix, section in sections.items()}
    return [
        f"{prefix}lr_scheduler.warmup_updates={round(schedule['warmup_updates'] * updates / before)}"
        for prefix, schedule in schedules.items()
        if updates != before and "warmup_updates" in schedule
    ]


def _sizes(disk: Mapping[str, float]) -> list[str]:
    return [f"{what} {size:.2f}" for what, size in disk.items()]


def look_at(speech: Path) -> dict[str, Any]:
    """How many recordings, and how many hours about, of which how many are to be converted: by the headers of some, evenly spread."""
    import soundfile

    listing = read_import(speech) or list_folder(speech, set(), 1)
    seconds, converted = 0.0, 0.0
    probed = listing.items[:: max(1, len(listing.items) // PROBED)]
    for item in probed:
        file = listing.root / item.path
        try:
            if not file.is_file():  # opening a pipe would block until something writes to it
                continue
            info = soundfile.info(os.fsencode(file))
        except (soundfile.SoundFileError, OSError, ValueError):
            continue  # `manifest` reports it
        length = (info.duration if item.end is None else item.end) - item.start
        seconds += length
        whole = item.end is None and item.start == 0.0
        if not whole or (info.samplerate, info.channels) != (SAMPLE_RATE, 1) or file.suffix not in DIRECT_SUFFIXES:
            converted += length
    scale = len(listing.items) / max(1, len(probed)) / 3600
    say(f"{speech}: {len(listing.items)} recordings, about {seconds * scale:.1f} h, by the headers of {len(probed)}")
    return {"recordings": len(listing.items), "hours": seconds * scale, "convert_hours": converted * scale}
