"""Reads labels.json, which says how the labels of a folder were made and from what; labels must be used with that, or not at all."""

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
    """The content of labels.json, where present: labels per second, clusters, source, folder of the manifests, figures of each split."""

    file: Path
    rate: float | None
    clusters: int | None
    source: str
    manifest: str | None
    splits: dict[str, dict[str, Any]]

    def check_manifest(self, table: Manifest) -> None:
        """Raise `UserError` if the labels of a split belong to another manifest, or to recordings that have changed since."""
        figures = self.splits.get(table.path.stem, {})
        if figures.get("tsv_sha256", table.digest) == table.digest:
            return
        # the root may differ, if the corpus was moved, and so may line ends
        if "content_sha256" not in figures or figures["content_sha256"] != table.content_digest():
            raise UserError(
                f"the labels of {table.path.stem} in {self.file.parent} are not of {table.path}: {self.file.name} holds the digest of "
                f"another. Make them again (hubert-eff labels {table.path.parent} --out {self.file.parent} ...); if you cut both files "
                f"yourself, remove {self.file}"
            )

    def check_labels(self, split: str, labels: Labels, classes: int) -> None:
        """Raise `UserError` if a file of labels has changed since it was made, or the dictionary has another number of classes."""
        if self.splits.get(split, {}).get("km_sha256", labels.digest) != labels.digest:
            raise UserError(f"{labels.file} is not the file of {self.file}: {HINT}; if you changed it yourself, remove {self.file}")
        if self.clusters not in (None, classes):
            raise UserError(f"{self.file} has {self.clusters} clusters, but the dictionary beside it has {classes} classes: {HINT}")


def read_record(folder: Path) -> Record | None:
    """Read the record of a folder of labels; None if there is none, as for labels that another program made.

    Raises `UserError` for an invalid record, and for labels that were interrupted while they were put in place.
    """
    file = folder / RECORD
    if not file.exists():
        if next(folder.glob(f".labels-*/{RECORD}"), None):
            raise UserError(f"making the labels in {folder} was interrupted at its very end: run the same `hubert-eff labels` again")
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
