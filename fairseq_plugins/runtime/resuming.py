"""Makes a run resume only with the settings and data with which it began.

Each function is one patch and says why; `apply` makes them all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.optim.composite import FairseqCompositeOptimizer
from fairseq.trainer import Trainer
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hubert_eff.checkpoints.load import DICTIONARY
from hubert_eff.checkpoints.torchfile import TorchFile, Unreadable
from hubert_eff.errors import UserError

from . import saving, stopping

logger = logging.getLogger(__name__)

# settings that define a training: these sections except `MAY_CHANGE`, and these keys; all others may change
SECTIONS = ("task", "model", "criterion", "optimizer", "lr_scheduler", "ema")
KEYS = (
    "common.seed", "dataset.train_subset", "optimization.lr", "optimization.clip_norm", "optimization.sentence_avg",
    "optimization.use_bmuf",
)  # fmt: skip
MAY_CHANGE = {
    "task": {
        "data", "label_dir", "init_from", "new_codebooks",  # `SafeTask.files` tells whether these have changed
        "bad_audio", "bad_updates", "trends_interval", "trends_input", "log_interval", "resume_changed", "dictionary_split",
    },
    "model": {"w2v_path", "preset", "checkpoint_activations", "compile_blocks"},
    "criterion": {"teacher", "log_keys"},
}  # fmt: skip
# whose settings are interpolated in sections that stand behind, some under another name
OWNERS = ("common", "dataset", "optimization", "checkpoint", "distributed_training", "task", "model")
RENAMED = {"total_num_update": "max_update", "max_tokens_valid": "max_tokens", "batch_size_valid": "batch_size"}
UNSAID = (  # keys of a process or machine
    "job_logging_cfg", "task.resume_changed", "distributed_training.distributed_init_method", "distributed_training.distributed_port",
    "distributed_training.distributed_rank", "distributed_training.device_id",
)  # fmt: skip
SHOWN = 5  # differences in an error
LENGTH = 60  # characters of a value


def apply() -> None:
    """Make all patches."""
    hold_to_settings()
    if stopping.in_training_run():
        give_jobs_folders()
        leave_finished_runs()


def without_folders(value: Any) -> Any:
    """A configuration in the form of checkpoints: only the last part of absolute paths."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return os.path.basename(value.rstrip(os.sep)) if isinstance(value, str) and os.path.isabs(value) else value


# -- settings ------------------------------------------------------------------------------------------------------------


def hold_to_settings() -> None:
    """Hold a run to its settings; fairseq resumes with any settings and data, and may call a run finished that was another one.

    Each setting that differs is logged. Those that make another training are refused in one line, unless `task.resume_changed` is set.
    """
    original = Trainer.load_checkpoint

    @stopping.one_line_errors()
    def load_checkpoint(self: Trainer, filename: str, reset_optimizer: bool = False, *rest: Any, **options: Any) -> Any:
        changed: list[str] = []
        if hasattr(self.task, "note_files"):
            self.task.note_files(self.cfg.dataset.train_subset)
            if os.path.isfile(filename) and not reset_optimizer:
                changed = _compare(self, filename)
        try:
            state = original(self, filename, reset_optimizer, *rest, **options)
        except Exception as error:
            if not str(error).startswith(("Cannot load model parameters", "Criterion does not match", "Optimizer does not match")):
                raise
            raise UserError(
                f"{filename} does not fit the model, criterion, optimizer or precision that are set: give another checkpoint.save_dir, or "
                "the settings that it was made with"
            ) from error
        if any(key.partition(".")[0] == "optimizer" for key in changed):
            _use_settings(self.optimizer)
        return state

    Trainer.load_checkpoint = load_checkpoint


