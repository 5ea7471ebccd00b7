"""`run`, `transcribe` and `align`: one file that cannot be used, whatever it is or is called, ended the work on all others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.commands import align
from hubert_eff.data.inputs import recordings
from hubert_eff.errors import UserError
from hubert_eff.inference import extraction
from hubert_eff.streaming import live

from ..helpers.recognizers import make, save

ODD = (b"a\x1b[31m\nb.wav", "字".encode() * 83 + b".wav", b" .wav", "é\u0301\u202e.wav".encode(), b"a\xff\xfe.wav")


def tone(path: str | os.PathLike[str], seconds: float = 0.3) -> str:
    soundfile.write(os.fsencode(path), 0.1 * np.sin(np.arange(round(16_000 * seconds)) / 9).astype(np.float32), 16_000, format="WAV")
    return os.fspath(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[str], list[str]]:
    """Recordings that can be used, of odd names, and what cannot."""
    good = [tone(tmp_path / "good.wav"), *(tone(tmp_path / os.fsdecode(name)) for name in ODD)]
    names = ("empty.wav", "folder.wav", "pipe.wav", "nan.wav", "short.wav", "absent.wav", "loop.wav", "n" * 300)
    bad = [str(tmp_path / name) for name in names]
    Path(bad[0]).touch()
    Path(bad[1]).mkdir()
    os.mkfifo(bad[2])
    soundfile.write(bad[3], np.full(9_000, np.nan), 16_000, subtype="FLOAT")
    tone(bad[4], 0.01)
    Path(bad[6]).symlink_to(bad[6])
    return good, bad


def test_run_leaves_them_out(files: tuple[list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = files
    out = tmp_path / "f.npz"
    assert main(["run", "transformer-debug", *bad[:3], *good, *bad[3:], "--out", str(out), "--layer", "0", "--json"]) == 1
    said, errors = capsys.readouterr()
    found = json.loads(said)
    assert len(found["recordings"]) == len(good) and len(found["left_out"]) == len(bad)
    assert errors.count("\n") == len(bad) and all(path in errors for path in bad) and "\x1b" not in errors
    with np.load(out) as arrays:
        keys = {"good", *(name.decode("utf-8", "backslashreplace")[:-4] for name in ODD)}
        assert set(arrays) == keys == {recording["key"] for recording in found["recordings"]}
        assert all(arrays[key].shape == (14, 64) for key in arrays)
    for several in (bad[:1], bad):
        assert main(["run", "transformer-debug", *several, "--out", str(tmp_path / "none.npz")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "none.npz").exists()


def test_run_leaves_out_what_goes_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [tone(tmp_path / f"{name}.wav", seconds) for name, seconds in (("a", 21), ("b", 0.3), ("c", 0.3), ("d", 21))]
    checked = extraction._check_space

    def remove(*given: object) -> None:
        checked(*given)
        Path(names[0]).unlink()
        Path(names[1]).write_bytes(b"RIFF")

    monkeypatch.setattr(extraction, "_check_space", remove)
    lines: list[str] = []
    found = extraction.extract("transformer-debug", names, tmp_path / "f.npz", layer=0, window=20, left_out=lines.append)
    assert [recording.key for recording in found] == ["c", "d"] and len(lines) == 2 and all("any more" in line for line in lines)
    Path(names[0]).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no audio file"):
        extraction.extract("transformer-debug", names, tmp_path / "f.npz")


def test_names_are_found_without_comparing_each_with_all(tmp_path: Path) -> None:
    class Counted(type(tmp_path)):  # type: ignore[misc]
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return super().__eq__(other)

        __hash__ = type(tmp_path).__hash__

    names = [Counted(f"/data/{number}.wav") for number in range(2_000)]
    assert len({name for _, name in recordings(names)}) == 2_000 and Counted.compared < 10_000


def test_transcribe_leaves_them_out(files: tuple[list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good, bad), checkpoint = files, str(save(make(), tmp_path / "checkpoint.pt"))
    for form in ([], ["--json"]):
        assert main(["transcribe", checkpoint, *bad[:3], *good, *bad[3:], *form]) == 1
        said, errors = capsys.readouterr()
        assert errors.count("\n") == len(bad) and all(path in errors for path in bad) and "\x1b" not in said + errors
        said.encode("utf-8")
    found = json.loads(said)
    assert len(found["recordings"]) == len(good) and len(found["left_out"]) == len(bad)
    assert main(["transcribe", checkpoint, *bad[:2]]) == 2
    capsys.readouterr()
    assert main(["transcribe", checkpoint, bad[1]]) == 2
    assert capsys.readouterr().err == f"hubert-eff transcribe: {bad[1]} is a folder: name the recordings in it\n"
    for path in bad:
        assert main(["align", checkpoint, path, "A"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_align_writes_files_of_any_name(tmp_path: Path) -> None:
    names = {align._name(Path(os.fsdecode(name))) for name in (*ODD, b"many words.wav", b"many words 2.wav", b"\xff" * 250)}
    assert len(names) == len(ODD) + 3
    for name in names:
        assert len(name.split()) == 1 and name.isprintable() and len(f"{name}-blocks.png".encode()) < 255


def test_align_does_not_take_a_path_for_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfeh\x00i\x00")
    for path in (text, tmp_path):
        with pytest.raises(UserError, match=str(path)):
            align._text(str(path))
    text.write_text("SAID")
    assert align._text(str(text)) == "SAID" and align._text("a" * 5_000) == "a" * 5_000 and align._text("") == ""


def test_a_stream_does_not_end_before_its_file(tmp_path: Path) -> None:
    whole = Path(tone(tmp_path / "whole.wav")).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    for source, message in ((tmp_path / "cut.wav", "truncated"), (tmp_path, "is a folder"), (tmp_path / "none.wav", "no audio file")):
        with pytest.raises(UserError, match=message):
            list(live.pieces_of(source))
    assert sum(piece.size(1) for piece in live.pieces_of(tmp_path / "whole.wav")) == 4_800
