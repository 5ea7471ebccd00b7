"""The task `hubert_eff_finetuning`: recordings with transcripts, checked before training starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional  # noqa: UP035  (fairseq reads the types of a dataclass by these names)

from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, OmegaConf

from hubert_eff.checkpoints.load import FINE_TUNED
from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.tsv import Manifest, read_manifest
from hubert_eff.errors import UserError, about, short, unknown
from hubert_eff.recognition.alphabet import UNKNOWN, Alphabet
from hubert_eff.recognition.pieces import Pieces
from hubert_eff.recognition.transcripts import read_transcripts

from ..data import checks
from ..data.transcripts import TranscribedDataset, check_transcripts
from ..runtime.stopping import one_line_errors
from .safe import SafeConfig, SafeTask, check_run, entries

logger = logging.getLogger(__name__)


@dataclass
class HubertEffFinetuningConfig(SafeConfig):
    """Keys of `task`."""

    data: str = field(default="", metadata={"help": "directory of SPLIT.tsv and parts.tsv, as `hubert-eff manifest` writes them"})
    label_dir: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "directory of SPLIT.<labels> and dict.<labels>.txt, where there are any (default: data)"}
    )
    labels: str = field(default="ltr", metadata={"help": "suffix of the files of letters or pieces"})
    sentencepiece: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "sentencepiece model whose pieces are the symbols; kept in what is saved (default: letters)"}
    )
    unknown_symbol: bool = field(
        default=False, metadata={"help": "add a symbol <unk> for characters that the dictionary lacks, which otherwise are an error"}
    )
    max_target_size: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "maximum symbols of a training transcript; utterances with more are left out"}
    )
    dictionary_split: str = field(
        default="train", metadata={"help": "split whose letters are the dictionary if there is no dict.<labels>.txt"}
    )
    sample_rate: int = field(default=SAMPLE_RATE, metadata={"help": "sample rate of the audio, which must be 16 kHz"})
    min_sample_size: Optional[int] = field(default=None, metadata={"help": "minimum samples of an utterance; shorter ones are left out"})  # noqa: UP045
    max_sample_size: Optional[int] = field(default=None, metadata={"help": "maximum samples of an utterance; longer ones are left out"})  # noqa: UP045
    speed_perturb: List[float] = field(  # noqa: UP006
        default_factory=lambda: [1.0], metadata={"help": "speeds, of which one is drawn for each utterance of a training epoch"}
    )
    train_subset: str = field(default=II("dataset.train_subset"), metadata={"help": "split for training"})
    best_checkpoint_metric: str = field(
        default=II("checkpoint.best_checkpoint_metric"), metadata={"help": "figure by which checkpoint_best.pt is chosen"}
    )
    seed: int = field(default=II("common.seed"), metadata={"help": "seed of batches and speeds"})
    fp16: bool = field(default=II("common.fp16"), metadata={"help": "half precision, which needs a GPU"})
    amp: bool = field(default=II("common.amp"), metadata={"help": "automatic mixed precision, which needs a GPU"})
    cpu: bool = field(default=II("common.cpu"), metadata={"help": "train on the CPU"})


@register_task("hubert_eff_finetuning", dataclass=HubertEffFinetuningConfig)
class HubertEffFinetuningTask(SafeTask, FairseqTask):
    """Fine-tuning on letters. `alphabet` is the dictionary; it is saved with the model."""

    def __init__(self, cfg: HubertEffFinetuningConfig, alphabet: Alphabet | None) -> None:
        super().__init__(cfg)
        self.alphabet = alphabet

    @classmethod
    @one_line_errors()
    def setup_task(cls, cfg: HubertEffFinetuningConfig, from_checkpoint: bool = False, **kwargs: Any) -> HubertEffFinetuningTask:
        """Read the dictionary; a task that comes with a checkpoint has none, because its model has one."""
        if from_checkpoint:
            return cls(cfg, None)
        if OmegaConf.is_missing(cfg, "data") or not Path(cfg.data).is_dir():
            given = "is not set" if OmegaConf.is_missing(cfg, "data") else f"{cfg.data or '(empty)'} is not a directory"
            raise UserError(f"task.data {given}: give the directory that `hubert-eff manifest` wrote, task.data=DIR")
        if not cfg.speed_perturb or not all(0.5 <= speed <= 2.0 for speed in cfg.speed_perturb):
            raise UserError(f"task.speed_perturb={list(cfg.speed_perturb)} must be speeds from 0.5 to 2, such as [0.9, 1.0, 1.1]")
        check_run(cfg)
        if cfg.max_target_size is not None and cfg.max_target_size < 1:
            raise UserError(f"task.max_target_size={cfg.max_target_size} must be at least 1")
        return cls(cfg, _alphabet(cfg))

    @property
    def target_dictionary(self) -> None:
        """None: letters are numbered by `alphabet`."""
        return None

    def max_positions(self) -> None:
        """None: lengths are limited by the task's own keys."""
        return None

    @one_line_errors()
    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model. The encoder's configuration and the letters go into `cfg`, which is saved, and the path is removed from it."""
        if cfg._name not in MODEL_REGISTRY or cfg._name not in FINE_TUNED:
            raise unknown("model for fine-tuning", cfg._name, FINE_TUNED)
        if cfg.w2v_path:
            self.note_file("model.w2v_path", Path(cfg.w2v_path))
        if self.cfg.sentencepiece and not from_checkpoint:
            self.note_file("task.sentencepiece", Path(self.cfg.sentencepiece))
        self.model = super().build_model(cfg, from_checkpoint)
        for key in ("encoder", "encoder_config", "letters", "sentencepiece"):
            cfg[key] = getattr(self.model.config, key)
        cfg.w2v_path = cfg.preset = None
        return self.model

    @one_line_errors()
    def load_dataset(self, split: str, **kwargs: Any) -> None:
        """Check and open one split."""
        cfg, training = self.cfg, split == self.cfg.train_subset
        manifest = read_manifest(Path(cfg.data) / f"{split}.tsv")
        checks.check_lengths(manifest, cfg.min_sample_size, cfg.max_sample_size)
        texts, source = read_transcripts(manifest, Path(cfg.label_dir or cfg.data), cfg.labels)
        speeds = list(cfg.speed_perturb) if training else [1.0]
        limits = cfg.min_sample_size or 0, cfg.max_sample_size or max(manifest.samples)
        limits = limits[0], self._longest(manifest, split, *limits)
        self.note_files(split)
        assert self.alphabet is not None
        fits = self.model.num_frames if self.model.learns_ctc else None
        spelled = check_transcripts(texts, source, manifest, self.alphabet, fits, max(speeds), *limits)
        checks.check_audio(manifest, cfg.sample_rate, cfg.bad_audio == "skip")
        most = cfg.max_target_size if training else None
        if most is not None:
            self._name_longer(manifest, spelled, most)
        self.datasets[split] = TranscribedDataset(manifest, spelled, speeds, *limits, cfg.seed, training, most)
        self.datasets[split].equal_lengths = not training and self.sees_padding

    def _name_longer(self, manifest: Manifest, spelled: list[list[int]], most: int) -> None:
        """Name the transcripts with more than `most` symbols. Raises `UserError` if all have more."""
        longer = [i for i, numbers in enumerate(spelled) if len(numbers) > most]
        if not longer:
            return
        said = (
            f"{manifest.path}: {len(longer)} of {len(spelled)} transcripts have more than task.max_target_size={most} symbols; the first "
            f"is that of {manifest.names[longer[0]]!r} with {len(spelled[longer[0]])}"
        )
        if len(longer) == len(spelled):
            raise UserError(f"{said}: raise task.max_target_size")
        logger.warning(f"{said}: left out")

    def _longest(self, manifest: Manifest, split: str, shortest: int, longest: int) -> int:
        """`longest`, or the samples of a batch; longer utterances are left out and named. Raises `UserError` if all are longer."""
        most = self.max_tokens(split) or longest
        kept = [i for i, samples in enumerate(manifest.samples) if shortest <= samples <= longest]
        beyond = [i for i in kept if manifest.samples[i] > most]
        if not beyond:
            return longest
        said = (
            f"{manifest.path}: {len(beyond)} of {len(kept)} utterances are longer than a batch may be (dataset.max_tokens={most} samples), "
            f"the first is {manifest.names[beyond[0]]!r} of {manifest.samples[beyond[0]]}"
        )
        if len(beyond) == len(kept):
            raise UserError(f"{said}: raise dataset.max_tokens")
        logger.warning(f"{said}: left out")
        return most

    def files(self, split: str) -> dict[str, Path | bytes]:
        """See `SafeTask`."""
        manifest = read_manifest(Path(self.cfg.data) / f"{split}.tsv")
        texts, _ = read_transcripts(manifest, Path(self.cfg.label_dir or self.cfg.data), self.cfg.labels)
        return {manifest.path.name: entries(manifest), f"text of {split}": "\n".join(texts).encode()}


