"""Saves checkpoints atomically, in a folder reserved for this run, also when the run is stopped, and finds them again."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from hubert_eff.checkpoints.load import newest_checkpoint
from hubert_eff.errors import UserError, WriteError, unknown
from hubert_eff.utils.files import replacing, temporary_beside, writable
from hubert_eff.utils.locks import Lock

from . import stopping

LAST = "checkpoint_last.pt"
ONLY_IN_TRAINING = {"ups", "gnorm", "clip", "lr", "loss_scale", "gb_free", "num_updates", "train_wall", "wall"}  # figures of fairseq
logger = logging.getLogger(__name__)
_lock: Lock | None = None  # of the rank that writes
_saved: tuple[int, str | None] = -1, None  # the update of the last save, and its file


def write_whole_checkpoints() -> None:
    """Write checkpoints so that a name always stands for an intact file, even if the process is killed or the disk is full.

    fairseq overwrites checkpoint_last.pt in place, so a kill leaves it truncated. If writing fails, it tries twice more behind the partial
    file and ends in a traceback; here one line gives the reason, and the partial file is removed. A checkpoint under a second name, such as
    checkpoint_last.pt, is the same file: it takes no space and exists if the first does.
    """
    save_remote, copy_remote = checkpoint_utils.torch_persistent_save, PathManager.copy

    def save(content: Any, path: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(path):  # remote storage
            return save_remote(content, path, async_write)
        with _ending_the_run(), replacing(path, follow=False) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def copy_file(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not PathManager.supports_rename(dst_path):
            return copy_remote(src_path, dst_path, overwrite)
        temporary = temporary_beside(Path(dst_path))
        try:
            os.link(src_path, temporary)
        except OSError:  # not every file system supports it
            with _ending_the_run(), replacing(dst_path, follow=False) as temporary:
                shutil.copyfile(src_path, temporary)
        else:
            os.replace(temporary, dst_path)
            temporary.unlink(missing_ok=True)  # nothing is renamed where both names are of one file
        return True

    checkpoint_utils.torch_persistent_save, PathManager.copy = save, staticmethod(copy_file)


@contextmanager
def _ending_the_run() -> Iterator[None]:
    """End a training run in one line if a checkpoint cannot be written."""
    try:
        yield
    except WriteError as error:
        if not stopping.in_training_run():
            raise
        stopping.end_run(
            f"stopped: {error.filename} cannot be written ({error.strerror}). What was saved before is intact: make room, and the same "
            "command resumes from there", 1,
        )  # fmt: skip


def refuse_bad_save_dir() -> None:
    """Refuse, in one line, a folder that cannot be written to or that another run uses, whose checkpoints would be overwritten.

    The rank that writes keeps the folder reserved until its process ends, in whatever way.
    """

    @stopping.one_line_errors()
    def verify(save_dir: str) -> None:
        global _lock
        folder = writable(save_dir)
        if stopping.in_training_run():
            if _lock is not None:
                _lock.release()  # of an earlier job of a sweep, in this process
            _lock = Lock(folder)
            Finalize(None, _lock.release, exitpriority=0)  # also in a process that fairseq has spawned
        for file in folder.glob("checkpoint*.pt.tmp"):  # of a run of an earlier version that was killed
            with suppress(OSError):
                file.unlink()

    checkpoint_utils.verify_checkpoint_directory = verify


def keep_save_dir() -> None:
    """End the run if its folder is moved or removed; fairseq would make a new one and save the rest there."""
    original = checkpoint_utils.save_checkpoint

    def save_checkpoint(cfg: Any, trainer: Trainer, epoch_itr: Any, val_loss: Any) -> Any:
        global _saved
        check_save_dir(trainer.get_num_updates())
        _saved = trainer.get_num_updates(), original(cfg, trainer, epoch_itr, val_loss)
        return _saved[1]

    checkpoint_utils.save_checkpoint = save_checkpoint


def forget() -> None:
    """Begin another run in this process."""
    global _saved
    _saved = -1, None


def check_save_dir(update: int) -> None:
    """End the run if the folder of its checkpoints is not in its place any more."""
    if _lock is None or _lock.in_place:
        return
    place = _lock.moved_to()
    what = f"was moved to {place}" if place else "was removed, or moved to another disk,"
    remedy = f"move it back, or give checkpoint.save_dir={place}" if place else "move it back, or start anew"
    stopping.end_run(
        f"stopped at update {update}: checkpoint.save_dir={_lock.folder} {what} while this run trained, and nothing was saved since: "
        f"{remedy}; the same command goes on from the last checkpoint there", 1,
    )  # fmt: skip


def go_on_from_newest() -> None:
    """Resume from the newest checkpoint without checkpoint_last.pt; fairseq starts anew, as it does without the requested file."""
    original = checkpoint_utils.load_checkpoint

    @stopping.one_line_errors()
    def load_checkpoint(cfg: Any, trainer: Trainer, **options: Any) -> Any:
        global _saved
        _saved = -1, None  # a sweep trains one model after the other
        if cfg.restore_file != LAST:
            if not trainer.checkpoint_suffix and not PathManager.exists(cfg.restore_file):
                raise UserError(f"checkpoint.restore_file={cfg.restore_file} is not there")
        elif not trainer.checkpoint_suffix and not PathManager.exists(os.path.join(cfg.save_dir, LAST)):
            found = newest_checkpoint(cfg.save_dir)
            if found:
                logger.warning(f"{cfg.save_dir} holds no {LAST}: resuming from its newest checkpoint, {found[1].name} of update {found[0]}")
                cfg = copy.deepcopy(cfg)
                cfg.restore_file, cfg.finetune_from_model = str(found[1]), None
        return original(cfg, trainer, **options)

    checkpoint_utils.load_checkpoint = load_checkpoint


def save_on_signals() -> None:
    """Save on signals. Clusters send SIGTERM before they kill, users SIGINT, and fairseq loses all updates since the last save.

    A run stops after an update or a save, or within a validation: it writes checkpoint_last.pt and exits with 143 or 130.
    """
    import fairseq_cli.train as training

    original = training.validate_and_save

    def validate_and_save(cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, *rest: Any, **options: Any) -> Any:
        if number := stopping.requested():
            _save_and_leave(number, cfg, trainer, epoch_itr)
        try:
            result = original(cfg, trainer, task, epoch_itr, *rest, **options)
        except stopping.StopRequested:
            _save_and_leave(stopping.requested(), cfg, trainer, epoch_itr)
        if _saved[0] == trainer.get_num_updates() and (number := stopping.requested()):
            _save_and_leave(number, cfg, trainer, epoch_itr)
        return result

    training.validate_and_save = validate_and_save


def _save_and_leave(number: int, cfg: Any, trainer: Trainer, epoch_itr: Any) -> NoReturn:
    update = trainer.get_num_updates()
    if _saved[0] != update:
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if dist.is_initialized():
        dist.barrier()  # launchers kill all ranks as soon as one has left: the others wait for the one that writes
    if trainer.is_data_parallel_master:
        kept = f"saved {_saved[1]}; the same command resumes from there" if _saved[1] else "saved nothing, as the checkpoint section asks"
        logger.info(f"{signal.Signals(number).name} at update {update}: {kept}")
    sys.exit(128 + number)


def refuse_unknown_metric() -> None:
    """Refuse, in one line, a `checkpoint.best_checkpoint_metric` that nothing logs; it would end in a KeyError after the first validation.

    After the first update, before anything is saved, where the criterion says in `only_in_validation` what only its validations log.
    """
    import fairseq_cli.train as training

    validate, get_stats = training.validate_and_save, training.get_valid_stats

    @stopping.one_line_errors()
    def validate_and_save(cfg: Any, trainer: Trainer, *rest: Any, **options: Any) -> Any:
        logged, later = metrics.get_smoothed_values("train"), getattr(trainer.get_criterion(), "only_in_validation", None)
        if later is not None and "loss" in logged:
            _check_metric(cfg.checkpoint.best_checkpoint_metric, {*logged, *later} - ONLY_IN_TRAINING)
        return validate(cfg, trainer, *rest, **options)

    @stopping.one_line_errors()
    def get_valid_stats(cfg: Any, trainer: Trainer, stats: dict[str, Any], *rest: Any) -> Any:
        _check_metric(cfg.checkpoint.best_checkpoint_metric, stats)
        return get_stats(cfg, trainer, stats, *rest)

    training.validate_and_save, training.get_valid_stats = validate_and_save, get_valid_stats


def _check_metric(metric: str, known: Iterable[str]) -> None:
    if metric not in known:
        raise unknown("figure for checkpoint.best_checkpoint_metric", metric, known)
