"""Word and character error rates with their components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import missing_extra


@dataclass(frozen=True)
class Errors:
    """Errors in the best alignment of texts with transcripts, in words or characters; `total` counts those of the transcripts."""

    substitutions: int
    deletions: int
    insertions: int
    total: int

    @property
    def count(self) -> int:
        """The number of all errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors in % of the transcripts; insertions may bring it above 100."""
        return 100.0 * self.count / max(self.total, 1)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"rate": round(self.rate, 3), **asdict(self)}


@dataclass(frozen=True)
class Score:
    """Errors in words (WER) and in characters, including spaces between words (CER)."""

    words: Errors
    characters: Errors

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"wer": self.words.plain(), "cer": self.characters.plain()}


def score(said: Sequence[str], heard: Sequence[str]) -> Score:
    """Count the errors of all texts together with jiwer. Raises `UserError` if that is not installed."""
    try:
        import jiwer
    except ImportError as error:
        raise missing_extra("jiwer", "text", "a word error rate") from error
    words, characters = jiwer.process_words(list(said), list(heard)), jiwer.process_characters(list(said), list(heard))
    return Score(*(Errors(x.substitutions, x.deletions, x.insertions, x.hits + x.substitutions + x.deletions) for x in (words, characters)))