def _alphabet(cfg: HubertEffFinetuningConfig) -> Alphabet:
    """The dictionary from `dict.<labels>.txt`, the pieces of a sentencepiece model, or the letters of the train split."""
    folder = Path(cfg.label_dir or cfg.data)
    pieces = Pieces.read(Path(cfg.sentencepiece)) if cfg.sentencepiece else None
    dictionary = folder / f"dict.{cfg.labels}.txt"
    more = [UNKNOWN] if cfg.unknown_symbol else []
    if dictionary.is_file():
        listed = checks.read_dictionary(dictionary)
        symbols = listed.symbols[listed.nspecial :]
        if pieces is not None and (foreign := [symbol for symbol in symbols if symbol not in set(pieces.symbols)]):
            raise UserError(
                f"task.sentencepiece={cfg.sentencepiece} does not fit {dictionary}: its {short(repr(foreign[0]), 40)} is not one of the "
                f"model's {len(pieces.symbols)} pieces; make the dictionary of that model, or leave it out"
            )
        with about(dictionary):
            return Alphabet([*symbols, *more], pieces)
    if pieces is not None:
        return Alphabet([*pieces.symbols, *more], pieces)
    manifest = read_manifest(Path(cfg.data) / f"{cfg.dictionary_split}.tsv")
    return Alphabet.of(read_transcripts(manifest, folder, cfg.labels)[0], cfg.unknown_symbol)
