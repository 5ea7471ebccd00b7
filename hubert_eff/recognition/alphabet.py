"""Symbols and their numbers: single letters, or the pieces of a sentencepiece model."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from ..errors import UserError, short
from .pieces import SPACE, Pieces

BLANK = 0  # number of CTC's blank; symbols are numbered from 1
BOUNDARY = "|"  # between words, as in fairseq's .ltr files
UNKNOWN = "<unk>"  # stands for everything that the symbols cannot spell, if a dictionary has it
LONGEST_SYMBOL = 100  # characters


def normalize_text(text: str) -> str:
    """Normalize a transcript as in LibriSpeech: capitals, digits and apostrophes, single spaces between words, no other marks."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper())
    return " ".join(word for word in (w.strip("'") if set(w) == {"'"} else w for w in kept.split()) if word)


def _is_symbol(symbol: str) -> bool:
    """Whether it has characters, and none of them is a space, a control code or a lone surrogate."""
    return 0 < len(symbol) <= LONGEST_SYMBOL and not any(c.isspace() or unicodedata.category(c) in ("Cc", "Cs") for c in symbol)


class Alphabet:
    """The symbols of a model, in order; the first has number 1, after blank.

    They are letters, including the word boundary `|`, or, with `pieces`, those of a sentencepiece model, in which U+2581 begins a word.
    `<unk>` may be one of them; it stands for what the others cannot spell, which is an error without it.

    Attributes:
        symbols: the symbols in order.
        letters: the symbols as a text for configurations: one character each, or separated by spaces if one is longer.
        unknown: the number of `<unk>`, or None.
    """

    def __init__(self, symbols: str | Sequence[str], pieces: Pieces | None = None) -> None:
        split = symbols.split(" ") if isinstance(symbols, str) and " " in symbols else symbols
        self.symbols = tuple(split)
        if not self.symbols or not all(map(_is_symbol, self.symbols)) or len(set(self.symbols)) < len(self.symbols):
            raise UserError(
                f"an alphabet is distinct single characters, '{BOUNDARY}' between words, or the pieces of a sentencepiece model, not "
                f"{short(repr(' '.join(self.symbols)))}"
            )
        self.pieces = pieces
        longer = [symbol for symbol in self.symbols if len(symbol) > 1]
        if pieces is None and set(longer) - {UNKNOWN}:
            raise UserError(
                f"the dictionary has symbols of several characters, such as {short(longer[0], 40)!r}: give the sentencepiece model that "
                "made them (task.sentencepiece=FILE)"
            )
        self.letters = " ".join(self.symbols) if longer or pieces is not None else "".join(self.symbols)
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols, start=1)}
        self.unknown = self._numbers.get(UNKNOWN)

    def __len__(self) -> int:
        """The number of CTC's outputs: blank and symbols."""
        return 1 + len(self.symbols)

    @property
    def end(self) -> int:
        """The number for the end of a text, and for its start in the decoder's input; CTC does not have it."""
        return 1 + len(self.symbols)

    @classmethod
    def of(cls, texts: Iterable[str], unknown: bool = False) -> Alphabet:
        """The letters that occur in texts, after the word boundary, and before `<unk>` if that is wanted."""
        found = {c for text in texts for c in text} - {" ", BOUNDARY}
        return cls([BOUNDARY, *sorted(found), *([UNKNOWN] if unknown else [])])

    def spell(self, text: str, where: str = "the text") -> list[int]:
        """The numbers of a text with words split by spaces. Raises `UserError` for an empty text and for unknown characters."""
        words = " ".join(text.split())
        if not words:
            raise UserError(f"{where} is empty: there is nothing to spell")
        spelled: Sequence[str] = words.replace(" ", BOUNDARY) if self.pieces is None else self.pieces.split(words)
        foreign = sorted(set(spelled) - set(self._numbers))
        if foreign and self.unknown is None:
            raise UserError(
                f"{where} has {foreign[0]!r}, which is not in the dictionary of {len(self.symbols)} "
                f"{'letters' if self.pieces is None else 'pieces'}: {short(self.letters)}"
            )
        return [self._numbers.get(symbol, self.unknown or BLANK) for symbol in spelled]

    def spell_any(self, text: str, where: str = "the text") -> list[int]:
        """Spell a text as people write it: normalize it first, in small letters if the alphabet has only these."""
        return self.spell(self.cased(normalize_text(text)), where)

    def cased(self, text: str) -> str:
        """The text, in small letters if the alphabet has only these."""
        return text.lower() if self.letters == self.letters.lower() != self.letters.upper() else text

    def text(self, numbers: Iterable[int]) -> str:
        """The text for numbers; blanks and ends are skipped."""
        between = BOUNDARY if self.pieces is None else SPACE
        return " ".join("".join(self.symbols[n - 1] for n in numbers if n not in (BLANK, self.end)).replace(between, " ").split())

    def spoken(self, number: int) -> tuple[str, bool]:
        """The text that a symbol adds to a word (empty for a mere boundary), and whether a word ends before it."""
        symbol = self.symbols[number - 1]
        if self.pieces is None:
            return ("", True) if symbol == BOUNDARY else (symbol, False)
        return symbol.replace(SPACE, ""), symbol.startswith(SPACE)


def frames_needed(numbers: Sequence[int]) -> int:
    """The number of frames that CTC needs for a text: one per letter, and a blank between equal ones (Graves et al. 2006, section 3)."""
    return len(numbers) + sum(a == b for a, b in zip(numbers, numbers[1:], strict=False))
