"""The common part of all tasks of the plug-in: unreadable files, losses that are not finite, checkpoints on SIGTERM, layer trends,
the identity of the data, and batches."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional  # (fairseq reads the types of a dataclass by these names)

import torch
from fairseq.dataclass import FairseqDataclass
from omegaconf import II
from torch import Tensor
from torch import distributed as dist

from hubert_eff.analysis.layer_trends import LayerTrends, Record, TrendLog, look
from hubert_eff.checkpoints.huggingface import files_of
from hubert_eff.config import MEL_FRONTS
from hubert_eff.data.tsv import Manifest
from hubert_eff.errors import UserError, unknown
from hubert_eff.layers.norm import left_out
from hubert_eff.utils.configurations import check_half_precision

from ..runtime import stopping
from ..runtime.saving import check_save_dir
from ..runtime.stopping import one_line_errors

logger = logging.getLogger(__name__)

TREND_INPUTS = ("gaussian", "batch")
BAD_AUDIO = ("stop", "skip")
MAX_EMPTY = 10  # batches in a row without a readable file, after which task.bad_audio=skip stops as well


@dataclass
class SafeConfig(FairseqDataclass):
    """Keys of `task` for faults during training, and for layer trends."""

    bad_audio: str = field(
        default="stop",
        metadata={"help": "what to do with a file that cannot be read or differs from the manifest: stop, or skip it and name it once"},
    )
    bad_updates: int = field(
        default=0,
        metadata={"help": "updates in a row that may be skipped because their loss or gradient is not finite, before the run stops"},
    )
    trends_interval: int = field(default=0, metadata={"help": "updates between two records of layer trends in the save_dir; 0: none"})
    trends_input: str = field(
        default="gaussian", metadata={"help": "input of layer trends: gaussian, through the encoder in eval mode, or the training batch"}
    )
    resume_changed: bool = field(
        default=False, metadata={"help": "resume from a checkpoint even with settings or data that make another training of it"}
    )
    save_dir: str = field(default=II("checkpoint.save_dir"), metadata={"help": "folder of trends.jsonl"})
    max_tokens: Optional[int] = field(  # noqa: UP045
        default=II("dataset.max_tokens"), metadata={"help": "maximum samples of a training batch"}
    )
    max_tokens_valid: Optional[int] = field(  # noqa: UP045
        default=II("dataset.max_tokens_valid"), metadata={"help": "maximum samples of a validation batch"}
    )


class SafeTask:
    """A mix-in for fairseq tasks whose configuration includes `SafeConfig`."""

    cfg: Any
    model: Any = None  # the trained model
    last_batch: Tensor
    trends: TrendLog | None = None
    looked_at = -1  # the update of the last record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unreadable: set[str] = set()  # the fault of each file that was left out
        self.empty = 0  # batches in a row of which no file could be read
        self.skipped = 0  # updates in a row whose gradient was not finite
        self.state.merge_state_dict({"files": {}})  # type: ignore[attr-defined]  # digests, which checkpoints keep

    # -- data --------------------------------------------------------------------------------------------------------

    def max_tokens(self, split: str) -> int | None:
        """Maximum samples of a batch of a split."""
        limit: int | None = self.cfg.max_tokens if split == self.cfg.train_subset else self.cfg.max_tokens_valid
        return limit

    @property
    def sees_padding(self) -> bool:
        """Whether padding changes what the model computes: by the extractor's GroupNorm over time, or fairseq's rule of valid frames."""
        config = getattr(getattr(self.model, "hubert", self.model), "config", None)
        if config is None:
            return False
        over_time = config.extractor_mode == "default" and config.conv_feature_layers not in MEL_FRONTS
        return over_time or config.valid_frames != "receptive_field"

    def get_batch_iterator(self, dataset: Any, max_tokens: int | None = None, max_sentences: int | None = None, **options: Any) -> Any:
        """fairseq's iterator; `pack` makes batches of some utterances (`resuming.finish_epochs`)."""
        found = super().get_batch_iterator(dataset, max_tokens, max_sentences, **options)  # type: ignore[misc]
        found.pack = functools.partial(
            dataset.batch_by_size, max_tokens=max_tokens, max_sentences=max_sentences,
            required_batch_size_multiple=options.get("required_batch_size_multiple", 1),
        )  # fmt: skip
        return found

    def files(self, split: str) -> dict[str, Path | bytes]:
        """The identity of a split: files or their content, without folders of this machine, by names for messages."""
        raise NotImplementedError

    def note_files(self, split: str) -> None:
        """Keep the digests of a split's files."""
        if f"{split}.tsv" not in self.state.files:  # type: ignore[attr-defined]
            for name, content in self.files(split).items():
                self.note_file(name, content)

    def note_file(self, name: str, content: Path | bytes) -> None:
        """Keep the digest of a file on which the training depends, so that a resumed run notices changes."""
        digest = hashlib.sha256()
        if isinstance(content, bytes):
            digest.update(content)
        elif content.is_file() or content.is_dir():
            for part in files_of(content):
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        else:
            return  # its reader reports that
        self.state.files[name] = digest.hexdigest()  # type: ignore[attr-defined]

    # -- updates -----------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Save on SIGTERM from the first update on; before it there is nothing to save."""
        stopping.listen()

    @one_line_errors()
    def train_step(self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False) -> Any:
        """Forward and backward; ends the run if the loss is not finite. A batch that is marked `ignored` counts for nothing."""
        self.note_unreadable(sample)
        self.last_batch, ignored = sample["id"], sample.get("ignored", False)
        self.empty = self.empty if ignored else 0
        with self._record(model, update_num) as losses, left_out() if ignored else nullcontext():
            loss, sample_size, log = super().train_step(  # type: ignore[misc]
                sample, model, criterion, optimizer, update_num, ignore_grad or ignored
            )
            losses.append(loss.detach() / max(int(sample_size), 1))
        if not self.cfg.bad_updates:
            self.check_finite("the loss", loss, update_num)
        elif not bool(torch.isfinite(loss)):  # its gradient is not finite either, on all ranks: the update will be skipped
            ignored = True
        return (loss, *_emptied(sample_size, log)) if ignored else (loss, sample_size, log)

    def check_gradient(self, norm: Tensor, model: Any, update_num: int) -> None:
        """If the gradient's `norm` () is not finite, skip this update (`norm` becomes 0), or end the run, as task.bad_updates says."""
        if bool(torch.isfinite(norm).all()):
            self.skipped = 0
            return
        # no gradient reaches running statistics: once they are not finite, no later update repairs them
        sound = all(bool(torch.isfinite(b).all()) for b in model.buffers() if b.is_floating_point())
        if self.skipped == self.cfg.bad_updates or not sound:
            self.check_finite("the gradient norm", norm, update_num)
        self.skipped += 1
        logger.warning(
            f"update {update_num}: the gradient norm is {float(norm):g} (utterances {self._last_ids()}); left out, {self.skipped} in a row "
            f"of task.bad_updates={self.cfg.bad_updates}"
        )
        norm.zero_()

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Update the weights, unless the gradient was not finite."""
        if not self.skipped:
            super().optimizer_step(optimizer, model, update_num)  # type: ignore[misc]

    @contextmanager
    def _record(self, model: Any, update_num: int) -> Iterator[list[Tensor]]:
        """Around a forward pass, take and write a record of layer trends if one is due. Yields a list for the loss."""
        interval: int = self.cfg.trends_interval
        losses: list[Tensor] = []
        due = interval > 0 and update_num % interval == 0 and update_num != self.looked_at
        if not due or (dist.is_initialized() and dist.get_rank() > 0):
            yield losses
            return
        self.looked_at = update_num
        core = getattr(model, "module", model)
        core = getattr(core, "hubert", core)
        if self.cfg.trends_input == "gaussian":
            layers = look(core, update_num).layers
            yield losses
        else:
            with LayerTrends(core).watching() as layers:
                yield losses
        check_save_dir(update_num)
        self.trends = self.trends or TrendLog(self.cfg.save_dir)
        self.trends.add(Record(update_num, layers, float(losses[0]), self.cfg.trends_input))

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> Any:
        """Forward; ends the run if the loss is not finite, leaves the validation if a stop was asked for."""
        if stopping.requested():
            raise stopping.StopRequested
        self.note_unreadable(sample)
        self.last_batch = sample["id"]
        loss, sample_size, log = super().valid_step(sample, model, criterion)  # type: ignore[misc]
        self.check_finite("the validation loss", loss, model.num_updates)
        return (loss, *_emptied(sample_size, log)) if sample.get("ignored") else (loss, sample_size, log)

    @one_line_errors()
    def note_unreadable(self, sample: dict[str, Any]) -> None:
        """Handle what a batch lacks: end the run or name each file once, as task.bad_audio says. Changed labels always end it."""
        for line in sample.get("changed", ()):
            raise UserError(f"{line}; leave the labels alone while training runs, and run the same command again to resume")
        for line in sample.get("unreadable", ()):
            if self.cfg.bad_audio == "stop":
                raise UserError(f"{line}: make the manifest again, or leave out such files with task.bad_audio=skip")
            if line not in self.unreadable:
                self.unreadable.add(line)
                logger.warning(f"left out, as task.bad_audio=skip: {line} ({len(self.unreadable)} so far)")

    @one_line_errors()
    def note_empty(self, sample: dict[str, Any], first: bool) -> None:
        """Handle a batch without a readable file: end the run if it is the `first` or one of too many, as when a disk is gone."""
        self.note_unreadable(sample)
        self.empty += 1
        if first or self.empty >= MAX_EMPTY:
            raise UserError(f"{self.empty} batch(es) in a row without a file that can be read, the last one {sample['unreadable'][-1]}")

    def check_finite(self, what: str, value: Tensor, update_num: int) -> None:
        """End the run if `value` is not finite, naming the update and the batch."""
        if not bool(torch.isfinite(value).all()):
            stopping.not_finite(
                f"stopped at update {update_num}: {what} is {float(value):g} (utterances {self._last_ids()}). The last checkpoint is "
                "untouched; lower optimization.lr or set optimization.clip_norm, and run the same command again to resume from it"
            )

    def _last_ids(self) -> str:
        ids = self.last_batch.tolist()
        return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def entries(manifest: Manifest) -> bytes:
    """The entries of a manifest without the folder of the audio, which may be moved."""
    return "".join(f"{name}\t{samples}\n" for name, samples in manifest.entries).encode()


def _emptied(sample_size: Any, log: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Sample size and log of a batch that counts for nothing."""
    zeros = {key: torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0) for key, value in log.items()}
    return sample_size * 0, zeros


def check_run(cfg: Any) -> None:
    """Raise `UserError` for half precision without a GPU, impossible layer trends, and invalid values of `bad_...`."""
    if cfg.trends_interval < 0:
        raise UserError(f"task.trends_interval={cfg.trends_interval} must be 0 (no layer trends) or more")
    if cfg.trends_input not in TREND_INPUTS:
        raise unknown("value of task.trends_input", cfg.trends_input, TREND_INPUTS)
    if cfg.bad_updates < 0:
        raise UserError(f"task.bad_updates={cfg.bad_updates} must be 0 (stop at the first) or more")
    if cfg.bad_updates and (cfg.fp16 or cfg.amp):
        raise UserError(
            f"task.bad_updates={cfg.bad_updates} is for float32 and bf16: with fp16 and amp fairseq leaves such updates out by itself"
        )
    if cfg.bad_audio not in BAD_AUDIO:
        raise unknown("value of task.bad_audio", cfg.bad_audio, BAD_AUDIO)
    check_half_precision(fp16=cfg.fp16, amp=cfg.amp, cpu=cfg.cpu)
