"""Patches of fairseq itself. Each function is one patch and says why; `apply` makes them all."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.dataclass import utils as dataclass_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode

from hubert_eff.checkpoints.load import DICTIONARY
from hubert_eff.checkpoints.torchfile import TorchFile, Unreadable
from hubert_eff.errors import UserError, unknown

from . import epochs, resuming, saving, stopping

logger = logging.getLogger(__name__)


def apply() -> None:
    """Make all patches; fairseq imports the plug-in once per process."""
    allow_checkpoint_classes()
    name_bad_keys()
    read_checkpoints_safely()
    saving.write_whole_checkpoints()
    saving.refuse_bad_save_dir()
    save_no_paths()
    stop_on_infinite_gradient()
    wrap_models_on_cpu()
    gather_on_cpu()
    leave_out_empty_batches()
    epochs.apply()
    resuming.apply()
    if stopping.in_training_run():
        stopping.leave_on_interrupt()
        saving.keep_save_dir()
        saving.go_on_from_newest()
        saving.save_on_signals()
        saving.refuse_unknown_metric()
        logging.raiseExceptions = False  # otherwise a log file on a full disk gives a traceback per line


def allow_checkpoint_classes() -> None:
    """Allow harmless classes in checkpoints. When several ranks resume, the first sends the checkpoint to the others, and torch >= 2.6 then
    accepts only named classes: those of the task's state, placeholders for tensors, and omegaconf's containers."""
    torch.serialization.add_safe_globals(
        [
            Dictionary,
            distributed_utils._TensorPlaceholder,
            DictConfig,
            ListConfig,
            ContainerMetadata,
            Metadata,
            AnyNode,
            typing.Any,
            defaultdict,
            dict,
            list,
            int,
        ]  # fmt: skip
    )


def name_bad_keys() -> None:
    """Name an unknown key of a model, task, optimizer ..., or a value of the wrong type, in one line instead of a traceback."""
    original = dataclass_utils.merge_with_parent

    @stopping.one_line_errors()
    def merge(defaults: Any, cfg: DictConfig, remove_missing: bool = False) -> DictConfig:
        name, known = cfg.get("_name"), [field.name for field in dataclasses.fields(defaults)]
        for key in () if remove_missing else cfg:
            if key not in known:
                raise unknown(f"key of {name}", key, known)
        try:
            return original(defaults, cfg, remove_missing)
        except OmegaConfBaseException as error:
            raise UserError(f"{name}: {error.full_key}: {str(error).splitlines()[0]}") from error

    dataclass_utils.merge_with_parent = merge


def read_checkpoints_safely() -> None:
    """Read files by `hubert_eff.checkpoints.torchfile`, and name a bad one in one line that says what to do.

    torch.load believes a file that claims a tensor longer than the file holds, and fails with a traceback for files of other kinds.
    """
    original, reader = checkpoint_utils.load_checkpoint_to_cpu, _Torch("torch")
    reader.load = _read  # type: ignore[attr-defined]
    checkpoint_utils.torch = reader

    @stopping.one_line_errors()
    def load(path: str, *args: Any, **options: Any) -> dict[str, Any]:
        try:
            return original(path, *args, **options)
        except MemoryError:
            raise
        except Unreadable as error:
            reason = error.reason
        except OSError:
            raise
        except Exception:  # fairseq's expectations about the content failed
            reason = "is not a checkpoint"
        raise UserError(
            f"{path} {reason}: resume from another with checkpoint.restore_file=FILE (without this file, training takes the newest intact "
            "one), or set another checkpoint.save_dir to start anew"
        )

    checkpoint_utils.load_checkpoint_to_cpu = load


class _Torch(types.ModuleType):
    """Stands in for torch in a module, with one function replaced."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _read(file: BinaryIO, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint; replaces torch.load."""
    path = Path(file.name)
    with TorchFile(path, {DICTIONARY: Dictionary}) as opened:
        if not isinstance(opened.content, dict) or not isinstance(opened.content.get("model"), dict):
            raise Unreadable(path, "is not a checkpoint of a model")
        content: dict[str, Any] = opened.whole()
        return content


