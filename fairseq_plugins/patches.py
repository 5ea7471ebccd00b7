"""What has to change in fairseq itself. Each function is one patch and says why; `apply` makes them all."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import pickle
import shutil
import sys
import tempfile
import typing
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.iterators import EpochBatchIterator
from fairseq.dataclass import utils as dataclass_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode

from hubert_eff.errors import UserError, unknown
from hubert_eff.files import writable

from . import stopping

logger = logging.getLogger(__name__)


def apply() -> None:
    """Make all patches; fairseq imports the plug-in once per process."""
    allow_checkpoint_classes()
    name_bad_keys()
    name_bad_checkpoints()
    write_whole_checkpoints()
    refuse_bad_save_dir()
    save_no_paths()
    stop_on_infinite_gradient()
    wrap_models_on_cpu()
    gather_on_cpu()
    count_batches_over_ranks()
    leave_out_empty_batches()
    if stopping.in_training_run():
        save_on_sigterm()
        leave_finished_runs()
        logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback per line


def allow_checkpoint_classes() -> None:
    """torch >= 2.6 loads weights only, so resuming needs the harmless classes that checkpoints hold to be named.

    The task state holds dictionaries; resuming on several ranks sends placeholders for tensors and omegaconf's containers.
    """
    torch.serialization.add_safe_globals(
        [
            Dictionary, distributed_utils._TensorPlaceholder, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode,
            typing.Any, defaultdict, dict, list, int,
        ]  # fmt: skip
    )


def name_bad_keys() -> None:
    """A key that a model, task, optimizer ... does not have, or a value of the wrong type, ends in a traceback; one line names it."""
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


def name_bad_checkpoints() -> None:
    """A file that is no checkpoint ends in a traceback out of the reader; one line names the file and says what to do."""
    original = checkpoint_utils.load_checkpoint_to_cpu

    @stopping.one_line_errors()
    def load(path: str, *args: Any, **options: Any) -> dict[str, Any]:
        try:
            state = original(path, *args, **options)
            if "model" in state:
                return state
            reason = "holds no model"
        except MemoryError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # the reader seeks to before the start of a truncated file
                raise
            reason = "is truncated"
        except pickle.UnpicklingError as error:
            # torch's wording for a class that is not allowed; junk fails with another message
            reason = "holds pickled code, not only weights" if "GLOBAL" in str(error) else "is no checkpoint, or is truncated"
        except Exception:  # bytes that are no checkpoint can fail anywhere in the reader
            reason = "is no checkpoint, or is truncated"
        raise UserError(
            f"{path} {reason}: go on from another with checkpoint.restore_file=FILE, or move it away (or set another "
            "checkpoint.save_dir) to start anew"
        )

    checkpoint_utils.load_checkpoint_to_cpu = load


def write_whole_checkpoints() -> None:
    """A checkpoint's name always stands for a whole file, also when the process is killed or the disk is full.

    fairseq copies onto checkpoint_last.pt in place: a kill in between leaves it truncated. When writing fails it tries twice again, behind
    the half that is written, and ends in a traceback; here one line says why, and the half is removed. A checkpoint under a second name,
    such as checkpoint_last.pt, is the same file: it takes no room, and is there if the first is.
    """
    save_remote, copy_remote = checkpoint_utils.torch_persistent_save, PathManager.copy

    def save(content: Any, path: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(path):  # remote storage
            return save_remote(content, path, async_write)
        with _replacing(path) as file:
            torch.save(content, file)

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not PathManager.supports_rename(dst_path):
            return copy_remote(src_path, dst_path, overwrite)
        temporary = f"{dst_path}.tmp"
        with suppress(FileNotFoundError):  # of a run that was killed
            os.remove(temporary)
        try:
            os.link(src_path, temporary)
        except OSError:  # not every file system can
            with open(src_path, "rb") as source, _replacing(dst_path) as file:
                shutil.copyfileobj(source, file, 1 << 20)
        else:
            os.replace(temporary, dst_path)
        return True

    checkpoint_utils.torch_persistent_save, PathManager.copy = save, staticmethod(copy)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when all is written, and on the disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else the name may reach the disk before the content, and a power failure leaves it empty
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns what the file says into a RuntimeError
        with suppress(OSError):
            os.remove(temporary)
        if not stopping.in_training_run():
            raise
        cause = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
        reason = cause.strerror if cause else " ".join(str(error).split())[:200]
        stopping.end_run(
            f"stopped: {path} cannot be written ({reason}). What was saved before is whole: make room, and the same command goes on "
            "from there", 1,
        )  # fmt: skip


def refuse_bad_save_dir() -> None:
    """A folder for checkpoints that cannot be written to ends in a traceback; one line names it."""

    @stopping.one_line_errors()
    def verify(save_dir: str) -> None:
        try:
            with tempfile.TemporaryFile(dir=writable(save_dir)):
                pass
        except OSError as error:
            raise UserError(f"checkpoint.save_dir={save_dir} cannot be written to ({error.strerror}): give another folder") from error

    checkpoint_utils.verify_checkpoint_directory = verify


def save_no_paths() -> None:
    """fairseq writes its whole configuration into checkpoints, folders of the user's machine included, which travel with the model.

    Of an absolute path the last part is kept. Nothing reads the others: a run that goes on takes its own configuration.
    """
    original = Trainer.state_dict

    def state_dict(self: Trainer) -> dict[str, Any]:
        state = original(self)
        return {**state, "cfg": _without_folders(state["cfg"])}

    Trainer.state_dict = state_dict


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return os.path.basename(value.rstrip(os.sep)) if isinstance(value, str) and os.path.isabs(value) else value


def stop_on_infinite_gradient() -> None:
    """On a gradient that is not finite fairseq writes a second checkpoint and a long traceback; one line says it, or the update is skipped.

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
    """DistributedDataParallel refuses device ids for a model on the CPU; fairseq always passes them."""
    original = distributed_fairseq_model.DistributedDataParallel

    def wrap(module: torch.nn.Module, *, device_ids: Any, output_device: Any, **options: Any) -> Any:
        if next(module.parameters()).device.type != "cpu":
            options.update(device_ids=device_ids, output_device=output_device)
        return original(module, **options)

    distributed_fairseq_model.DistributedDataParallel = wrap


