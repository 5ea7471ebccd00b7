"""Manifests of lhotse and Kaldi become fairseq manifests: what is cut, used in place, refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data import audio, checking
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.labels.quality import _sources


def noise(path: Path, seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """Write noise; returns it as it is read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(len(path.name)).normal(scale=0.1, size=(round(seconds * rate), channels))
    soundfile.write(path, wave, rate)
    return soundfile.read(path)[0]


def rows_of(out: Path) -> list[dict[str, str]]:
    head, *lines = (line.split("\t") for line in (out / "parts.tsv").read_text().splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def entries_of(out: Path, split: str) -> list[tuple[Path, int]]:
    root, *lines = (out / f"{split}.tsv").read_text().splitlines()
    return [(Path(root) / name, int(samples)) for name, samples in (line.split("\t") for line in lines)]


def recording(name: str, path: Path | str, seconds: float, rate: int = 16000, **fields: Any) -> dict[str, Any]:
    """As lhotse 1.33 writes it."""
    return {
        "id": name, "sources": [{"type": "file", "channels": [0], "source": str(path)}], "sampling_rate": rate,
        "num_samples": round(seconds * rate), "duration": seconds, "channel_ids": [0], **fields,
    }  # fmt: skip


def supervision(name: str, of: str, start: float, duration: float, **fields: Any) -> dict[str, Any]:
    return {"id": name, "recording_id": of, "start": start, "duration": duration, "channel": 0, **fields}


def write_lines(path: Path, *entries: dict[str, Any]) -> Path:
    text = "".join(json.dumps(e) + "\n" for e in entries)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def long(tmp_path) -> dict[str, np.ndarray]:
    """Two long recordings, one of another rate, and a short one."""
    return {
        "a": noise(tmp_path / "audio" / "a.flac", 6.0),
        "bb": noise(tmp_path / "audio" / "bb.wav", 5.0, 8000),
        "ccc": noise(tmp_path / "audio" / "ccc.wav", 1.5),
    }


def lhotse_folder(folder: Path) -> Path:
    audio_folder, target = folder / "audio", folder / "lhotse"
    target.mkdir()
    write_lines(
        target / "x_recordings_all.jsonl.gz",
        recording("A", audio_folder / "a.flac", 6.0),
        recording("B", audio_folder / "bb.wav", 5.0, 8000),
        recording("C", audio_folder / "ccc.wav", 1.5),
        recording("D", audio_folder / "a.wav", 1.5),
    )
    write_lines(
        target / "x_supervisions_all.jsonl.gz",
        supervision("A-1", "A", 0.5, 1.25, text="ONE  TWO", speaker="s1", custom={"anything": [1]}),
        supervision("A-2", "A", 3.0, 3.2, text="THREE", speaker="s1"),  # ends 0.2 s after the file
        supervision("B-1", "B", 1, 2, text="FOUR", speaker="s2"),
        supervision("C-1", "C", 0.0, 1.5, text="FIVE", speaker="s3"),
        supervision("A-3", "A", 9.0, 1.0, text="NOT THERE", speaker="s1"),
    )
    return target


def kaldi_folder(folder: Path) -> Path:
    audio_folder, target = folder / "audio", folder / "kaldi"
    target.mkdir()
    (target / "wav.scp").write_text("".join(f"{n} {audio_folder / f}\n" for n, f in (("A", "a.flac"), ("B", "bb.wav"), ("C", "ccc.wav"))))
    (target / "segments").write_text("A-1 A 0.50 1.75\nA-2 A 3.00 6.20\nA-3 A 9.00 10.00\nB-1 B 1.00 3.00\nC-1 C 0.00 -1\n")
    (target / "text").write_text("A-1 ONE  TWO\nA-2 THREE\nA-3 NOT THERE\nB-1 FOUR\nC-1 FIVE\n")
    (target / "utt2spk").write_text("A-1 s1\nA-2 s1\nA-3 s1\nB-1 s2\nC-1 s3\n")
    return target


@pytest.mark.parametrize("make", [lhotse_folder, kaldi_folder])
def test_segments_become_utterances(tmp_path, long, make) -> None:
    out = tmp_path / "out"
    summary = make_manifest(make(tmp_path), out, options=Options(valid_percent=20))
    found = {Path(r["utterance"]).name.split(".")[0].rsplit("-", 1)[0] or r["utterance"]: r for r in rows_of(out)}
    assert (summary["recordings"], summary["transcribed"], summary["split_by"]) == (4, 4, "folder")
    assert {n: (r["transcript"], float(r["source_start"])) for n, r in found.items()} == {
        "A-1": ("ONE TWO", 0.5), "A-2": ("THREE", 3.0), "B-1": ("FOUR", 1.0), "ccc": ("FIVE", 0.0)
    }  # fmt: skip
    paths = {p.name: (p, n) for split in ("train", "valid") for p, n in entries_of(out, split)}
    cut = {name: paths[Path(r["utterance"]).name] for name, r in found.items()}
    assert {n: samples for n, (_, samples) in cut.items()} == {"A-1": 20000, "A-2": 48000, "B-1": 32000, "ccc": 24000}
    np.testing.assert_allclose(soundfile.read(cut["A-1"][0])[0], long["a"][8000:28000], atol=1e-4)
    np.testing.assert_allclose(soundfile.read(cut["A-2"][0])[0], long["a"][48000:], atol=1e-4)
    assert cut["ccc"][0] == tmp_path / "audio" / "ccc.wav"  # a whole file stays where it lies
    assert {p.parent.name for p, _ in entries_of(out, "train")} & {p.parent.name for p, _ in entries_of(out, "valid")} == set()
    left_out = dict(line.split("\t") for line in (out / "left_out.tsv").read_text().splitlines()[1:])
    assert left_out.pop("A-3").startswith("segment outside its file") and left_out in ({}, {"D": "no supervision"})


def test_segment_of_another_rate_is_the_same_sound(tmp_path) -> None:
    """Cut first and resampled then, a segment differs from the resampled file's at its edges only."""
    time = np.arange(5 * 8000) / 8000
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 300 * time), 8000)
    (tmp_path / "wav.scp").write_text(f"A {tmp_path / 'a.wav'}\n")
    (tmp_path / "segments").write_text("A-1 A 1.00 3.00\n")
    make_manifest(tmp_path, tmp_path / "out")
    [(path, samples)] = entries_of(tmp_path / "out", "train")
    expected = 0.5 * np.sin(2 * np.pi * 300 * (np.arange(samples) / 16000 + 1.0))
    assert samples == 32000 and np.abs(soundfile.read(path)[0] - expected)[800:-800].max() < 1e-3