def save_no_paths() -> None:
    """Keep folders of the user's machine out of checkpoints, into which fairseq writes its whole configuration.

    Only the last part of an absolute path is kept. Nothing reads the rest, since a resumed run takes its own configuration.
    """
    original = Trainer.state_dict

    def state_dict(self: Trainer) -> dict[str, Any]:
        state = original(self)
        return {**state, "cfg": resuming.without_folders(state["cfg"])}

    Trainer.state_dict = state_dict


def stop_on_infinite_gradient() -> None:
    """End with one line, or skip the update, if a gradient is not finite; fairseq writes a second checkpoint and a long traceback.

    All ranks see the same gradient, so they stop, or skip, together.
    """
    original = Trainer._check_grad_norms

    def check(self: Trainer, grad_norm: torch.Tensor) -> None:
        # AMP skips such an update by itself; fp16 lowers the loss scale before this point
        if not self.cfg.common.amp and hasattr(self.task, "check_gradient"):
            self.task.check_gradient(grad_norm, self.get_model(), self.get_num_updates())
        original(self, grad_norm)

    Trainer._check_grad_norms = check


def wrap_models_on_cpu() -> None:
    """Leave out device ids for a model on the CPU: DistributedDataParallel refuses them, and fairseq always passes them."""
    original = distributed_fairseq_model.DistributedDataParallel

    def wrap(module: torch.nn.Module, *, device_ids: Any, output_device: Any, **options: Any) -> Any:
        if next(module.parameters()).device.type != "cpu":
            options.update(device_ids=device_ids, output_device=output_device)
        return original(module, **options)

    distributed_fairseq_model.DistributedDataParallel = wrap


def gather_on_cpu() -> None:
    """Give `all_gather_list` buffers on the CPU if there is no GPU, on which it would allocate them."""
    original = distributed_utils.all_gather_list

    def _gather(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
        if not torch.cuda.is_available():
            size = max_size * distributed_utils.get_world_size(group or distributed_utils.get_global_group())
            if getattr(gather, "_buffer", torch.empty(0)).numel() < size:
                # the function finds its buffers under its own name in the module, which is this wrapper
                gather._buffer, gather._cpu_buffer = torch.ByteTensor(size), torch.ByteTensor(max_size)
        return original(data, group, max_size)

    gather: Any = _gather
    distributed_utils.all_gather_list = gather


def leave_out_empty_batches() -> None:
    """Ignore stand-in batches completely. A rank without a batch takes one while others have batches, and its loss is multiplied by 0.

    fairseq looks only at the last batch of an update: with update_freq > 1 it treats all or none of the rank's batches as stand-ins. Here
    each is marked `ignored`, and the task leaves it out (`SafeTask.train_step`). A batch without a readable file is one of these.
    """
    prepare, reset = Trainer._prepare_sample, Trainer.reset_dummy_batch

    def _prepare_sample(self: Trainer, sample: Any, is_dummy: bool = False) -> Any:
        if is_dummy or not hasattr(self.task, "note_unreadable"):
            return prepare(self, sample, is_dummy)
        if sample and "net_input" in sample:
            return prepare(self, sample)
        if sample:
            self.task.note_empty(sample, first=self._dummy_batch == "DUMMY")
        stand_in, _ = prepare(self, {})
        return {**stand_in, "ignored": True, "unreadable": []}, False

    def reset_dummy_batch(self: Trainer, batch: Any) -> None:
        if hasattr(self.task, "note_unreadable") and isinstance(batch, dict):
            self.task.note_unreadable(batch)
            batch = batch if "net_input" in batch else "DUMMY"  # the first batch that is read becomes the stand-in
        reset(self, batch)

    Trainer._prepare_sample, Trainer.reset_dummy_batch = _prepare_sample, reset_dummy_batch
