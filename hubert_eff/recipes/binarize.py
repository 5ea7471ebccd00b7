"""Trains at one bit in stages (Liu et al. 2022, "BiT", multi-distillation): W32A32 -> W1A2 -> W1A1.

Each stage is one `fairseq-hydra-train` run that starts from the stage before, which is also its teacher unless the float model is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints.load import load
from ..config import HubertConfig
from ..encoders.registry import written_config
from ..errors import UserError, unknown
from ..models.hubert import HubertModel
from ..quant.distill import check_teacher, start_from
from ..quant.policy import POLICIES, read_policy
from ..utils.configurations import list_configurations, load_config
from ..utils.files import write_text
from .base import Recipe, Step, best_validation, check_keys, path_overrides, training
from .schedule import shared_schedule

STAGES = ("float", "w1a2", "w1a1")
POLICY = "policy.yaml"  # file in the recipe's folder with the content of a policy file
SET_HERE = (  # keys of the configurations that the recipe itself decides
    "common.user_dir", "common.log_file", "common.log_format", "task.data", "task.label_dir", "task.init_from", "criterion.teacher",
    "checkpoint.save_dir", "optimization.max_update", "model.quant", "model.quant_policy",
)  # fmt: skip


def distillation(config: str) -> str:
    """KIND/NAME of the configuration that distills the model of pretrain/`config`. Raises `UserError` if there is none."""
    known = [name.removesuffix("_distill") for name in list_configurations("quantize") if name.endswith("_distill")]
    if config not in known:
        raise unknown("distillation (configs/quantize/NAME_distill.yaml)", config, known)
    return f"quantize/{config}_distill"


def policy_of(distilled: str, policy: str) -> str:
    """The text of a policy: of a name or a YAML file, or if empty of the configuration KIND/NAME."""
    return read_policy(policy or load_config(distilled)["model"]["quant_policy"]).text


def stage_keys(stage: str, teacher: Path, policy: str, out: Path) -> list[str]:
    """Overrides of a stage of a recipe in `out`: its bits, its teacher, and the policy's text as `policy_of` gives it."""
    kept = policy if policy in POLICIES else out / POLICY
    return [*path_overrides({"criterion.teacher": teacher}), f"model.quant={stage}", *path_overrides({"model.quant_policy": kept})]


def keep_policy(policy: str, out: Path) -> None:
    """Write the file that `stage_keys` names, if it does."""
    if policy not in POLICIES:
        write_text(out / POLICY, policy + "\n")  # JSON, which is YAML


