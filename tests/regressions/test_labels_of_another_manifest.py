"""Training takes labels of the manifest that it trains on, or none: what is checked is what is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.errors import UserError
from hubert_eff.labels.make import make_labels
from hubert_eff.labels.quality import label_quality

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq_plugins.data import checks  # noqa: E402

CLUSTERS = 4


def recordings(folder: Path, seed: int) -> Path:
    """Recordings of one length, so that nothing but their labels tells them apart."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(12):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1 * (1 + i % 3), 4000), 16_000)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, a manifest and its labels, in one folder."""
    folder = tmp_path_factory.mktemp("made")
    make_manifest(recordings(folder / "audio", 0), folder / "data", options=Options(seed=1, valid_percent=25))
    make_labels(folder / "data", folder / "labels", clusters=CLUSTERS)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the manifest and the labels."""
    return Path(shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("audio")))


def check(folder: Path, split: str = "train") -> int:
    """What training does before it begins; utterances of the split."""
    labels = folder / "labels"
    dictionaries = [checks.read_dictionary(labels / "dict.km.txt")]
    manifest, _ = checks.check_split(folder / "data", labels, split, ["km"], 100.0, 16_000, dictionaries, None, None, False)
    return len(manifest.entries)


def edit(file: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))


def swap(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-2], lines[-1], lines[-2]]


def test_labels_of_this_manifest_are_taken(folder: Path) -> None:
    assert check(folder) + check(folder, "valid") == 12


def test_another_split_of_the_same_recordings_is_refused_until_it_is_labeled(made: Path, folder: Path) -> None:
    make_manifest(made / "audio", folder / "data", options=Options(seed=2, valid_percent=25))
    for split in ("train", "valid"):
        with pytest.raises(UserError, match=f"the labels of {split} in .* are not of .*{split}.tsv: .* Make them again .hubert-eff labels"):
            check(folder, split)
    assert not make_labels(folder / "data", folder / "labels", clusters=CLUSTERS)["reused"]
    assert check(folder) + check(folder, "valid") == 12


@pytest.mark.parametrize("split", ["train", "valid"])
def test_other_order_and_subsets_are_refused(split: str, folder: Path) -> None:
    other = {"train": "valid", "valid": "train"}[split]
    table, labels = folder / "data" / f"{split}.tsv", folder / "labels" / f"{split}.km"
    edit(table, swap)
    with pytest.raises(UserError, match="are not of"):
        check(folder, split)
    edit(labels, swap)  # cut or sorted by hand, both alike: only who did it knows
    with pytest.raises(UserError, match="if you cut both files yourself, remove .*labels.json"):
        check(folder, split)
    check(folder, other)
    (folder / "labels" / "labels.json").unlink()
    check(folder, split)


def test_a_corpus_that_was_moved_keeps_its_labels_and_another_one_has_none(made: Path, folder: Path, tmp_path: Path) -> None:
    def at(root: Path) -> None:
        edit(folder / "data" / "train.tsv", lambda lines: [f"{root}\n".encode(), *lines[1:]])

    at(Path(shutil.copytree(made / "audio", tmp_path / "moved")))
    check(folder)
    edit(folder / "data" / "train.tsv", lambda lines: [line.replace(b"\n", b"\r\n") for line in lines])
    check(folder)
    at(recordings(tmp_path / "others", 1))
    with pytest.raises(UserError, match="are not of"):
        check(folder)


def other_labels(folder: Path) -> None:
    edit(folder / "labels" / "train.km", swap)


def other_dictionary(folder: Path) -> None:
    with (folder / "labels" / "dict.km.txt").open("a") as file:
        file.write("4 9\n")


def with_carriage_returns(folder: Path) -> None:
    edit(folder / "labels" / "train.km", lambda lines: [line.replace(b"\n", b"\r\n") for line in lines])


@pytest.mark.parametrize("damage", [other_labels, other_dictionary, with_carriage_returns])
def test_labels_that_were_changed_are_refused_and_made_again(damage: Callable[[Path], None], made: Path, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match="make the labels again"):
        check(folder)
    assert not make_labels(folder / "data", folder / "labels", clusters=CLUSTERS)["reused"]
    check(folder)
    assert (folder / "labels" / "train.km").read_bytes() == (made / "labels" / "train.km").read_bytes()


def test_labels_that_were_half_put_in_place_are_refused(folder: Path) -> None:
    labels = folder / "labels"
    (labels / ".labels-0123").mkdir()
    (labels / "labels.json").rename(labels / ".labels-0123" / "labels.json")
    with pytest.raises(UserError, match="interrupted at its very end: run the same `hubert-eff labels` again"):
        check(folder)


def test_records_of_earlier_versions_and_labels_without_one_are_taken(folder: Path) -> None:
    file = folder / "labels" / "labels.json"
    record = json.loads(file.read_text())
    for figures in record["splits"].values():
        del figures["content_sha256"], figures["km_sha256"]
    file.write_text(json.dumps(record))
    check(folder)
    edit(folder / "data" / "train.tsv", swap)
    with pytest.raises(UserError, match="are not of"):
        check(folder)
    file.unlink()
    check(folder)
    edit(folder / "labels" / "train.km", lambda lines: lines[1:])
    with pytest.raises(UserError, match="has 8 lines for the 9 utterances"):
        check(folder)


def test_quality_is_not_measured_with_another_manifest(made: Path, folder: Path) -> None:
    alignments = made / "audio" / "alignments.tsv"
    alignments.write_text("".join(f"{i}.wav\tphone\t0\t0.25\t{'abc'[i % 3]}\n" for i in range(12)))
    assert label_quality(folder / "labels", alignments, folder / "data")["all"]["phones"] == 3
    edit(folder / "data" / "train.tsv", swap)
    with pytest.raises(UserError, match="the labels of train in .* are not of"):
        label_quality(folder / "labels", alignments, folder / "data")
