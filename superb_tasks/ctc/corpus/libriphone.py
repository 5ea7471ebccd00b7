"""LibriSpeech as phones: each word by its first pronunciation in the lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superb_tasks.data import layouts

from . import Transcribed


class LibriPhoneDataset(Transcribed):
    """`splits` of the LibriSpeech at `path`; `tokenizer` turns phones with spaces between them into tokens."""

    def __init__(self, splits: Sequence[str], tokenizer: Any, bucket_size: int, path: str, lexicon: Sequence[str], **_: Any) -> None:
        phones = layouts.lexicon(map(Path, lexicon))
        super().__init__(
            [
                (recording, tokenizer.encode(" ".join(phone for word in words.split() for phone in phones[word])))
                for split in splits
                for recording, words in layouts.librispeech(Path(path) / split).items()
            ],
            bucket_size,
        )
