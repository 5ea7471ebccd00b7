"""Training at one bit in stages (Liu et al. 2022, "BiT", multi-distillation): W32A32 -> W1A2 -> W1A1.

Each stage is one `fairseq-hydra-train` run that starts from the stage before, which is also its teacher. A stage that has ended is not run
again, and one that was stopped goes on from its last save.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints.load import load
from ..config import HubertConfig
from ..encoders.registry import written_config
from ..errors import StepFailed, UserError, unknown
from ..models.hubert import HubertModel
from ..quant.distill import check_teacher, start_from
from ..quant.policy import POLICIES, read_policy
from ..utils.configurations import list_configurations, load_config
from ..utils.files import config_dir, write_json, write_text
from ..utils.locks import locked
from .base import best_validation, path_overrides, plugin_dir, run_command, say

STAGES = ("float", "w1a2", "w1a1")
SET_HERE = (  # keys of the configurations that the recipe itself decides
    "common.user_dir", "common.log_file", "common.log_format", "task.data", "task.label_dir", "task.init_from", "criterion.teacher",
    "checkpoint.save_dir", "optimization.max_update", "model.quant", "model.quant_policy",
)  # fmt: skip


@dataclass
class Recipe:
    """What to train on what; all paths absolute. `updates`: of each stage, none = as the configurations say."""

    data: str
    labels: str
    out: str
    config: str = "debug"
    teacher: str | None = None
    updates: list[int] = field(default_factory=list)
    policy: str = "default"
    overrides: list[str] = field(default_factory=list)

    @cached_property
    def source(self) -> HubertModel | None:
        """The teacher that takes the place of the first stage."""
        return None if self.teacher is None else load(self.teacher)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are to be run: a teacher takes the place of the stage that it could have come from, and of those before."""
        if self.source is None:
            return STAGES
        quant = self.source.config.quant
        if quant == "w1a1":
            raise UserError(f"--teacher {self.teacher} is at one bit already: give a float or a w1a2 checkpoint")
        return STAGES[2:] if quant == "w1a2" else STAGES[1:]

    def config_of(self, stage: str) -> tuple[Path, str]:
        """Folder and name of a stage's configuration."""
        return (config_dir() / "pretrain", self.config) if stage == "float" else (config_dir() / "quantize", f"{self.config}_distill")

    def check(self) -> None:
        """Raise `UserError` for what would only fail in a later stage, or after the data was read."""
        known = [name.removesuffix("_distill") for name in list_configurations("quantize") if name.endswith("_distill")]
        if self.config not in known:
            raise unknown("configuration", self.config, known)
        for name in ("train.tsv", "valid.tsv"):
            if not (Path(self.data) / name).is_file():
                raise UserError(f"{self.data} holds no {name}: give the folder that `hubert-eff manifest` wrote")
        if not list(Path(self.labels).glob("dict.*.txt")):
            raise UserError(f"{self.labels} holds no labels: give the folder that `hubert-eff labels` wrote")
        if any(n < 1 for n in self.updates) or len(self.updates) not in (0, len(self.stages)):
            raise UserError(
                f"--updates {' '.join(map(str, self.updates))}: give one positive number for each of the stages {', '.join(self.stages)}"
            )
        for override in self.overrides:
            key, equals, _ = override.partition("=")
            if not equals:
                raise UserError(f"--set {override}: expected KEY=VALUE, such as optimization.lr=[0.001]")
            if key.lstrip("+~") in SET_HERE:
                raise UserError(f"--set {override}: the recipe decides {key} itself")
        for stage in self.stages:
            self.command(stage)  # raises for a path that training cannot be given
        # builds the model: the policy may name modules that are not there
        student = HubertModel(self.student_config(), () if self.source is None else self.source.num_classes)
        if self.source is not None:
            try:
                check_teacher(self.source, student)
                start_from(student, self.source)
            except UserError as error:
                raise UserError(f"--teacher {self.teacher}: {error}") from error

    def student_config(self) -> HubertConfig:
        """The model of the last stage."""
        written = load_config(f"quantize/{self.config_of(STAGES[-1])[1]}", self.overrides)
        written["model"].update(quant=STAGES[-1], quant_policy=self.policy)
        return written_config(written)

    def command(self, stage: str) -> list[str]:
        """The words of a stage."""
        folder, name = self.config_of(stage)
        target = Path(self.out) / stage
        paths: dict[str, str | Path] = {
            "common.user_dir": plugin_dir(), "task.data": self.data, "task.label_dir": self.labels, "checkpoint.save_dir": target,
            "common.log_file": target / "train.log",
        }  # fmt: skip
        words = [
            "fairseq-hydra-train", "--config-dir", str(folder), "--config-name", name, *path_overrides(paths), "common.log_format=simple"
        ]  # fmt: skip
        if stage != "float":
            policy = self.policy if self.policy in POLICIES else Path(self.out) / "policy.yaml"
            words += path_overrides({"criterion.teacher": self.teacher_of(stage)})
            words += [f"model.quant={stage}", *path_overrides({"model.quant_policy": policy})]
        if self.updates:
            words.append(f"optimization.max_update={self.updates[self.stages.index(stage)]}")
        return [*words, *self.overrides]

    def teacher_of(self, stage: str) -> Path:
        """The checkpoint that a stage starts from and learns from."""
        index = self.stages.index(stage)
        if index == 0:
            assert self.teacher is not None
            return Path(self.teacher)
        return self.checkpoint(self.stages[index - 1])

    def checkpoint(self, stage: str) -> Path:
        """What a stage leaves behind: its checkpoint with the lowest validation loss."""
        return Path(self.out) / stage / "checkpoint_best.pt"

    def run(self) -> dict[str, Any]:
        """Run the stages that have not ended; the figures of all.

        Raises `UserError` for bad input, and if `out` holds a recipe with other settings or is in use, and `StepFailed`.
        """
        self.policy = read_policy(self.policy).text
        self.check()
        with locked(self.out):
            return self._run(Path(self.out) / "recipe.json")

    def _run(self, record: Path) -> dict[str, Any]:
        settings, done = asdict(self), {}
        if record.is_file():
            before = json.loads(record.read_text(encoding="utf-8"))
            for key, value in settings.items():
                if before["settings"].get(key) != value:
                    raise UserError(f"{record} is of a recipe with {key}={before['settings'].get(key)}, not {value}: take another --out")
            done = before["done"]
        if self.policy not in POLICIES:
            write_text(Path(self.out) / "policy.yaml", self.policy + "\n")  # JSON, which is YAML
        for stage in self.stages:
            words = self.command(stage)
            ended = stage in done and self.checkpoint(stage).is_file()
            say(f"\n== {stage}{' (done before)' if ended else ''}\n$ {shlex.join(words)}")
            if ended:
                continue
            write_json(record, {"settings": settings, "done": done})
            (Path(self.out) / stage).mkdir(parents=True, exist_ok=True)
            code = run_command(words)
            if code:
                raise StepFailed(stage, code)
            done[stage] = {**best_validation(Path(self.out) / stage / "train.log"), "checkpoint": str(self.checkpoint(stage))}
            write_json(record, {"settings": settings, "done": done})
        return done
