"""The task `hubert_eff_pretraining`: masked prediction of k-means classes, checked before it starts and safe to stop."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional  # (fairseq reads the types of a dataclass by these names)

from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models import MODEL_REGISTRY
from fairseq.optim.composite import FairseqCompositeOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig, HubertPretrainingTask, LabelEncoder
from omegaconf import II, OmegaConf

import hubert_eff
from hubert_eff.config import RECEPTIVE_FIELD, HubertConfig
from hubert_eff.data.tsv import read_manifest
from hubert_eff.encoders.registry import list_encoders
from hubert_eff.errors import UserError, unknown
from hubert_eff.models.extractor import receptive_field
from hubert_eff.quant.distill import start_from
from hubert_eff.quant.functional import FLOOR
from hubert_eff.quant.monitor import Monitor, scales

from ..data import checks
from ..data.dataset import SeededHubertDataset
from ..runtime.stopping import one_line_errors
from .safe import SafeConfig, SafeTask, check_run, entries

logger = logging.getLogger(__name__)


@dataclass
class HubertEffPretrainingConfig(SafeConfig, HubertPretrainingConfig):
    """Keys of fairseq's `hubert_pretraining`, and those that the checks need."""

    seed: int = field(default=II("common.seed"), metadata={"help": "seed of batches and crops"})
    fp16: bool = field(default=II("common.fp16"), metadata={"help": "half precision, which needs a GPU"})
    amp: bool = field(default=II("common.amp"), metadata={"help": "automatic mixed precision, which needs a GPU"})
    cpu: bool = field(default=II("common.cpu"), metadata={"help": "train on the CPU"})
    init_from: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "checkpoint, or folder of Hugging Face, from whose weights a new run starts; also codebooks if they have as many "
            "classes; a binarized model may start from its form of other bits"
        },
    )
    new_codebooks: bool = field(
        default=False,
        metadata={"help": "start with new codebooks even if init_from has as many classes, for labels of another clustering"},
    )
    length_buckets: int = field(
        default=0,
        metadata={
            "help": "number of lengths of training batches, at quantiles of the utterances' lengths; 0: any; for model.compile_blocks"
        },
    )
    train_subset: str = field(default=II("dataset.train_subset"), metadata={"help": "split for training"})
    log_interval: int = field(default=II("common.log_interval"), metadata={"help": "updates between two checks of a binarized model"})