def test_a_file_is_decoded_once_and_segments_are_cut_once(tmp_path, long, monkeypatch) -> None:
    source, out = kaldi_folder(tmp_path), tmp_path / "out"
    looked: list[str] = []
    monkeypatch.setattr(checking, "check", lambda path: looked.append(path.name) or audio.check(path))
    make_manifest(source, out)
    assert sorted(looked) == ["a.flac", "bb.wav", "ccc.wav"]
    before = {p: p.stat().st_mtime_ns for p in (out / "audio").rglob("*.flac")}
    make_manifest(source, out)
    assert len(looked) == 3 and len(before) == 3 and {p: p.stat().st_mtime_ns for p in (out / "audio").rglob("*.flac")} == before


def test_kaldi_without_segments(tmp_path, long, capsys) -> None:
    """Whole recordings; a file of another length than utt2dur says is left out; a wav.scp may be named itself; no speakers, no folders."""
    source = tmp_path / "data"
    source.mkdir()
    (source / "wav.scp").write_text("".join(f"{f} {tmp_path / 'audio' / f}\n" for f in ("a.flac", "bb.wav", "ccc.wav", "none.wav")))
    (source / "utt2dur").write_text("a.flac 6.00\nbb.wav 5.05\nccc.wav 2.5\n")
    assert main(["manifest", str(source / "wav.scp"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 utterances of Kaldi (1 as copies in the cache)" in printed
    left_out = dict(line.split("\t") for line in (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1:])
    assert left_out == {
        "ccc.wav": "not the file of its manifest: 1.50 s, expected 2.50 s",
        "none.wav": f"not there: {tmp_path / 'audio' / 'none.wav'}",
    }
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["split_by"] == "file"


def test_lhotse_cuts(tmp_path, long) -> None:
    one, two = recording("A", tmp_path / "audio" / "a.flac", 6.0), recording("C", tmp_path / "audio" / "ccc.wav", 1.5)
    said = [supervision("y", "A", 1.5, 0.5, text="SECOND"), supervision("x", "A", -0.1, 0.5, text="FIRST", speaker="s")]
    file = write_lines(
        tmp_path / "cuts.jsonl",
        {"id": "c1", "start": 1.0, "duration": 2.0, "channel": 0, "supervisions": said, "recording": one, "type": "MonoCut"},
        {"id": "c2", "start": 0, "duration": 1.5, "channel": 0, "supervisions": [], "recording": two, "type": "MonoCut"},
        {"id": "c3", "start": 0, "duration": 1.5, "channel": 0, "supervisions": [], "recording": two, "type": "MonoCut"},
    )
    make_manifest(file, tmp_path / "out", options=Options(valid_percent=0))
    rows = rows_of(tmp_path / "out")
    assert [(r["transcript"], r["source_start"]) for r in rows] == [("FIRST SECOND", "1.000000"), ("", "0.000000"), ("", "0.000000")]
    assert len({r["utterance"] for r in rows}) == 3  # the file that is used twice is a second utterance of its own
    for path, samples in entries_of(tmp_path / "out", "train"):
        assert soundfile.info(path).frames == samples


def test_names_lead_nowhere_else(tmp_path, long) -> None:
    """Ids and speakers become names of files in the cache, whatever they are."""
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    (source / "wav.scp").write_text(f"../../etc/x {tmp_path}/lhotse/../audio/a.flac\n{'n' * 400} {tmp_path}/audio/a.flac\n")
    (source / "segments").write_text(f"../../../up ../../etc/x 0 1\n{'l' * 400} {'n' * 400} 1 2\n")
    (source / "utt2spk").write_text(f"../../../up ..\n{'l' * 400} /root/s\n")
    make_manifest(source, out, options=Options(valid_percent=0))
    assert all((out / "audio") in p.resolve().parents for p, _ in entries_of(out, "train"))


def test_join_by_speaker(tmp_path, long) -> None:
    make_manifest(kaldi_folder(tmp_path), tmp_path / "out", options=Options(join=5.0, valid_percent=0))
    rows = rows_of(tmp_path / "out")
    by_utterance: dict[str, set[str]] = {}
    for row in rows:
        by_utterance.setdefault(row["utterance"], set()).add(Path(row["source"]).name)
    assert len(rows) == 4 and sorted(map(sorted, by_utterance.values())) == [["a.flac"], ["bb.wav"], ["ccc.wav"]]
    found = {(s, round(first, 2)) for parts in _sources(tmp_path / "out").values() for _, _, s, first in parts}
    assert (str(tmp_path / "audio" / "a.flac"), 3.0) in found


def test_quality_knows_where_segments_begin(tmp_path) -> None:
    """Phones are timed in the long recording, labels in its segment."""
    from hubert_eff.labels.quality import label_quality

    noise(tmp_path / "a.wav", 3.0)
    (tmp_path / "wav.scp").write_text(f"A {tmp_path / 'a.wav'}\n")
    (tmp_path / "segments").write_text("A-1 A 1.00 2.00\n")
    make_manifest(tmp_path, tmp_path, options=Options(valid_percent=0))
    labels = [int(1 + i / 100 + 0.0125 >= 1.4) for i in range(98)]
    (tmp_path / "train.km").write_text(" ".join(map(str, labels)) + "\n")
    (tmp_path / "labels.json").write_text(json.dumps({"rate": 100.0, "k": 2, "splits": ["train"], "manifest": str(tmp_path)}))
    (tmp_path / "alignments.tsv").write_text("a.wav\tphone\t0\t0.9\tz\na.wav\tphone\t0.9\t1.4\tx\na.wav\tphone\t1.4\t2.5\ty\n")
    report = label_quality(tmp_path, tmp_path / "alignments.tsv")["all"]
    assert (report["pnmi"], report["aligned_frames"], report["phones"]) == (1, 98, 2)


GOOD = recording("A", "a.flac", 6.0)
RUN = recording("A", "", 1, sources=[{"type": "command", "channels": [0], "source": "touch hacked |"}])
CUT = {"id": "c", "start": 0, "duration": 1, "channel": 0, "supervisions": [], "recording": GOOD, "type": "MonoCut"}
BAD_LHOTSE = {
    "command": ([RUN], "is a 'command'"),
    "url": ([recording("A", "", 1, sources=[{"type": "url", "channels": [0], "source": "https://x/a.wav"}])], "is a 'url'"),
    "memory": ([recording("A", "", 1, sources=[{"type": "memory", "channels": [0], "source": "AAAA"}])], "is a 'memory'"),
    "channels": ([recording("A", "a.wav", 1, channel_ids=[0, 1])], "has 2 channels"),
    "files": ([recording("A", "", 1, channel_ids=[0, 1], sources=[GOOD["sources"][0]] * 2)], "has 2 channels in 2 files"),
    "no sources": ([recording("A", "", 1, sources=["x"])], "has no list of sources"),
    "transforms": ([recording("A", "a.wav", 1, transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}])], "is transformed"),
    "duration": ([recording("A", "a.wav", 1) | {"duration": "NaN"}], "duration must be a number"),
    "twice": ([GOOD, GOOD], "was there before"),
    "mixed": ([{"id": "m", "tracks": [], "type": "MixedCut"}], "is a MixedCut, only a MonoCut"),
    "multi": ([CUT | {"type": "MultiCut", "channel": [0, 1]}], "is a MultiCut"),
    "padding": ([{"id": "p", "duration": 1, "type": "PaddingCut"}], "is a PaddingCut"),
    "features only": ([{k: v for k, v in CUT.items() if k != "recording"}], "has no recording"),
    "cut of a command": ([CUT | {"recording": RUN}], "is a 'command'"),
    "cut twice": ([CUT, CUT], "must be unique"),
    "negative": ([CUT | {"start": -1}], "start must be a number"),
    "features": ([{"recording_id": "A", "storage_type": "lilcom_chunky", "storage_path": "x"}], "its first line is features"),
    "something else": ([{"audio_filepath": "a.wav"}], "its first line is something else"),
    "another kind": ([CUT, GOOD], "expected a cut"),
    "supervisions": ([supervision("u", "A", 0, 1)], "supervisions only"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LHOTSE)
def test_lhotse_that_is_refused(tmp_path, monkeypatch, capsys, kind) -> None:
    monkeypatch.chdir(tmp_path)
    entries, message = BAD_LHOTSE[kind]
    file = write_lines(tmp_path / "x.jsonl", *entries)
    assert main(["manifest", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "x.jsonl" in error or "must be unique" in error
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]  # nothing was written or run


def test_lhotse_files_that_do_not_belong_together(tmp_path, long, capsys) -> None:
    folder = lhotse_folder(tmp_path)
    arguments = ["manifest", str(folder), "--out", str(tmp_path / "out")]
    write_lines(folder / "cuts.jsonl", CUT)
    assert main(arguments) == 2 and "holds both cuts and recordings" in capsys.readouterr().err
    (folder / "cuts.jsonl").unlink()
    write_lines(folder / "y_supervisions.jsonl", supervision("u", "Z", 0, 1))
    assert main(arguments) == 2 and "supervision 'u' is of recording 'Z'" in capsys.readouterr().err
    (folder / "y_supervisions.jsonl").unlink()
    file = folder / "x_recordings_all.jsonl.gz"
    assert make_manifest(file, tmp_path / "one")["transcribed"] == 4  # with the supervisions beside it
    file.write_bytes(file.read_bytes()[:100])
    assert main(["manifest", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be read as JSON lines" in error


def test_other_json_lines_beside_recordings_are_passed_over(tmp_path, long) -> None:
    for name, text in (("log.jsonl", '{"step": 1}\n'), ("broken.jsonl", "no JSON\n"), ("list.jsonl", "[1]\n"), ("empty.jsonl", "")):
        (tmp_path / "audio" / name).write_text(text)
    assert make_manifest(tmp_path / "audio", tmp_path / "out")["layout"] == "folder"


BAD_KALDI = {
    "pipe": ({"wav.scp": "A sph2pipe -f wav x.sph |\n"}, "recording 'A' is a command ('sph2pipe -f wav x.sph |'), which is never run"),
    "pipe without blank": ({"wav.scp": "A touch hacked|\n"}, "is a command"),
    "output pipe": ({"wav.scp": "A | touch hacked\n"}, "is a command"),
    "standard input": ({"wav.scp": "A -\n"}, "is a command"),
    "archive": ({"wav.scp": "A data/wav.ark:123\n"}, "lies in an archive"),
    "specifier": ({"wav.scp": "A scp:other.scp\n"}, "lies in an archive"),
    "no path": ({"wav.scp": "A\n"}, "line 1: expected a name"),
    "twice": ({"wav.scp": "A a.wav\nA b.wav\n"}, "line 2: 'A' was there before"),
    "empty": ({"wav.scp": "\n"}, "lists no recording"),
    "no UTF-8": ({"wav.scp": b"A \xff\xfe.wav\n"}, "wav.scp is not UTF-8 text (invalid start byte at byte 2), line 1"),
    "channel": ({"segments": "u A 0 1 1\n"}, "names a channel"),
    "no end": ({"segments": "u A 0\n"}, "is not of the form"),
    "unknown recording": ({"segments": "u B 0 1\n"}, "is of recording 'B', which wav.scp does not list"),
    "backwards": ({"segments": "u A 2 1\n"}, "before it begins"),
    "no number": ({"segments": "u A x 1\n"}, "'x' is not a number of seconds"),
    "infinite": ({"segments": "u A 0 inf\n"}, "'inf' is not a number of seconds"),
    "bad length": ({"utt2dur": "A long\n"}, "'long' is not a number"),
}


@pytest.mark.parametrize("kind", BAD_KALDI)
def test_kaldi_that_is_refused(tmp_path, monkeypatch, capsys, kind) -> None:
    monkeypatch.chdir(tmp_path)
    files, message = BAD_KALDI[kind]
    source = tmp_path / "data"
    source.mkdir()
    for name, text in ({"wav.scp": "A a.wav\n"} | files).items():
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["manifest", str(source), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and str(source) in error
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # nothing was written or run