def _compare(trainer: Trainer, filename: str) -> list[str]:
    """Log how a checkpoint's settings and data differ from the current ones. Returns the keys that make another training.

    Raises `UserError` if there are any and `task.resume_changed` is not set.
    """
    try:
        with TorchFile(Path(filename), {DICTIONARY: Dictionary}) as opened:  # tensors are not read
            state = opened.content
    except Unreadable:  # the loader reports it
        return []
    before = state.get("cfg") if isinstance(state, dict) else None
    if not isinstance(before, Mapping):
        return []
    cfg = OmegaConf.to_container(trainer.cfg, resolve=True, enum_to_str=True) if OmegaConf.is_config(trainer.cfg) else trainer.cfg
    found = differences(without_folders(before), without_folders(cfg))
    files = (state.get("task_state") or {}).get("files") or {}
    other = [name for name, digest in trainer.task.state.files.items() if name in files and files[name] != digest]
    changed = [key for key in found if is_binding(key)]
    if trainer.data_parallel_rank == 0 and (found or other):
        said = [f"{key}={_shown(old)}, now {_shown(new)}" for key, (old, new) in found.items()]
        logger.info(f"{filename} was made with other settings: {'; '.join([*said, *(f'another {name}' for name in other)])}")
    if not changed and not other or trainer.cfg.task.resume_changed:
        return changed
    named = [f"{key}={_shown(found[key][0])}, now {_shown(found[key][1])}" for key in changed] + [f"another {name}" for name in other]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    raise UserError(
        f"{filename} belongs to another training, with {'; '.join(named[:SHOWN])}{more}: give another checkpoint.save_dir, or the former "
        "settings and data, or continue with these by task.resume_changed=true"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that both configurations have and that differ, with both values; each once, under the key that is set."""
    old, new = dict(_flat(before)), dict(_flat(now))
    found = {key: (old[key], new[key]) for key in new if key in old and old[key] != new[key] and not key.startswith(UNSAID)}

    def is_copy(key: str) -> bool:
        name = key.rpartition(".")[2]
        owners = [other for other in found if found[other] == found[key] and (name in RENAMED or _rank(other) < _rank(key))]
        return any(owner.rpartition(".")[2] == RENAMED.get(name, name) for owner in owners)

    return {key: values for key, values in found.items() if not is_copy(key)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key == "encoder_config" and isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _rank(key: str) -> int:
    section, _, name = key.partition(".")
    return OWNERS.index(section) if section in OWNERS and "." not in name else len(OWNERS)


def is_binding(key: str) -> bool:
    """Whether changing a setting makes another training."""
    section, _, rest = key.partition(".")
    return key in KEYS or (section in SECTIONS and rest.rpartition(".")[2] not in MAY_CHANGE.get(section, ()))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)  # no control character of a file reaches the terminal
    return text if len(text) <= LENGTH else f"{text[:LENGTH]}..."


def _use_settings(optimizer: Any) -> None:
    """Restore the current settings of a loaded optimizer's parameters, which its state has overwritten; the schedule sets the rate."""
    inner = getattr(optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer))
    for one in inner.optimizers.values() if isinstance(inner, FairseqCompositeOptimizer) else [inner]:
        settings = {key: value for key, value in one.optimizer_config.items() if key != "lr"}
        for group in one.param_groups:
            group.update({key: value for key, value in settings.items() if key in group})


# -- runs ----------------------------------------------------------------------------------------------------------------


def give_jobs_folders() -> None:
    """Give each job of a sweep (`-m`) its own save_dir, named by its number; otherwise the second would resume the first.

    Jobs of one process also share what is kept beside a run: the best figure so far, and what was saved last.
    """
    import fairseq_cli.train as training

    original = training.add_defaults  # the first that a run does, in every process, after the plug-in is imported

    def add_defaults(cfg: DictConfig) -> None:
        original(cfg)
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        vars(training.should_stop_early).pop("best", None)
        saving.forget()
        number = _job_number(cfg)
        if number is None:
            return
        folder = os.path.join(cfg.checkpoint.save_dir, str(number))
        cfg.checkpoint.save_dir = folder
        if "save_dir" in cfg.task:
            cfg.task.save_dir = folder
        file = OmegaConf.select(cfg, "job_logging_cfg.handlers.file")
        if file is not None and "filename" in file:  # the log stands beside the checkpoints
            os.makedirs(folder, exist_ok=True)
            file.filename = os.path.join(os.path.abspath(folder), os.path.basename(file.filename))
        logger.info(f"job {number} of a sweep: checkpoint.save_dir={folder}")

    training.add_defaults = add_defaults


def _job_number(cfg: DictConfig) -> int | None:
    """The number of a job of a sweep that shares its save_dir with all jobs; None for other runs."""
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
    else:  # in a process that fairseq has spawned: what hydra has written beside the job's log
        log = OmegaConf.select(cfg, "job_logging_cfg.handlers.file.filename")
        written = Path(log).parent / ".hydra" / "hydra.yaml" if log else None
        if written is None or not written.is_file():
            return None
        hydra = OmegaConf.load(written).hydra
    if getattr(hydra.mode, "name", hydra.mode) != "MULTIRUN":
        return None
    words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    if any(word.startswith("checkpoint.save_dir=") and "${hydra:" in word for word in words):
        return None  # of this job alone
    return int(hydra.job.num)


def leave_finished_runs() -> None:
    """Leave finished runs alone; fairseq checks only after an update, so a finished run that is started again would make one more."""
    import fairseq_cli.train as training

    original = training.train

    def train(cfg: Any, trainer: Trainer, *rest: Any) -> Any:
        done, wanted = trainer.get_num_updates(), cfg.optimization.max_update or 0
        if 0 < wanted <= done:
            logger.info(f"nothing left to do: {done} updates are made, optimization.max_update={wanted}")
            return [None], True
        return original(cfg, trainer, *rest)

    training.train = train
