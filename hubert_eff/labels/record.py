"""labels.json: how the labels of a folder were made, and of what; labels are used with what they were made of, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.lines import read_json, shown, value_shown
from ..data.tsv import Manifest
from ..errors import UserError
from .classes import Labels

RECORD = "labels.json"
HINT = "make the labels again with `hubert-eff labels`"
MOST_CLUSTERS = 1_000_000


@dataclass(frozen=True)
class Record:
    """What labels.json says, as far as it says it: labels per second, clusters, source, folder of the manifests, figures of each split."""

    file: Path
    rate: float | None
    clusters: int | None
    source: str
    manifest: str | None
    splits: dict[str, dict[str, Any]]

    def check_manifest(self, table: Manifest) -> None:
        """Raise `UserError` if the labels of a split are of another manifest, or of recordings that have changed since."""
        figures = self.splits.get(table.path.stem, {})
        if figures.get("tsv_sha256", table.digest) == table.digest:
            return
        # another root, as of a corpus that was moved, or other line ends
        if "content_sha256" not in figures or figures["content_sha256"] != table.content_digest():
            raise UserError(
                f"the labels of {table.path.stem} in {self.file.parent} are not of {table.path}: {self.file.name} holds the digest of "
                f"another. Make them again (hubert-eff labels {table.path.parent} --out {self.file.parent} ...); if you cut both files "
                f"yourself, remove {self.file}"
            )

    def check_labels(self, split: str, labels: Labels, classes: int) -> None:
        """Raise `UserError` if a file of labels, or a dictionary of so many classes, is not the one that was made."""
        if self.splits.get(split, {}).get("km_sha256", labels.digest) != labels.digest:
            raise UserError(f"{labels.file} is not what {self.file} is about: {HINT}; if you changed it yourself, remove {self.file}")
        if self.clusters not in (None, classes):
            raise UserError(f"{self.file} is of {self.clusters} clusters, the dictionary beside it has {classes} classes: {HINT}")


def read_record(folder: Path) -> Record | None:
    """The record of a folder of labels; None where there is none, as of labels that another program made.

    Raises `UserError` for what is no such record, and for labels whose making was interrupted as they were put in place.
    """
    file = folder / RECORD
    if not file.exists():
        if next(folder.glob(f".labels-*/{RECORD}"), None):
            raise UserError(f"the making of the labels in {folder} was interrupted at its very end: run the same `hubert-eff labels` again")
        return None
    content = read_json(file, HINT)
    rate, clusters, source, manifest, splits = (content.get(key) for key in ("rate", "k", "source", "manifest", "splits"))
    if not (rate is None or _is_number(rate) and 0 < rate < 1e6):
        raise UserError(f"{file}: rate is not a number of labels per second but {value_shown(rate)}: {HINT}")
    if not (clusters is None or _is_number(clusters) and isinstance(clusters, int) and 0 < clusters <= MOST_CLUSTERS):
        raise UserError(f"{file}: k is not a number of clusters but {value_shown(clusters)}: {HINT}")
    found = dict.fromkeys(splits, {}) if isinstance(splits, list) and all(isinstance(name, str) for name in splits) else splits or {}
    if not isinstance(found, dict) or not all(isinstance(f, dict) and name == Path(name).name for name, f in found.items()):
        raise UserError(f"{file}: splits are not names of splits with their figures: {HINT}")
    return Record(
        file,
        None if rate is None else float(rate),
        clusters,
        shown(source) if isinstance(source, str) else "an unnamed source",
        manifest if isinstance(manifest, str) else None,
        found,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
