"""Word and character error rates, with what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import missing_extra


@dataclass(frozen=True)
class Errors:
    """Errors of the best alignment of texts with what was said, in words or characters; `total` is how many were said."""

    substitutions: int
    deletions: int
    insertions: int
    total: int

    @property
    def count(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors in % of what was said; above 100 where more was inserted."""
        return 100.0 * self.count / max(self.total, 1)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"rate": round(self.rate, 3), **asdict(self)}


@dataclass(frozen=True)
class Score:
    """Errors in words (WER) and in characters, spaces between words among them (CER)."""

    words: Errors
    characters: Errors

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"wer": self.words.plain(), "cer": self.characters.plain()}


def score(said: Sequence[str], heard: Sequence[str]) -> Score:
    """The errors of texts, all together, by jiwer. Raises `UserError` where it is not installed."""
    try:
        import jiwer
    except ImportError as error:
        raise missing_extra("jiwer", "text", "a word error rate") from error
    words, characters = jiwer.process_words(list(said), list(heard)), jiwer.process_characters(list(said), list(heard))
    return Score(*(Errors(x.substitutions, x.deletions, x.insertions, x.hits + x.substitutions + x.deletions) for x in (words, characters)))
