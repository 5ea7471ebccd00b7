"""The manifest's cache: a copy that a full disk, or a crash, cut short is not left, and not used; a recording that goes bad is left out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data import convert as conversion
from hubert_eff.data.audio import write_flac
from hubert_eff.data.manifest import make_manifest
from hubert_eff.errors import WriteError

from ..helpers.disks import files_of_at_most

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 8000)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for index, samples in enumerate(NOISE):
        soundfile.write(folder / f"{index}.wav", np.stack([samples, samples], 1), 16_000)
    return folder


def copies(out: Path) -> dict[str, Path]:
    return {path.name.split("-")[0]: path for path in sorted((out / "audio").glob("*.flac"))}


def assert_whole(out: Path) -> None:
    found = copies(out)
    assert sorted(found) == [str(index) for index in range(len(NOISE))]
    for name, path in found.items():
        assert np.abs(soundfile.read(path)[0] - NOISE[int(name)]).max() < 1e-4


@pytest.mark.parametrize("missing", [1, 10, 5000])
def test_a_full_disk_leaves_no_file(missing: int, tmp_path: Path) -> None:
    size = write_flac(tmp_path / "whole.flac", iter([NOISE[0]]))
    assert size == (tmp_path / "whole.flac").stat().st_size
    with files_of_at_most(size - missing), pytest.raises(WriteError, match="a.flac cannot be written"):  # libsndfile says nothing
        write_flac(tmp_path / "a.flac", iter([NOISE[0]]))
    assert os.listdir(tmp_path) == ["whole.flac"]


def test_a_manifest_on_a_full_disk_stops_in_one_line_and_the_next_run_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(5000):
        assert main(["manifest", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".flac cannot be written (" in error and not copies(tmp_path / "out")
    with files_of_at_most(300):  # not even what was found out can be noted: that is no fault of a recording
        assert main(["manifest", str(source), "--out", str(tmp_path / "other")]) == 1
    assert "checked.jsonl cannot be written (" in capsys.readouterr().err
    make_manifest(source, tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_copies_that_are_not_whole_are_made_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    make_manifest(source, out)
    found = copies(out)
    before = {name: path.stat().st_mtime_ns for name, path in found.items()}
    for name, change in {
        "0": lambda data: data[: len(data) // 2], "1": lambda data: data[:-1], "2": lambda data: b"", "3": lambda data: bytes(len(data)),
        "4": lambda data: data + b"x",
    }.items():  # fmt: skip
        found[name].write_bytes(change(found[name].read_bytes()))
    make_manifest(source, out)
    assert "5 files in" in capsys.readouterr().err and found["5"].stat().st_mtime_ns == before["5"]
    assert_whole(out)
    make_manifest(source, out)
    assert not capsys.readouterr().err


def test_copies_without_a_note_of_their_size_are_decoded_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make_manifest(source, out)
    (out / "audio" / "converted.jsonl").write_bytes(b'["0"\n\xff\xfe\n[[[[\n["x", "y"]\n["a", 1, 2]\n' + b"[" * 100_000 + b"\n")
    (out / "audio" / "checked.jsonl").write_bytes(b'["0", 16000, "2", null, 1]\n\0\0\0')
    copies(out)["1"].write_bytes(copies(out)["1"].read_bytes()[:-1])
    soundfile.write(copies(out)["2"], np.zeros(8000), 16_000)  # as earlier versions left it of channels that cancel
    looked: list[str] = []
    check = conversion.check
    monkeypatch.setattr(conversion, "check", lambda path: looked.append(path.name[0]) or check(path))
    for _ in range(2):
        make_manifest(source, out)
        assert_whole(out)
    assert sorted(looked) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("after", ["gone", "shorter", "damaged"])
def test_a_recording_that_goes_bad_after_its_check_is_left_out(after: str, source: Path, tmp_path: Path) -> None:
    make_manifest(source, tmp_path / "first", tmp_path / "cache")
    for copy in (tmp_path / "cache").glob("1-*.flac"):
        copy.unlink()
    bad, times = source / "1.wav", os.stat(source / "1.wav")
    with pytest.MonkeyPatch.context() as patch:
        if after == "gone":
            convert = conversion.convert
            patch.setattr("hubert_eff.data.manifest.convert", lambda *args: bad.unlink(missing_ok=True) or convert(*args))
        else:
            soundfile.write(bad, np.zeros((4000, 2)), 16_000)
            content = bad.read_bytes() if after == "shorter" else b"garbage"
            bad.write_bytes(content.ljust(times.st_size, b"\0"))
            os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))  # with the size and time that were noted
        summary = make_manifest(source, tmp_path / "out", tmp_path / "cache")
    assert summary["recordings"] == 5
    rows = (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1:]
    assert len(rows) == 1 and rows[0].startswith("1.wav\t")
    assert any(reason in rows[0] for reason in ("not there any more", "it has changed since it was checked", "not readable as audio"))
