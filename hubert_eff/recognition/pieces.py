"""sentencepiece models, which split texts into symbols of several characters, in a form that checkpoints hold."""

from __future__ import annotations

import base64
import binascii
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_extra, short

SPACE = "\u2581"  # begins a word in a piece
LARGEST = 1 << 26  # bytes of a model


class Pieces:
    """A sentencepiece model as a text, `packed`, that a configuration can hold; it is read when a text is first split.

    Turning numbers into texts needs neither the model nor the package.
    """

    def __init__(self, packed: str) -> None:
        self.packed = packed

    @classmethod
    def read(cls, file: Path) -> Pieces:
        """Read a .model file. Raises `UserError` for other files and for models that spell by bytes."""
        if not file.is_file():
            raise UserError(f"no sentencepiece model at {file}")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})") from error
        pieces = cls(base64.b64encode(zlib.compress(content, 9)).decode())
        pieces._processor_of(content, str(file))
        return pieces

    @cached_property
    def _processor(self) -> Any:
        try:
            unpack = zlib.decompressobj()
            content = unpack.decompress(base64.b64decode(self.packed, validate=True), LARGEST)
            if not unpack.eof:
                raise ValueError("it is cut off, or too large")
        except (ValueError, zlib.error, binascii.Error) as error:
            raise UserError(f"the sentencepiece model of this checkpoint cannot be read ({short(error)})") from error
        return self._processor_of(content, "the sentencepiece model of this checkpoint")

    @staticmethod
    def _processor_of(content: bytes, where: str) -> Any:
        try:
            import sentencepiece
        except ImportError as error:
            raise missing_extra("sentencepiece", "text", "splitting texts into pieces") from error
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(content) and processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{where} is not a sentencepiece model") from error
        if not loaded or not processor.GetPieceSize():
            raise UserError(f"{where} is not a sentencepiece model")
        if any(processor.IsByte(i) for i in range(processor.GetPieceSize())):
            raise UserError(f"{where} spells unknown characters by bytes: train it without byte_fallback")
        return processor

    @property
    def symbols(self) -> list[str]:
        """The pieces in texts, in order: all except `<unk>` and control symbols."""
        processor = self._processor
        numbers = range(processor.GetPieceSize())
        return [
            processor.IdToPiece(i) for i in numbers if not (processor.IsUnknown(i) or processor.IsControl(i) or processor.IsUnused(i))
        ]  # fmt: skip

    def split(self, text: str) -> list[str]:
        """Split a text into pieces; characters that no piece covers stay as they are."""
        return list(self._processor.EncodeAsPieces(text))