@dataclass
class Binarization(Recipe):
    """What to train on what: folders of `hubert-eff manifest` and `hubert-eff labels`. `teacher`: a checkpoint in place of the first stage,
    or of the first two; `updates`: of each stage (default: the configurations'); `policy`: what is binarized (default: what the
    configuration says); `taught_by_float`: the float model teaches all stages; `one_schedule`: the learning rates of all stages follow one
    schedule, else each has its own."""

    SETTINGS = ("data", "labels", "config", "teacher", "updates", "policy", "overrides", "taught_by_float", "one_schedule")

    data: Path
    labels: Path
    out: Path
    config: str = "debug"
    teacher: Path | None = None
    updates: list[int] = field(default_factory=list)
    policy: str = ""
    overrides: list[str] = field(default_factory=list)
    taught_by_float: bool | None = None
    one_schedule: bool | None = None

    def __post_init__(self) -> None:
        self.data, self.labels, self.out = self.data.resolve(), self.labels.resolve(), self.out.resolve()
        self.teacher = self.teacher.resolve() if self.teacher else None
        self.policy = policy_of(distillation(self.config), self.policy)

    @cached_property
    def source(self) -> HubertModel | None:
        """The teacher that replaces the first stage."""
        return None if self.teacher is None else load(self.teacher)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to run: a teacher replaces the stage that it could have come from, and those before it."""
        if self.source is None:
            return STAGES
        quant = self.source.config.quant
        if quant == "w1a1":
            raise UserError(f"--teacher {self.teacher} is at one bit already: give a float or a w1a2 checkpoint")
        return STAGES[2:] if quant == "w1a2" else STAGES[1:]

    def steps(self) -> list[Step]:
        """One step for each stage, titled by its name; each starts from the checkpoint of the stage before."""
        found: list[Step] = []
        for number, stage in enumerate(self.stages):
            start = found[-1].result if found else self.teacher
            teacher = (self.teacher or found[0].result) if found and self.taught_by_float else start
            found.append(self.step(number, stage, start, teacher))
        return found

    def step(self, number: int, stage: str, start: Path | None, teacher: Path | None) -> Step:
        """The training of a stage, which starts from the checkpoint `start` unless it is the float stage."""
        target = self.out / stage
        paths: dict[str, str | Path] = {
            "task.data": self.data, "task.label_dir": self.labels, "checkpoint.save_dir": target, "common.log_file": target / "train.log"
        }  # fmt: skip
        keys = ["common.log_format=simple"]
        if teacher is not None:
            keys += stage_keys(stage, teacher, self.policy, self.out)
        if start is not None and start != teacher:
            keys += path_overrides({"task.init_from": start})
        if self.updates:
            keys.append(f"optimization.max_update={self.updates[number]}")
        keys += self.overrides
        if self.one_schedule:
            updates = self.updates or [int(self.written(stage)["optimization"]["max_update"]) for stage in self.stages]
            keys += shared_schedule(self.written(stage), sum(updates[:number]), sum(updates))
        kind, _, name = self.config_of(stage).partition("/")
        return Step(stage, training(kind, name, paths, *keys), target / "checkpoint_best.pt")

    def config_of(self, stage: str) -> str:
        """KIND/NAME of a stage's configuration."""
        return f"pretrain/{self.config}" if stage == "float" else distillation(self.config)

    def written(self, stage: str) -> dict[str, Any]:
        """The configuration of a stage."""
        return load_config(self.config_of(stage), self.overrides)

    def check(self) -> None:
        """Raise `UserError` for faults that would otherwise appear in a later stage or after the data was read. Changes nothing."""
        for name in ("train.tsv", "valid.tsv"):
            if not (self.data / name).is_file():
                raise UserError(f"{self.data} holds no {name}: give the folder that `hubert-eff manifest` wrote")
        if not list(self.labels.glob("dict.*.txt")):
            raise UserError(f"{self.labels} holds no labels: give the folder that `hubert-eff labels` wrote")
        if any(n < 1 for n in self.updates) or len(self.updates) not in (0, len(self.stages)):
            raise UserError(
                f"--updates {' '.join(map(str, self.updates))}: give one positive number for each of the stages {', '.join(self.stages)}"
            )
        if self.taught_by_float and self.source is not None and self.source.config.quant != "none":
            raise UserError(f"--taught-by-float: --teacher {self.teacher} is {self.source.config.quant}, not float")
        check_keys(self.overrides, SET_HERE, "optimization.lr=[0.001]")
        super().check()
        # building the model finds names of missing modules in the policy
        student = HubertModel(self.student_config(), () if self.source is None else self.source.num_classes)
        if self.source is not None:
            try:
                check_teacher(self.source, student)
                start_from(student, self.source)
            except UserError as error:
                raise UserError(f"--teacher {self.teacher}: {error}") from error

    def student_config(self) -> HubertConfig:
        """The configuration of the last stage's model."""
        written = self.written(STAGES[-1])
        written["model"].update(quant=STAGES[-1], quant_policy=self.policy)
        return written_config(written)

    def prepare(self) -> None:
        """Keep the content of a policy file."""
        keep_policy(self.policy, self.out)

    def results(self) -> dict[str, Any]:
        """The best validation of each stage and its checkpoint."""
        return {
            step.title: {**best_validation(self.out / step.title / "train.log"), "checkpoint": str(step.result)} for step in self.steps()
        }
