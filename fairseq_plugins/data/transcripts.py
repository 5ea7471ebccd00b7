"""Recordings with transcripts for fine-tuning, checked before the first update, in batches that a resumed run repeats."""

# B batch, S samples, U letters

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset, data_utils
from fairseq.data.audio.audio_utils import get_features_or_waveform
from torch import Tensor
from torch.utils.data import get_worker_info

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.tsv import Manifest
from hubert_eff.errors import UserError
from hubert_eff.recognition.alphabet import BLANK, Alphabet, frames_needed
from hubert_eff.recognition.model import too_long

from .dataset import EqualLengths, obey_parent_only, read_checked


def check_transcripts(
    texts: Sequence[str], source: Path, manifest: Manifest, alphabet: Alphabet, num_frames: Any, speed: float, shortest: int, longest: int
) -> list[list[int]]:
    """Convert texts to numbers. Raises `UserError` for a letter outside the dictionary, or a text too long for the audio at `speed`.

    num_frames: number of frames of so many samples; None if no CTC layer learns, so that a text may be longer.
    """
    spelled = []
    for text, name, samples in zip(texts, manifest.names, manifest.samples):
        where = f"{source}: the transcript of {name}"
        numbers = alphabet.spell(text, where)
        frames = 0 if num_frames is None else num_frames(int(samples / speed))
        if num_frames is not None and frames_needed(numbers) > frames and shortest <= samples <= longest:
            raise UserError(too_long(where + (f" at speed {speed:g}" if speed > 1 else ""), numbers, frames))
        spelled.append(numbers)
    return spelled


def at_speed(wav: Tensor, factor: float) -> Tensor:
    """Play a recording (S,) faster by `factor`, including its pitch, by resampling (Ko et al. 2015): about S / factor samples."""
    if factor == 1.0:
        return wav
    from torchaudio.functional import resample

    return resample(wav, round(SAMPLE_RATE * factor), SAMPLE_RATE)


class TranscribedDataset(EqualLengths, FairseqDataset):
    """Utterances of `shortest` to `longest` samples and at most `most_symbols` symbols.

    Each epoch they are played at a speed drawn from `speeds` by (seed, epoch, utterance).

    Batches: `id` (B,), `net_input` of `source` (B, S), `padding_mask` (B, S), `sample_ids`, `targets` (B, U) and `target_lengths` (B,);
    `unreadable` as in `SeededHubertDataset`.
    """

    def __init__(
        self, manifest: Manifest, spelled: list[list[int]], speeds: Sequence[float], shortest: int, longest: int, seed: int, shuffle: bool,
        most_symbols: int | None = None,
    ) -> None:  # fmt: skip
        kept = [i for i, samples in enumerate(manifest.samples) if shortest <= samples <= longest]
        self.kept = [i for i in kept if most_symbols is None or len(spelled[i]) <= most_symbols]
        self.manifest, self.spelled, self.speeds = manifest, spelled, tuple(speeds)
        self.sizes = np.array([manifest.samples[i] for i in self.kept])
        self.seed, self.shuffle = seed, shuffle
        # shared, because fairseq keeps the loading processes, and thereby their copies of this object, over all epochs
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._shielded = False

    def __len__(self) -> int:
        return len(self.kept)

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, also in loading processes that run already, which epoch comes next."""
        self._epoch.fill_(epoch)

    def size(self, index: int) -> int:
        """Samples of an utterance."""
        return int(self.sizes[index])

    num_tokens = used = size

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Samples of utterances."""
        return self.sizes[indices]

    def ordered_indices(self) -> np.ndarray:
        """Longest first, ties in random order; the same in all epochs, so that a run resumed in a later one forms the same batches."""
        if not self.shuffle:
            return np.arange(len(self))
        return np.lexsort([np.random.default_rng(self.seed).permutation(len(self)), self.sizes])[::-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self._shielded and get_worker_info() is not None:
            obey_parent_only()
            self._shielded = True
        number = self.kept[index]
        path = str(self.manifest.root / self.manifest.names[number])
        wav = read_checked(lambda: torch.from_numpy(get_features_or_waveform(path, need_waveform=True)).float(), path, self.size(index))
        if isinstance(wav, str):
            return {"id": index, "source": None, "unreadable": wav}
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        return {"id": index, "source": at_speed(wav, float(rng.choice(self.speeds))), "target": self.spelled[number]}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, padded on the right."""
        faults = [s["unreadable"] for s in samples if s["source"] is None]
        batch = self._collate([s for s in samples if s["source"] is not None])
        return {**batch, "unreadable": faults} if faults else batch

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if not samples:
            return {}
        lengths = torch.tensor([len(s["source"]) for s in samples])
        padding = torch.arange(int(lengths.max()))[None] >= lengths[:, None]
        ids = torch.tensor([s["id"] for s in samples])
        targets = [torch.tensor(s["target"]) for s in samples]
        return {
            "id": ids,
            "net_input": {
                "source": torch.nn.utils.rnn.pad_sequence([s["source"] for s in samples], batch_first=True),
                "padding_mask": padding,
                "sample_ids": ids,
            },
            "targets": data_utils.collate_tokens(targets, BLANK),
            "target_lengths": torch.tensor([len(t) for t in targets]),
        }
