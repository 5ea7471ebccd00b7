"""Measures error rates of a recognizer on a manifest for every search and streaming mode, with real-time factors."""

# T frames, D model dim

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import SAMPLE_RATE
from ..data.tsv import Manifest
from ..errors import UserError
from ..streaming.stream import mode_seconds, parse_mode
from ..utils.progress import progress
from .model import Recognizer
from .recordings import read_recording
from .scoring import Score, score
from .search import check_search, decode

GROUP = 300.0  # seconds of audio whose encoder outputs are in memory together


@dataclass
class Row:
    """Texts of all utterances by one search in one mode, and the seconds that encoder and search took."""

    search: str
    mode: str
    texts: list[str] = field(default_factory=list)
    compute: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The transcripts, the recognized texts of each search and mode, and the length of the audio in seconds."""

    names: list[str]
    said: list[str]
    rows: list[Row]
    seconds: float

    def scores(self) -> list[Score]:
        """The errors of each row."""
        return [score(self.said, row.texts) for row in self.rows]

    def rtf(self, row: Row) -> float:
        """Real-time factor: computing time over audio time."""
        return row.compute / self.seconds

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ways = [
            {"search": row.search, "mode": row.mode, **errors.plain(), "rtf": round(self.rtf(row), 4)}
            for row, errors in zip(self.rows, self.scores(), strict=True)
        ]
        heard = [
            {"audio": name, "said": text, "heard": {f"{row.search} {row.mode}": row.texts[i] for row in self.rows}}
            for i, (name, text) in enumerate(zip(self.names, self.said, strict=True))
        ]
        return {"utterances": len(self.said), "seconds": round(self.seconds, 2), "ways": ways, "recordings": heard}


def evaluate(
    model: Recognizer, manifest: Manifest, said: Sequence[str], searches: Sequence[str], modes: Sequence[str], beam: int = 10,
    ctc_weight: float = 0.5, length_penalty: float = 0.0,
) -> Evaluation:  # fmt: skip
    """Hear all utterances of a manifest in every mode (`streaming.stream.parse_mode`), and search each in every way.

    said: their transcripts, in the letters of the model. The encoder hears one recording at a time, so that no figure depends on its
    neighbors. Raises `UserError` for searches and modes that the model cannot do, before any work, and for recordings that cannot be used.
    """
    for search in searches:
        check_search(model, search, beam, ctc_weight, length_penalty)
    chunks = {mode: parse_mode(mode) for mode in modes}
    for size, left in chunks.values():
        model.hubert.chunks(size, left)
    rows = [Row(search, mode) for mode in modes for search in searches]
    seconds = 0.0
    with progress("recordings", len(said)) as advance, torch.inference_mode():
        for group in _groups(manifest, len(said)):
            wavs = [_read(model, manifest, i) for i in group]
            seconds += sum(wav.size(1) for wav in wavs) / SAMPLE_RATE
            for mode, (size, left) in chunks.items():
                begin = time.perf_counter()
                encoded = [model.encode(wav, chunk_size=size, left_chunks=left)[0][0] for wav in wavs]
                took = time.perf_counter() - begin
                for row in rows:
                    if row.mode == mode:
                        begin = time.perf_counter()
                        row.texts += [texts[0].text for texts in decode(model, encoded, row.search, beam, ctc_weight, length_penalty)]
                        row.compute += took + time.perf_counter() - begin
            advance(len(group))
    return Evaluation(manifest.names[: len(said)], list(said), rows, seconds)


def _groups(manifest: Manifest, count: int) -> Iterator[list[int]]:
    """Numbers of utterances in order, about `GROUP` seconds together."""
    group: list[int] = []
    samples = 0
    for number, length in enumerate(manifest.samples[:count]):
        if group and samples + length > GROUP * SAMPLE_RATE:
            yield group
            group, samples = [], 0
        group.append(number)
        samples += length
    if group:
        yield group


def _read(model: Recognizer, manifest: Manifest, number: int) -> Tensor:
    file = manifest.root / manifest.names[number]
    wav = read_recording(file)
    if not model.hubert.num_frames(wav.size(1)):
        raise UserError(f"{file}: {wav.size(1)} samples are too few for one frame: leave it out of {manifest.path}")
    return wav


def table(found: Evaluation) -> str:
    """The rows as text: word and character error rates with what they are made of, and real-time factors."""
    lines = [
        f"{'search':10} {'mode':8}{'WER %':>7}{'sub':>6}{'del':>6}{'ins':>6}   {'CER %':>7}{'sub':>6}{'del':>6}{'ins':>6}   {'RTF':>7}"
    ]
    for row, errors in zip(found.rows, found.scores(), strict=True):
        cells = "   ".join(f"{x.rate:7.1f}{x.substitutions:6}{x.deletions:6}{x.insertions:6}" for x in (errors.words, errors.characters))
        lines.append(f"{row.search:10} {row.mode:8}{cells}   {found.rtf(row):7.3f}")
    words, characters = found.scores()[0].words.total, found.scores()[0].characters.total
    lines.append(f"{len(found.said)} utterances, {words} words, {characters} characters, {found.seconds:.1f} s")
    lines.append("; ".join(f"{mode}: {mode_seconds(mode)}" for mode in dict.fromkeys(row.mode for row in found.rows)))
    return "\n".join(lines)
