"""Audio SNIPS as characters and slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superb_tasks.data import layouts

from . import Transcribed


class SnipsDataset(Transcribed):
    """`splits` (folders) of the Audio SNIPS at `path`, of the speakers that belong to them."""

    def __init__(self, splits: Sequence[str], tokenizer: Any, bucket_size: int, path: str, **corpus: Any) -> None:
        transcripts = layouts.snips(Path(path))
        super().__init__(
            [
                (recording, tokenizer.encode(transcripts[recording.stem]))
                for split in splits
                for recording in (Path(path) / split).rglob("*.wav")
                if recording.stem in transcripts and recording.stem.split("-")[0] in corpus[f"{split}_speakers"]
            ],
            bucket_size,
        )
