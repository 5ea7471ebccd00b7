"""The two corpora of SUPERB's CTC tasks, as `s3prl.downstream.ctc.data` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

Item = tuple[str, list[int]]  # a recording's path, its tokens


class Transcribed(Dataset):  # type: ignore[type-arg]
    """Recordings with tokens, longest transcript first. With buckets, an item is the `bucket_size` neighbors that begin there."""

    def __init__(self, items: Sequence[tuple[Path, list[int]]], bucket_size: int) -> None:
        self.items: list[Item] = sorted(((str(path), tokens) for path, tokens in items), key=lambda item: (-len(item[1]), item[0]))
        self.bucket_size = bucket_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | list[Item]:
        if self.bucket_size == 1:
            return self.items[index]
        start = max(0, min(index, len(self.items) - self.bucket_size))
        return self.items[start : start + self.bucket_size]
