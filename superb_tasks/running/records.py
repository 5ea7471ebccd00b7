"""Records of a run: settings and results as JSON, digests, S3PRL's files of predictions and truth."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError

from ..data.generators.common import RECORD


def truth(folders: Sequence[Path]) -> dict[str, Any]:
    """Utterances of the test set, and the share of the largest class if there are classes, from S3PRL's own files."""
    lines = [
        line.split(" " if file.suffix == ".txt" else ",", 1)[-1]
        for folder in folders
        for file in sorted(folder.glob("test_*truth.*"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    if lines:
        return {"utterances": len(lines), "chance": max(Counter(lines).values()) / len(lines)}
    transcribed = [file for folder in folders for file in folder.glob("test*-ref.ark")]
    return {"utterances": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in transcribed)} if transcribed else {}


def generated(data: Path, folder: str) -> bool:
    """Whether a data set was made by `hubert-eff corpus superb`, which keeps a record beside it."""
    return folder in read(data / RECORD)


def check_folder(out: Path) -> None:
    """Raise `UserError` if a folder holds files that no run of ours wrote."""
    if out.is_dir() and any(out.iterdir()) and not (out / "settings.json").is_file():
        raise UserError(f"{out} holds other files: choose a new folder for the run")


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}
