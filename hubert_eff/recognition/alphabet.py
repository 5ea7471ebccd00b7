"""Letters, their numbers, and texts made of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from ..errors import UserError, short

BLANK = 0  # of CTC; letters are numbered from 1
BOUNDARY = "|"  # between words, as in fairseq's .ltr files


def normalize_text(text: str) -> str:
    """A transcript as LibriSpeech has them: capitals, digits and apostrophes, one space between words, no other mark."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper())
    return " ".join(word for word in (w.strip("'") if set(w) == {"'"} else w for w in kept.split()) if word)


def _is_letter(letter: str) -> bool:
    """Whether it is one character that is no space, no control code and no half of a pair."""
    return len(letter) == 1 and not letter.isspace() and unicodedata.category(letter) not in ("Cc", "Cs")


class Alphabet:
    """The letters of a model, in order, the word boundary `|` among them: the first has number 1, after blank."""

    def __init__(self, letters: Sequence[str]) -> None:
        if not letters or not all(_is_letter(letter) for letter in letters) or len(set(letters)) != len(letters):
            raise UserError(f"an alphabet is distinct single characters, '{BOUNDARY}' between words, not {short(repr(''.join(letters)))}")
        self.letters = "".join(letters)
        self._numbers = {letter: number for number, letter in enumerate(letters, start=1)}

    def __len__(self) -> int:
        """Blank and letters: what CTC chooses from."""
        return 1 + len(self.letters)

    @property
    def end(self) -> int:
        """The end of a text, and in the decoder's input its start; CTC does not know it."""
        return 1 + len(self.letters)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Alphabet:
        """The letters that occur in some texts, the word boundary first."""
        found = {c for text in texts for c in text} - {" ", BOUNDARY}
        return cls([BOUNDARY, *sorted(found)])

    def spell(self, text: str, where: str = "the text") -> list[int]:
        """The numbers of a text, words split by spaces. Raises `UserError` for a character outside the alphabet, or no character."""
        spelled = " ".join(text.split()).replace(" ", BOUNDARY)
        foreign = sorted(set(spelled) - set(self._numbers))
        if foreign:
            raise UserError(f"{where} has {foreign[0]!r}, which is not in the dictionary of {len(self.letters)} letters: {self.letters}")
        if not spelled:
            raise UserError(f"{where} is empty: there is nothing to spell")
        return [self._numbers[c] for c in spelled]

    def spell_any(self, text: str, where: str = "the text") -> list[int]:
        """As `spell`, of a text as people write it: normalized first, in small letters where the alphabet has only these."""
        clean = normalize_text(text)
        return self.spell(clean.lower() if self.letters == self.letters.lower() else clean, where)

    def text(self, numbers: Iterable[int]) -> str:
        """The text of numbers; blanks and ends are passed over."""
        return " ".join("".join(self.letters[n - 1] for n in numbers if n not in (BLANK, self.end)).replace(BOUNDARY, " ").split())


def frames_needed(numbers: Sequence[int]) -> int:
    """Frames that CTC needs for a text: one per letter, and a blank between two equal ones (Graves et al. 2006, section 3)."""
    return len(numbers) + sum(a == b for a, b in zip(numbers, numbers[1:], strict=False))