@register_task("hubert_eff_pretraining", dataclass=HubertEffPretrainingConfig)
class HubertEffPretrainingTask(SafeTask, HubertPretrainingTask):
    """fairseq's HuBERT pre-training with early checks, reproducible batches and a clear end on NaN and SIGTERM."""

    cfg: HubertEffPretrainingConfig
    monitor: Monitor | None = None  # of a binarized model
    groups_checked = False

    @classmethod
    @one_line_errors()
    def setup_task(cls, cfg: HubertEffPretrainingConfig, from_checkpoint: bool = False, **kwargs: Any) -> HubertEffPretrainingTask:
        """Check what does not depend on a split; a task that comes with a checkpoint has nothing to train on."""
        if not from_checkpoint:
            if OmegaConf.is_missing(cfg, "data") or not Path(cfg.data).is_dir():
                given = "is not set" if OmegaConf.is_missing(cfg, "data") else f"{cfg.data} is not a directory"
                raise UserError(f"task.data {given}: give the directory that `hubert-eff manifest` wrote, task.data=DIR")
            if cfg.label_dir is not None and not Path(cfg.label_dir).is_dir():
                raise UserError(f"task.label_dir {cfg.label_dir} is not a directory: give the one that `hubert-eff labels` wrote")
            if cfg.fine_tuning or cfg.single_target:
                raise UserError("task.fine_tuning and task.single_target belong to fairseq's fine-tuning: leave them false to pre-train")
            if cfg.label_rate <= 0:
                raise UserError(f"task.label_rate={cfg.label_rate:g}: labels come at a fixed rate, 100 (MFCC) or 50 (a layer) per second")
            if cfg.length_buckets < 0:
                raise UserError(f"task.length_buckets={cfg.length_buckets} must be 0 (batches of any length) or more")
            check_run(cfg)
        return cls(cfg)

    def load_dictionaries(self) -> list[Dictionary]:
        """The dictionary of each codebook."""
        return [checks.read_dictionary(Path(self.get_label_dir()) / f"dict.{name}.txt") for name in self.cfg.labels]

    @one_line_errors()
    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model. Raises `UserError` for an unknown name or an invalid value."""
        name = getattr(cfg, "_name", None)
        if name not in MODEL_REGISTRY:
            raise unknown("model", name, (f"hubert_{encoder}" for encoder in list_encoders()))
        model = super().build_model(cfg, from_checkpoint)
        cfg.quant_policy = model.config.quant_policy  # the content of a policy file goes into the checkpoints
        if not from_checkpoint:
            if model.config.normalize_eps != HubertConfig.normalize_eps:
                raise UserError(
                    f"model.normalize_eps={model.config.normalize_eps:g}: fairseq normalizes its batches with 1e-5, leave the key out"
                )
            if self.cfg.new_codebooks and not self.cfg.init_from:
                raise UserError("task.new_codebooks=true applies to task.init_from, which is not set")
            if self.cfg.init_from:
                self.note_file("task.init_from", Path(self.cfg.init_from))
                try:
                    taken = start_from(model, hubert_eff.load(self.cfg.init_from), self.cfg.new_codebooks)
                except UserError as error:
                    raise UserError(f"task.init_from={self.cfg.init_from}: {error}") from error
                logger.info(f"task.init_from={self.cfg.init_from}: {taken}; the optimizer begins anew")
            if model.config.quant != "none":
                self.monitor = Monitor(model)
                for scale in scales(model):
                    scale.param_group = "scales"  # type: ignore[attr-defined]  # what fairseq's optimizer `composite` goes by
            self.model = model  # for criteria that check it
        return model

    @one_line_errors()
    def load_dataset(self, split: str, **kwargs: Any) -> None:
        """Check and open one split. All splits except that of training are padded, so that their figures do not depend on the batch."""
        cfg, label_dir, training = self.cfg, Path(self.get_label_dir()), split == self.cfg.train_subset
        frame = RECEPTIVE_FIELD if self.model is None else receptive_field(self.model.config.conv_layers)
        for key, limit in (("task.max_sample_size", cfg.max_sample_size), ("dataset.max_tokens", self.max_tokens(split))):
            if limit is not None and limit < frame:
                raise UserError(f"{key}={limit} samples are too few for one frame, which needs {frame}")
        shortest = max(cfg.min_sample_size or 0, frame)
        manifest, labels = checks.check_split(
            Path(cfg.data), label_dir, split, cfg.labels, cfg.label_rate, cfg.sample_rate, self.dictionaries,
            shortest, cfg.max_keep_size, cfg.bad_audio == "skip",
        )  # fmt: skip
        self.note_files(split)
        self.datasets[split] = SeededHubertDataset(
            manifest,
            labels,
            sample_rate=cfg.sample_rate,
            label_rate=cfg.label_rate,
            pad_list=[dictionary.pad() for dictionary in self.dictionaries],
            eos_list=[dictionary.eos() for dictionary in self.dictionaries],
            label_processors=[LabelEncoder(dictionary) for dictionary in self.dictionaries],
            max_keep_sample_size=cfg.max_keep_size,
            min_keep_sample_size=shortest,
            max_sample_size=cfg.max_sample_size,
            pad_audio=cfg.pad_audio or not training,
            normalize=cfg.normalize,
            random_crop=cfg.random_crop,
            seed=cfg.seed,
            length_buckets=cfg.length_buckets if training else 0,
            max_tokens=self.max_tokens(split),
            equal_lengths=not training and self.sees_padding,
        )
        self._name_cropped(split)
        buckets = self.datasets[split].buckets
        if buckets is not None:
            seconds = ", ".join(f"{length / cfg.sample_rate:.2f}" for length in buckets.lengths)
            logger.info(f"{split}: batches of {seconds} s, {100 * buckets.kept(self.datasets[split].sizes):.1f} % of the audio")

    def _name_cropped(self, split: str) -> None:
        """Name the utterances that are longer than a batch."""
        dataset, limit = self.datasets[split], self.max_tokens(split)
        longer = [i for i, size in enumerate(dataset.sizes) if limit and min(size, self.cfg.max_sample_size or size) > limit]
        if longer:
            logger.warning(
                f"{split}: {len(longer)} of {len(dataset)} utterances are longer than a batch (dataset.max_tokens={limit}) and cropped to "
                f"it, the first is {dataset.audio_names[longer[0]]!r} of {dataset.sizes[longer[0]]} samples"
            )

    def files(self, split: str) -> dict[str, Path | bytes]:
        """See `SafeTask`."""
        labels = Path(self.get_label_dir())
        names = [name for label in self.cfg.labels for name in (f"{split}.{label}", f"dict.{label}.txt")]
        manifest = read_manifest(Path(self.cfg.data) / f"{split}.tsv")
        return {manifest.path.name: entries(manifest), **{name: labels / name for name in names}}

    @one_line_errors()
    def train_step(self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False) -> Any:
        """Forward and backward; ends the run if the loss is not finite."""
        self._check_groups(optimizer)
        monitor = self._due(update_num)
        with monitor.watching() if monitor else nullcontext():
            return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def _check_groups(self, optimizer: Any) -> None:
        """Warn once if the scales of a binarized model share a group with its weights."""
        inner = getattr(optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer))
        if self.monitor is not None and not self.groups_checked and not isinstance(inner, FairseqCompositeOptimizer):
            logger.warning(
                "the scales of this binarized model learn at the rate of its weights, and decay with them: the optimizer and lr_scheduler "
                "sections of the files in configs/quantize give them a group of their own"
            )
        self.groups_checked = True

    def _due(self, update_num: int) -> Monitor | None:
        """The monitor of a binarized model at every `log_interval`, otherwise None."""
        return self.monitor if (update_num + 1) % max(self.cfg.log_interval, 1) == 0 else None

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Make one update; at every `log_interval`, log its effect on a binarized model."""
        monitor = self._due(update_num)
        if monitor is None:
            super().optimizer_step(optimizer, model, update_num)
            return
        monitor.before_update()
        super().optimizer_step(optimizer, model, update_num)
        health = monitor.after_update()
        for key, share in health.by_block().items():
            metrics.log_scalar(key, share, priority=50, round=4)
        logger.info(f"update {update_num + 1}: {health.worst()}")
        for name in monitor.collapsed():
            logger.warning(
                f"update {update_num + 1}: the scale of {name} has fallen to its floor, {FLOOR:g}: its input no longer reaches what "
                "follows; lower the learning rate of the scales, or resume from an earlier checkpoint"
            )
