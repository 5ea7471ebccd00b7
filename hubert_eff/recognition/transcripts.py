"""Reads the transcripts of a manifest's utterances from fairseq's files of symbols or from `parts.tsv`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..data.lines import read_lines, shown
from ..data.tsv import Manifest, read_parts
from ..errors import UserError
from .alphabet import BOUNDARY, normalize_text
from .pieces import SPACE


def read_transcripts(manifest: Manifest, label_dir: Path, labels: str) -> tuple[list[str], Path]:
    """Read the text of every utterance, with words split by spaces, and the file that they come from.

    `SPLIT.<labels>` in `label_dir`, a line per utterance of letters split by spaces with `|` between words, as fairseq has it, or of
    sentencepiece's pieces, is taken as it stands; else the transcripts of `parts.tsv` beside the manifest, normalized. Raises
    `UserError` where one is missing.
    """
    spelled, table = label_dir / f"{manifest.path.stem}.{labels}", manifest.path.with_name("parts.tsv")
    known = _texts_of(table, manifest) if table.is_file() else [None] * len(manifest.names)
    if spelled.is_file():
        texts = [_spelled(line, f"{spelled}, line {number}") for number, line in read_lines(spelled, "make it again")]
        if len(texts) != len(manifest.names):
            raise UserError(f"{spelled} has {len(texts)} lines for the {len(manifest.names)} utterances of {manifest.path}")
        _check_order(texts, known, spelled, manifest)
        return texts, spelled
    if not table.is_file():
        raise UserError(f"no transcripts: neither {spelled} nor {table}, which `hubert-eff manifest` writes")
    for name, text in zip(manifest.names, known):
        if text is None:
            raise UserError(
                f"{table} has no transcript of {name}: give one, in UTF-8, beside the recording (transcripts.tsv), or leave it out"
            )
    return [text or "" for text in known], table


def _texts_of(table: Path, manifest: Manifest) -> list[str | None]:
    """The normalized transcripts of `parts.tsv`; None for an utterance with a part that has none."""
    parts: dict[str, list[str]] = defaultdict(list)
    for _, row in read_parts(table, ("utterance", "transcript")):
        parts[row["utterance"]].append(row["transcript"])
    return [
        normalize_text(" ".join(parts[name])) if all(part.strip() for part in parts.get(name, [""])) else None for name in manifest.names
    ]


def _check_order(texts: Sequence[str], known: Sequence[str | None], file: Path, manifest: Manifest) -> None:
    """Raise `UserError` if most lines are the transcripts of other utterances, as with another manifest or order."""
    places = {text: place for place, text in enumerate(known) if text}
    said = [normalize_text(text) for text in texts]
    moved = [i for i, (text, right) in enumerate(zip(said, known)) if right and text != right and text in places]
    if 2 * len(moved) > len(texts):
        line, other = moved[0], manifest.names[places[said[moved[0]]]]
        raise UserError(
            f"{file}, line {line + 1}, is the transcript of {other}, not of {manifest.names[line]}, and most lines are like that: make the "
            f"file again, in the order of {manifest.path}"
        )


def _spelled(line: str, where: str) -> str:
    """The words of a line of letters, or of sentencepiece's pieces."""
    letters = line.split()
    if SPACE in line:
        return "".join(letters).replace(SPACE, " ").strip()
    if any(len(letter) > 1 for letter in letters):
        longest = max(letters, key=len)
        raise UserError(f"{where}: expected letters with spaces between them, and {BOUNDARY} between words, found {shown(longest, 20)!r}")
    return "".join(letters).replace(BOUNDARY, " ").strip()
