"""Audio and labels for pre-training: fairseq's HubertDataset, made reproducible and safe to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset, HubertDataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from hubert_eff.config import FRAME_STRIDE, LOUDEST
from hubert_eff.data.tsv import Manifest
from hubert_eff.errors import UserError
from hubert_eff.labels.classes import Labels

from .buckets import Buckets

LAST_FRAME = 400  # samples that the extractor needs for its last frame: 25 ms


def obey_parent_only() -> None:
    """Make a loading process end on a SIGTERM of the training process and ignore all others.

    Clusters and `kill` on a group send SIGTERM to all processes at once. If the loading processes ended, the training process would fail
    for lack of data before it could save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit this

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def read_checked(read: Callable[[], Tensor], file: str, samples: int) -> Tensor | str:
    """The audio (S,) that `read` returns, or a message: the file cannot be read, has another length, or is not finite or not audio.

    The message is returned, not raised, because an error of a loading process reaches the training process as the text of a traceback.
    """
    try:
        wav = read()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        return f"{file} cannot be read as audio ({' '.join(str(error).split())})"
    if len(wav) != samples:
        return f"{file} has {len(wav)} samples, not {samples} as its manifest says"
    return wav if bool((wav.abs() <= LOUDEST).all()) else f"{file} holds samples that are not finite or not audio"


def crop_start(seed: int, epoch: int, utterance: int, spare: int) -> int:
    """The first sample of an utterance's crop, which leaves out `spare` samples, in an epoch: from 0 to `spare`."""
    return int(np.random.default_rng((seed, epoch, utterance)).integers(spare + 1))


class EqualLengths:
    """A mix-in for fairseq datasets: with `equal_lengths`, only utterances of one length share a batch, and none is padded.

    It is for validation of a model whose extractor also takes statistics over padding: its figures then do not depend on the batch.
    """

    equal_lengths = False

    def batch_by_size(self, indices: np.ndarray, **limits: Any) -> list[Sequence[int]]:
        """Batches of `indices` within fairseq's limits on them."""
        cut = super().batch_by_size  # type: ignore[misc]
        if not self.equal_lengths:
            return list(cut(indices, **limits))
        changes = np.flatnonzero(np.diff([self.used(i) for i in indices])) + 1
        return [batch for part in np.split(indices, changes) for batch in cut(part, **limits)]

    def used(self, index: int) -> int:
        """Number of samples of an utterance in a batch of its own."""
        raise NotImplementedError