def gather_on_cpu() -> None:
    """`all_gather_list` allocates its buffers on a GPU, and keeps them: without one, give it buffers on the CPU."""
    original = distributed_utils.all_gather_list

    def gather(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
        if not torch.cuda.is_available():
            size = max_size * distributed_utils.get_world_size(group or distributed_utils.get_global_group())
            if getattr(gather, "_buffer", torch.empty(0)).numel() < size:
                # the function finds its buffers under its own name in the module, which is this wrapper
                gather._buffer, gather._cpu_buffer = torch.ByteTensor(size), torch.ByteTensor(max_size)
        return original(data, group, max_size)

    distributed_utils.all_gather_list = gather


def count_batches_over_ranks() -> None:
    """A checkpoint holds how many batches each rank has had of the epoch; on another number of ranks that is another place in it.

    Left as it is, 2 ranks -> 1 trains on half of the epoch's batches again, and 1 -> 2 leaves as many out, or fails past the end.
    """
    save, load = EpochBatchIterator.state_dict, EpochBatchIterator.load_state_dict

    def state_dict(self: EpochBatchIterator) -> dict[str, Any]:
        return {**save(self), "num_shards": self.num_shards}

    def load_state_dict(self: EpochBatchIterator, state: dict[str, Any]) -> None:
        before, now = state.get("num_shards", self.num_shards), self.num_shards
        if before != now:
            seen = state["iterations_in_epoch"] * before
            state = {**state, "iterations_in_epoch": seen // now}
            if self.shard_id == 0:
                again = f", the last {seen % now} once more" if seen % now else ""
                order = "; dataset.grouped_shuffling puts them in another order now" if self.grouped_shuffling and seen else ""
                logger.warning(
                    f"{now} rank(s) go on from a checkpoint of {before}: in epoch {state['epoch']}, {seen} of {len(self.frozen_batches)} "
                    f"batches are done, the others follow{again}{order}. optimization.update_freq times {before}/{now} keeps the number of "
                    "batches per update"
                )
        load(self, state)

    EpochBatchIterator.state_dict, EpochBatchIterator.load_state_dict = state_dict, load_state_dict


def leave_out_empty_batches() -> None:
    """A rank that has no batch while others have takes a stand-in, whose loss is multiplied by 0. Let it count for nothing at all.

    fairseq goes by the last batch of an update: with update_freq > 1 it takes all of the rank's batches, or none, for stand-ins. Here each
    is marked `ignored`, and the task leaves it out (`SafeTask.train_step`). A batch with no readable file is one of these.
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


def leave_finished_runs() -> None:
    """fairseq looks whether a run is done after an update only: one that was finished, started again, makes one more."""
    import fairseq_cli.train as training

    original = training.train

    def train(cfg: Any, trainer: Trainer, *rest: Any) -> Any:
        done, wanted = trainer.get_num_updates(), cfg.optimization.max_update or 0
        if 0 < wanted <= done:
            logger.info(f"nothing left to do: {done} updates are made, optimization.max_update={wanted}")
            return [None], True
        return original(cfg, trainer, *rest)

    training.train = train


def save_on_sigterm() -> None:
    """Clusters send SIGTERM before they kill; fairseq has no handler and loses all updates since the last save.

    A stop is taken up after an update (or within a validation): checkpoint_last.pt is written, and the run exits with 143.
    """
    import fairseq_cli.train as training

    original = training.validate_and_save

    def validate_and_save(cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, *rest: Any, **options: Any) -> Any:
        if stopping.requested():
            _save_and_leave(cfg, trainer, epoch_itr)
        try:
            return original(cfg, trainer, task, epoch_itr, *rest, **options)
        except stopping.StopRequested:
            _save_and_leave(cfg, trainer, epoch_itr)

    training.validate_and_save = validate_and_save


def _save_and_leave(cfg: Any, trainer: Trainer, epoch_itr: Any) -> NoReturn:
    path = checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if dist.is_initialized():
        dist.barrier()  # launchers kill all ranks as soon as one has left: the others wait for the one that writes
    if trainer.is_data_parallel_master:
        kept = f"saved {path}; the same command goes on from there" if path else "saved nothing, as the checkpoint section asks"
        logger.info(f"SIGTERM at update {trainer.get_num_updates()}: {kept}")
    sys.exit(stopping.SIGTERM_EXIT)
