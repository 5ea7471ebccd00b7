"""Folders of any content: what can be used is, the rest is named in left_out.tsv; nothing is waited for, no table is broken."""

from __future__ import annotations

import inspect
import io
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff import errors
from hubert_eff.cli import main
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.data.sources import list_folder
from hubert_eff.data.synthetic.sentences import _new_folder
from hubert_eff.errors import UserError, WriteError, printable
from hubert_eff.recipes.pretrain import look_at


def wav(rate: int = 16_000, seconds: float = 0.5) -> bytes:
    """A recording, as bytes."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0.0, 0.1, int(rate * seconds)), rate, format="WAV")
    return file.getvalue()


NAMES = [
    "a.wav", "A.wav", "\u00e9.wav", "e\u0301.wav", "\udce9\udcff.wav", "new\nline\ttab.wav", "\x1b[31mred\x07.wav", "\"quote'.wav",
    "-dash.wav", "--out.wav", " lead.wav", "trail .wav", "$(touch x);`y`.wav", "a:b=c,{d}.wav", "x.zip:1:2.wav", "\u202ertl.wav",
    "\u2028sep.wav", "\x85nel.wav", "語" * 83 + ".wav", "é" * 125 + ".wav", "dir\udcff/\udce9.wav", "語" * 85 + "/x.wav", "a../b..wav",
]  # fmt: skip
DEEP = "d/" * 500 + "deep.wav"  # longer than libsndfile takes
UNUSABLE = {
    "dangling.wav": "a link to nothing", "dangling": "a link to nothing", "loop.wav": "a link to nothing", "loop": "a link to nothing",
    "fifo.wav": "no regular file", "socket.wav": "no regular file", "zero.flac": "no regular file", "empty.wav": "zero bytes",
    "closed": "folder not readable (Permission denied)", DEEP: "not readable as audio (Supplied filename too long)",
}  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recordings of 16 and 8 kHz under all names, and what is not a recording."""
    root = tmp_path / "in"
    root.mkdir()
    content = {16_000: wav(), 8000: wav(8000)}
    for path, rate in [*((root / str(rate) / name, rate) for rate in content for name in NAMES), (root / DEEP, 8000)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[rate])
    for link, target in (
        ("dangling.wav", "nothing"), ("dangling", "nothing"), ("loop.wav", "loop.wav"), ("loop", "loop"), ("up", ".."), ("self", "."),
        ("again", "16000"), ("zero.flac", "/dev/zero"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    for name in ("fifo.wav", "fifo.jsonl", "fifo.trans.txt", "16000/a.txt", "16000/A.lab"):
        os.mkfifo(root / name)
    monkeypatch.chdir(root)
    socket.socket(socket.AF_UNIX).bind("socket.wav")
    (root / "folder.wav").mkdir()
    (root / "empty.wav").touch()
    (root / "closed").mkdir()
    scan = os.scandir

    def closed(path: str | Path) -> object:  # root reads any folder
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    return root


@pytest.mark.parametrize("join", [None, 1.0])
def test_a_manifest_of_a_hostile_folder(join: float | None, hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["manifest", str(hostile), "--out", str(out), "--split-by", "folder", *(["--join", str(join)] if join else [])]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert main([*arguments, "--json"]) == 0
    assert capsys.readouterr().out.strip().isascii()
    rows = [line.split("\t") for line in (out / "left_out.tsv").read_text(encoding="utf-8").split("\n")[1:-1]]
    assert dict(rows) == UNUSABLE and len(rows) == len(UNUSABLE)
    count = 0
    for split in ("train", "valid"):
        content = (out / f"{split}.tsv").read_text(encoding="utf-8")
        root, *lines = content.removesuffix("\n").split("\n")
        assert root == root.strip() and lines
        for line in lines:
            name, samples = line.strip().split("\t")  # as fairseq does
            assert line.isprintable() or "\t" in line
            assert soundfile.info(os.path.join(root, name)).frames == int(samples)
            count += 1
    parts = (out / "parts.tsv").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert {line.count("\t") for line in parts} == {5} and all(line.replace("\t", "").isprintable() for line in parts)
    recordings = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["recordings"]
    assert recordings == len(parts) - 1 == 2 * len(NAMES) and (join or count == recordings)
    assert all(len(os.fsencode(name)) <= 255 for _, _, names in os.walk(out) for name in names)


def test_folders_below_folders_are_no_recursion(tmp_path: Path) -> None:
    (tmp_path / DEEP).parent.mkdir(parents=True)
    (tmp_path / DEEP).touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert [item.name for item in list_folder(tmp_path, set(), 1).items] == [DEEP]
    finally:
        sys.setrecursionlimit(limit)


def test_a_dry_run_of_the_recipe_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "\udce9.wav").write_bytes(wav())
    assert look_at(tmp_path)["recordings"] == 1
    (tmp_path / "wav.scp").write_text(f"one {tmp_path}/fifo.wav\n")
    assert look_at(tmp_path)["hours"] == 0


def test_imports_that_name_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good.wav").write_bytes(wav())
    paths = ("good.wav", "fifo", "loop", "nothing.wav", ".", "x" * 300, "y/" * 3000)
    (tmp_path / "wav.scp").write_text("".join(f"{number} {tmp_path}/{path}\n" for number, path in enumerate(paths)))
    summary = make_manifest(tmp_path, tmp_path / "out", options=Options(valid_percent=0))
    rows = dict(line.split("\t") for line in (tmp_path / "out" / "left_out.tsv").read_text().split("\n")[1:-1])
    assert summary["recordings"] == 1
    assert [rows[str(number)].split(":")[0] for number in range(1, 7)] == [
        "no regular file", "not readable (Too many levels of symbolic links)", "not there", "a folder",
        "not readable (File name too long)", "not readable (File name too long)",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_read_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(UserError, match="cannot be read"):
        make_manifest(tmp_path, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be read"):
        list_folder(tmp_path / "nothing", set(), 1)


def test_speakers_of_any_name_become_folders_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(8000))
    speakers = ["語" * 200, "x" * 5000, "a/" * 900 + "b", "../../up", "/root", "-", ".", "é\u0301"]
    names = [str(number) for number in range(len(speakers))]
    (tmp_path / "wav.scp").write_text("".join(f"{name} {tmp_path}/a.wav\n" for name in names))
    (tmp_path / "utt2spk").write_text("".join(f"{name} {speaker}\n" for name, speaker in zip(names, speakers)))
    make_manifest(tmp_path, tmp_path / "out", options=Options(valid_percent=0))
    root, *lines = (tmp_path / "out" / "train.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    paths = {(Path(root) / line.split("\t")[0]).resolve() for line in lines}
    assert len(paths) == len(speakers) and all(path.is_file() and tmp_path / "out" / "audio" in path.parents for path in paths)


def test_any_message_is_one_line_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;title\x07\n\r\x9b\udce9\u202eb語é\t.wav"
    assert printable(name) == r"a\x1b]0;title\x07\n\r\x9b\udce9\u202eb語é\t.wav" and printable(printable(name)) == printable(name)
    for error in (UserError(f"{name} is bad"), WriteError(28, "No space left on device", name), errors.unknown("preset", name, ["x"])):
        assert str(error).isprintable()
    assert main(["manifest", f"/nowhere/{name}", "--out", "out"]) == 2
    assert main(["manifest", "in", name]) == 2
    assert main([name]) == 2
    printed = capsys.readouterr().err.split("\n")
    assert len(printed) == 4 and all(line.isprintable() for line in printed)


@pytest.mark.parametrize("record", ["[" * 100_000, '{"corpus": "demo", "voices": {"a": {"utterances": 1000000000000}}}', "pipe"])
def test_a_corpus_is_not_written_over_what_only_looks_like_one(record: str, tmp_path: Path) -> None:
    if record == "pipe":
        os.mkfifo(tmp_path / "corpus.json")
    else:
        (tmp_path / "corpus.json").write_text(record)
    with pytest.raises(UserError, match=r"has no corpus\.json of a demo corpus"), _new_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["corpus.json"]


def test_a_corpus_comes_into_the_folder_that_a_link_or_a_dot_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "new").symlink_to("later")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "real")
    summary = json.dumps({"corpus": "demo", "voices": {"s": {"utterances": 1}}})
    for out in (Path("."), Path("../link"), tmp_path / "new", tmp_path / "new"):
        with _new_folder(out) as folder:
            (folder / "s").mkdir()
            (folder / "s" / "s-0001.wav").touch()
            (folder / "corpus.json").write_text(summary)
        assert sorted(os.listdir(out)) == ["corpus.json", "s"] and os.listdir(out / "s") == ["s-0001.wav"]
    with pytest.raises(UserError, match="name a folder"), _new_folder(tmp_path / "loop"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["later", "link", "loop", "new", "real"]
