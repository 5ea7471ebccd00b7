"""Audio and labels for pre-training: fairseq's HubertDataset, reproducible and safe to stop."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import torch
from fairseq.data import HubertDataset, data_utils
from torch.utils.data import get_worker_info


class SeededHubertDataset(HubertDataset):
    """`HubertDataset` whose batches and crops depend only on (seed, epoch, utterances), so that a resumed run repeats them.

    Batches carry `net_input["sample_ids"]` (B,), the utterances' numbers, which seed their masks.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        # shared, because fairseq keeps the loading processes, and thereby their copies of this object, over all epochs
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, also in loading processes that run already, which epoch comes next."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None:
            # a SIGTERM to the process group is for the training process: it saves, then ends its loading processes
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super().__getitem__(index)

    def ordered_indices(self) -> np.ndarray:
        """Longest first, ties in random order. Unlike fairseq's it is the same in every epoch: a run resumed later cuts the same batches."""
        if not self.shuffle:
            return super().ordered_indices()
        ties = np.random.default_rng(self.seed).permutation(len(self))
        return np.lexsort([ties, self.sizes])[::-1]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of audio (B, S), padding (B, S) and labels; crops are drawn from (seed, epoch, utterances)."""
        with data_utils.numpy_seed(self.seed, int(self._epoch), *(sample["id"] for sample in samples)):
            batch = super().collater(samples)
        if batch:
            batch["net_input"]["sample_ids"] = batch["id"]
        return batch