class SeededHubertDataset(EqualLengths, HubertDataset):
    """`HubertDataset` whose batches depend only on (seed, epoch, utterances), and crops on (seed, epoch, utterance) each.

    A resumed run repeats them. Without padding, the length of a crop is that of the batch's shortest utterance. An utterance longer than
    `max_tokens`, which no batch can hold, is cropped to it.

    It reads the checked manifest and labels itself instead of letting fairseq read them: other rules for line ends would give utterances
    the labels of others.

    Batches have `net_input["sample_ids"]` (B,), the numbers of the utterances, which seed their masks. If a file cannot be read, or its
    labels have changed since they were checked, the batch lacks it and has messages under `unreadable` or `changed`, and nothing else if no
    file is left.
    """

    def __init__(
        self,
        manifest: Manifest,
        labels: Sequence[Labels],
        sample_rate: float,
        label_rate: float,
        pad_list: list[int],
        eos_list: list[int],
        label_processors: list[Any],
        seed: int,
        max_keep_sample_size: int | None = None,
        min_keep_sample_size: int | None = None,
        max_sample_size: int | None = None,
        shuffle: bool = True,
        pad_audio: bool = False,
        normalize: bool = False,
        random_crop: bool = False,
        length_buckets: int = 0,
        max_tokens: int | None = None,
        equal_lengths: bool = False,
    ) -> None:
        FairseqDataset.__init__(self)  # HubertDataset's own would read the files
        least, most = min_keep_sample_size or 0, max_keep_sample_size or sys.maxsize
        self.kept = [i for i, samples in enumerate(manifest.samples) if least <= samples <= most]
        self.audio_root = str(manifest.root)
        self.audio_names = [manifest.names[i] for i in self.kept]
        self.sizes = [manifest.samples[i] for i in self.kept]
        self.labels, self.num_labels = list(labels), len(labels)
        self.sample_rate, self.label_rates = sample_rate, [label_rate] * len(labels)
        self.pad_list, self.eos_list, self.label_processors = pad_list, eos_list, label_processors
        self.max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self.max_sample_size = self.max_tokens if max_sample_size is None else min(max_sample_size, self.max_tokens)
        self.shuffle, self.random_crop, self.single_target = shuffle, random_crop, False
        self.pad_audio, self.normalize = pad_audio, normalize
        self.seed, self.equal_lengths = seed, equal_lengths
        self.buckets = Buckets(self.sizes, length_buckets, self.max_sample_size, self.pad_audio) if length_buckets else None
        # shared, because fairseq keeps the loading processes, and thereby their copies of this object, over all epochs
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

        self._shielded = False

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, including running loading processes, which epoch comes next."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self._shielded and get_worker_info() is not None:
            obey_parent_only()
            self._shielded = True
        file = os.path.join(self.audio_root, self.audio_names[index])
        wav = read_checked(lambda: self.get_audio(index), file, self.sizes[index])
        if isinstance(wav, str):
            return {"id": index, "source": None, "unreadable": wav}
        try:
            return {"id": index, "source": wav, "label_list": self.get_labels(index)}
        except UserError as error:
            return {"id": index, "source": None, "changed": str(error)}

    def get_label(self, index: int, label_idx: int) -> Tensor:
        """Labels (T,) of an utterance as numbers of the dictionary. Raises `UserError` if they have changed since they were checked."""
        return self.label_processors[label_idx](self.labels[label_idx].line(self.kept[index]))

    def postprocess(self, wav: Tensor, cur_sample_rate: int) -> Tensor:
        """Process as fairseq does: mono (S,), normalized if the task says so. Raises `ValueError` for silence or NaN in the result."""
        if not bool((wav.abs() <= LOUDEST).all()):  # also of NaN
            raise ValueError("it holds samples that are not finite or not audio: make the manifest again")
        return super().postprocess(wav, cur_sample_rate)

    def ordered_indices(self) -> np.ndarray:
        """Longest first, ties in random order, and the same in all epochs, so that a run resumed later forms the same batches."""
        if not self.shuffle:
            return super().ordered_indices()
        ties = np.random.default_rng(self.seed).permutation(len(self))
        return np.lexsort((ties, np.asarray(self.sizes)))[::-1]

    def size(self, index: int) -> int:
        """Samples of an utterance that `dataset.max_tokens` counts; all samples of one that is cropped in a padded batch."""
        return min(super().size(index), self.max_tokens) if self.buckets is None else self.buckets.length(self.sizes[index])

    def used(self, index: int) -> int:
        """See `EqualLengths`."""
        return min(self.sizes[index], self.max_sample_size)

    def collater_audio(self, audios: list[Tensor], audio_size: int) -> tuple[Tensor, Tensor, list[int]]:
        """Audio (B, S), padding (B, S) and where crops start; S is the length of a bucket, if there are any."""
        return super().collater_audio(audios, audio_size if self.buckets is None else self.buckets.length(audio_size))

    def collater_frm_label(
        self, targets: list[Tensor], audio_size: int, audio_starts: list[int], label_rate: float, pad: int
    ) -> tuple[Tensor, Tensor, int]:
        """Labels (B, T'), lengths (B,) and their sum; where audio is padded to a bucket, labels are too."""
        if self.buckets is None:
            return super().collater_frm_label(targets, audio_size, audio_starts, label_rate, pad)
        length = self.buckets.length(audio_size)
        labels, lengths, count = super().collater_frm_label(targets, length, audio_starts, label_rate, pad)
        missing = round(length * label_rate / self.sample_rate) - labels.size(1) if self.pad_audio else 0
        return F.pad(labels, (0, missing), value=pad), lengths, count

    def _cropped(self, sample: dict[str, Any], size: int) -> dict[str, Any]:
        """An utterance with at most `size` samples, and without the labels before them."""
        spare = len(sample["source"]) - size
        if spare <= 0:
            return sample
        start = crop_start(self.seed, int(self._epoch), sample["id"], spare) if self.random_crop else 0
        labels = [of_one[round(start * rate / self.sample_rate) :] for of_one, rate in zip(sample["label_list"], self.label_rates)]
        return {**sample, "source": sample["source"][start : start + size], "label_list": labels}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of audio (B, S), padding (B, S) and labels, cropped to its shortest utterance or, if it is padded, to `max_sample_size`."""
        read = [sample for sample in samples if sample["source"] is not None]
        if read:
            size = min((max if self.pad_audio else min)(len(sample["source"]) for sample in read), self.max_sample_size)
            size = size if self.buckets is None else self.buckets.length(size)
            read = [self._cropped(sample, size) for sample in read]
        batch = super().collater(read)
        if batch:
            batch["net_input"]["sample_ids"] = batch["id"]
            if self.buckets is not None and not self.pad_audio:
                batch["net_input"]["padding_mask"] = None  # nothing is padded, and attention without a mask is faster on a GPU
            if self.pad_audio:
                self._pad_unlabelled(batch["net_input"]["padding_mask"], batch["target_lengths_list"])
        for fault in ("unreadable", "changed"):
            if lines := [sample[fault] for sample in samples if fault in sample]:
                batch[fault] = lines
        return batch

    def _pad_unlabelled(self, padding_mask: Tensor, lengths: list[Tensor]) -> None:
        """Mark audio beyond a row's labels as padding, in place. padding_mask (B, S), lengths (B,) per codebook.

        fairseq rounds the start of a crop to a label, so that the last frame of a crop from an utterance's end may have none;
        it would be trained on the <pad> that fills the row.
        """
        ratios = (round(rate * FRAME_STRIDE / self.sample_rate) for rate in self.label_rates)  # labels per frame
        labeled = torch.stack([-(-n // ratio) for n, ratio in zip(lengths, ratios)]).amin(0)  # frames, (B,)
        for row, frames in zip(padding_mask, labeled.tolist()):
            if int((~row).sum()) >= (frames + 1) * FRAME_STRIDE:  # the audio may hold one more frame
                row[max(frames - 1, 0) * FRAME_STRIDE + (LAST_FRAME if frames else 0) :] = True
