"""From folders of recordings to fairseq manifests: what is used, what is left out, and how it is split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data import checking
from hubert_eff.data.audio import Checked, Unusable, check
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.errors import UserError


def tone(path: Path, seconds: float, rate: int = 16000, channels: int = 1, hertz: float = 440.0, **options) -> np.ndarray:
    """Write a tone; returns it as written, (samples, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    wave = np.stack([0.3 * (c + 1) * np.sin(2 * np.pi * hertz * time) for c in range(channels)], axis=1)
    soundfile.write(path, wave, rate, **options)
    return wave


def read_tsv(path: Path) -> list[tuple[Path, int]]:
    root, *lines = path.read_text().splitlines()
    return [(Path(root) / name, int(samples)) for name, samples in (line.split("\t") for line in lines)]


def left_out(out: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in (out / "left_out.tsv").read_text().splitlines()[1:])


def snapshot(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with one file of each kind that cannot be used."""
    folder = tmp_path / "broken"
    for suffix in ("wav", "flac", "ogg", "mp3"):
        tone(folder / f"cut.{suffix}", 2.0)
        data = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    (folder / "zero.wav").write_bytes(b"")
    (folder / "text.flac").write_text("this is not audio")
    tone(folder / "brief.wav", 0.05)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    (folder / "phone.m4a").write_bytes(b"\0" * 100)
    return folder


REASONS = {
    "cut.wav": "truncated", "cut.flac": "not readable as audio", "cut.ogg": "truncated", "cut.mp3": "truncated",
    "zero.wav": "zero bytes", "text.flac": "not readable as audio", "brief.wav": "too short: 0.050 s", "nan.wav": "NaN",
    "silent.wav": "silent", "none.wav": "no samples", "phone.m4a": "format .m4a is not read",
}  # fmt: skip


def test_one_usable_file_among_broken_ones(broken, tmp_path, capsys) -> None:
    tone(broken / "good.wav", 1.0)
    out = tmp_path / "out"
    assert main(["manifest", str(broken), "--out", str(out)]) == 0
    reasons = left_out(out)
    assert sorted(reasons) == sorted(REASONS)
    for name, reason in REASONS.items():
        assert reasons[name].startswith(reason), (name, reasons[name])
    # one utterance cannot be split: fairseq cannot load an empty split, so valid repeats it, and says so
    assert read_tsv(out / "train.tsv") == read_tsv(out / "valid.tsv") == [(broken / "good.wav", 16000)]
    printed = capsys.readouterr().out
    assert "valid.tsv repeats train.tsv" in printed and "left out 11" in printed


def test_no_usable_file(broken, tmp_path, capsys) -> None:
    assert main(["manifest", str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no usable recording" in error and "brief.wav (too short" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "other"])
def test_nothing_to_read(tmp_path, kind, capsys) -> None:
    folder = tmp_path / "in"
    if kind in ("empty", "other"):
        folder.mkdir()
    if kind == "other":
        (folder / "notes.txt").write_text("x")
    if kind == "file":
        folder.write_text("x")
    before = snapshot(tmp_path)
    assert main(["manifest", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [["--valid-percent", "100"], ["--min-seconds", "0.01"], ["--max-seconds", "0.05"], ["--join", "0.01"], ["--workers", "0"]],
)
def test_bad_options(tmp_path, options, capsys) -> None:
    tone(tmp_path / "in" / "a.wav", 1.0)
    assert main(["manifest", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 8000, 1), ("a.flac", 44100, 2), ("a.ogg", 48000, 1), ("a.mp3", 22050, 1), ("a.wav", 16000, 2), ("a.WAV", 16000, 1)],
)
def test_conversion_keeps_the_sound(tmp_path, name, rate, channels) -> None:
    options = {"format": "MP3"} if name.endswith("mp3") else {}
    tone(tmp_path / "in" / name, 1.5, rate, channels, **options)
    make_manifest(tmp_path / "in", tmp_path / "out")
    [(path, samples)] = read_tsv(tmp_path / "out" / "train.tsv")
    audio, got_rate = soundfile.read(path)
    assert (got_rate, audio.shape) == (16000, (samples,)) and abs(samples - 24000) < 1200
    assert path.suffix == ".flac" and (tmp_path / "out" / "audio") in path.parents
    spectrum = np.abs(np.fft.rfft(audio[4000:20000]))
    assert abs(float(spectrum.argmax()) - 440) <= 1
    amplitude = 0.3 if channels == 1 else 0.45
    assert np.abs(audio[4000:20000]).max() == pytest.approx(amplitude, rel=0.05)


def test_loud_float_audio_is_scaled_not_clipped(tmp_path) -> None:
    time = np.arange(8000) / 8000
    soundfile.write(tmp_path / "a.wav", (3 * np.sin(2 * np.pi * 200 * time)).astype(np.float32), 8000, subtype="FLOAT")
    make_manifest(tmp_path, tmp_path / "out")
    [(path, _)] = read_tsv(tmp_path / "out" / "train.tsv")
    audio, _ = soundfile.read(path)
    assert np.abs(audio[1000:15000] - np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)[1000:15000]).max() < 1e-2


def test_a_wav_of_unknown_length_is_no_truncated_one(tmp_path) -> None:
    """Programs that write to a pipe leave 2**32 - 1 as the length."""
    tone(tmp_path / "a.wav", 0.5)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert check(tmp_path / "a.wav").frames == 8000
    with pytest.raises(Unusable, match="zero bytes"):
        (tmp_path / "b.wav").touch()
        check(tmp_path / "b.wav")


def test_second_run_reuses_the_cache_and_a_changed_file_is_converted_again(tmp_path) -> None:
    for index in range(3):
        tone(tmp_path / "in" / f"{index}.wav", 1.0, 8000)
    make_manifest(tmp_path / "in", tmp_path / "out", tmp_path / "cache")
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.flac")}
    checked = (tmp_path / "cache" / "checked.jsonl").read_bytes()
    make_manifest(tmp_path / "in", tmp_path / "again", tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.flac")} == first and len(first) == 3
    assert (tmp_path / "cache" / "checked.jsonl").read_bytes() == checked
    assert (tmp_path / "again" / "train.tsv").read_bytes() == (tmp_path / "out" / "train.tsv").read_bytes()
    tone(tmp_path / "in" / "1.wav", 2.0, 8000)
    make_manifest(tmp_path / "in", tmp_path / "out", tmp_path / "cache")
    lengths = sorted(n for s in ("train", "valid") for _, n in read_tsv(tmp_path / "out" / f"{s}.tsv"))
    assert lengths == [16000, 16000, 32000]


def test_one_root_covers_files_in_place_and_converted(tmp_path) -> None:
    tone(tmp_path / "in" / "s" / "direct.wav", 1.0)
    tone(tmp_path / "in" / "s" / "other rate.wav", 1.0, 8000)
    tone(tmp_path / "in" / "s" / " blank at front.wav", 1.0)  # fairseq strips lines: such a name goes through the cache
    tone(tmp_path / "in" / "s" / "tab\tinside.wav", 1.0)
    make_manifest(tmp_path / "in", tmp_path / "out", options=Options(valid_percent=0))
    entries = read_tsv(tmp_path / "out" / "train.tsv")
    assert len(entries) == 4 and not (tmp_path / "out" / "valid.tsv").exists()
    for path, samples in entries:
        assert soundfile.info(path).frames == samples
    assert (tmp_path / "in" / "s" / "direct.wav") in [p for p, _ in entries]
    sources = [line.split("\t")[3] for line in (tmp_path / "out" / "parts.tsv").read_text().splitlines()[1:]]
    assert "s/tab\\tinside.wav" in sources


def test_output_inside_the_input_is_not_read_back(tmp_path) -> None:
    tone(tmp_path / "a.wav", 1.0, 8000)
    tone(tmp_path / "b.wav", 1.0, 8000)
    for _ in range(2):
        assert make_manifest(tmp_path, tmp_path / "out")["recordings"] == 2


def speakers_folder(folder: Path, count: int, files: int = 6) -> Path:
    for speaker in range(count):
        for index in range(files):
            tone(folder / f"s{speaker}" / "chapter" / f"{index}.wav", 0.5, hertz=200 + 50 * index)
    return folder


def test_valid_is_whole_speakers_where_there_are_several(tmp_path) -> None:
    source = speakers_folder(tmp_path / "in", 10)
    summary = make_manifest(source, tmp_path / "out", options=Options(valid_percent=20))
    speakers = {s: {p.relative_to(source).parts[0] for p, _ in read_tsv(tmp_path / "out" / f"{s}.tsv")} for s in ("train", "valid")}
    assert len(speakers["valid"]) == 2 and len(speakers["train"]) == 8
    assert not speakers["train"] & speakers["valid"] and summary["valid_folders"] == sorted(speakers["valid"])
    other = make_manifest(source, tmp_path / "out2", options=Options(valid_percent=20, seed=2))
    assert other["valid_folders"] != summary["valid_folders"]


@pytest.mark.parametrize(("split_by", "folders"), [("auto", 2), ("file", 4)])
def test_split_by_file(tmp_path, split_by, folders) -> None:
    source = speakers_folder(tmp_path / "in", folders, 20 // folders)
    summary = make_manifest(source, tmp_path / "out", options=Options(valid_percent=10, split_by=split_by))
    train, valid = (read_tsv(tmp_path / "out" / f"{s}.tsv") for s in ("train", "valid"))
    assert (len(train), len(valid)) == (18, 2) and not set(train) & set(valid) and summary["split_by"] == "file"


def test_folder_level_names_the_speaker(tmp_path) -> None:
    speakers_folder(tmp_path / "in" / "subset-a", 3, 2)
    speakers_folder(tmp_path / "in" / "subset-b", 3, 2)
    summary = make_manifest(tmp_path / "in", tmp_path / "out", options=Options(folder_level=2))
    assert len(summary["valid_folders"]) == 1 and summary["valid_folders"][0].count("/") == 1


def test_a_pattern_names_the_speaker_in_a_flat_folder(tmp_path) -> None:
    for name in ("0_ann_0", "0_ann_1", "0_bob_0", "0_bob_1", "noise"):
        tone(tmp_path / "in" / f"{name}.wav", 1.0)
    words = ["manifest", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--speaker-pattern", "_([a-z]+)_", "--valid-speakers", "bob"]
    assert main(words) == 0
    found = {split: {path.name for path, _ in read_tsv(tmp_path / "out" / f"{split}.tsv")} for split in ("train", "valid")}
    assert found == {"train": {"0_ann_0.wav", "0_ann_1.wav"}, "valid": {"0_bob_0.wav", "0_bob_1.wav"}}
    assert "noise.wav\tno speaker: " in (tmp_path / "out" / "left_out.tsv").read_text()
    assert main([*words, "--join", "2"]) == 0  # each utterance has one speaker
    rows = [line.split("\t") for line in (tmp_path / "out" / "parts.tsv").read_text().splitlines()[1:]]
    assert sorted((row[0].split("/")[0], row[3]) for row in rows) == [(n.split("_")[1], n) for n in sorted(found["train"] | found["valid"])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--valid-speakers", "bob"], "--speaker-pattern, such as '_([a-z]+)_'"),
        (["--speaker-pattern", "("], "--speaker-pattern '(' is not a regular expression"),
        (["--speaker-pattern", "X+"], "names no speaker in any of 2 paths, such as 0_ann_0.wav"),
        (["--speaker-pattern", "[a-z]+", "--folder-level", "2"], "give one of them"),
    ],
)
def test_speakers_of_a_flat_folder_that_cannot_be(tmp_path, options, said, capsys) -> None:
    for name in ("0_ann_0", "0_bob_0"):
        tone(tmp_path / "in" / f"{name}.wav", 1.0)
    assert main(["manifest", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_split_by_folder_needs_two(tmp_path) -> None:
    with pytest.raises(UserError, match="needs two folders"):
        make_manifest(speakers_folder(tmp_path / "in", 1), tmp_path / "out", options=Options(split_by="folder"))
    assert not (tmp_path / "out").exists()


def by_speaker(out: Path, split: str) -> set[str]:
    return {path.parent.name for path, _ in read_tsv(out / f"{split}.tsv")}


def test_speakers_by_name(tmp_path, capsys) -> None:
    for speaker in "abcdef":
        tone(tmp_path / "in" / speaker / "1.wav", 1.0)
    listed = tmp_path / "valid.txt"
    listed.write_text("b\nc\n")
    out = tmp_path / "out"
    assert main(["manifest", str(tmp_path / "in"), "--out", str(out), "--valid-speakers", str(listed), "--test-speakers", "a, f"]) == 0
    assert [by_speaker(out, split) for split in ("train", "valid", "test")] == [{"d", "e"}, {"b", "c"}, {"a", "f"}]
    summary = json.loads((out / "manifest.json").read_text())
    assert summary["valid_folders"] == ["b", "c"] and summary["test_folders"] == ["a", "f"]
    assert "test 2 utterances" in capsys.readouterr().out
    # valid is drawn from those that are left
    make_manifest(tmp_path / "in", out, options=Options(test_speakers=("a", "f"), valid_percent=25))
    assert by_speaker(out, "test") == {"a", "f"} and len(by_speaker(out, "valid")) == 1
    make_manifest(tmp_path / "in", out)
    assert not (out / "test.tsv").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--valid-speakers", "annn"], "unknown speaker in {source} 'annn' - did you mean 'ann'?"),
        (["--valid-speakers", "ann", "--test-speakers", "bob,ann"], "'ann' is named twice"),
        (["--valid-speakers", "ann", "--test-speakers", "bob"], "name all speakers of {source}"),
        (["--valid-speakers", "ann", "--split-by", "file"], "--split-by file does not go with named speakers"),
        (["--test-speakers", ","], "names no speaker"),
    ],
)
def test_speakers_that_cannot_be(tmp_path, options, said, capsys) -> None:
    for speaker in ("ann", "bob"):
        tone(tmp_path / "in" / speaker / "1.wav", 1.0)
    assert main(["manifest", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said.format(source=tmp_path / "in") in error
    assert not (tmp_path / "out").exists()


def test_what_was_checked_is_kept_before_the_checks_end(tmp_path, monkeypatch) -> None:
    """A brief file before the first usable one waits for it; an interrupted run loses neither."""
    tone(tmp_path / "in" / "a.wav", 0.05)
    for name in "bcd":
        tone(tmp_path / "in" / f"{name}.wav", 1.0)

    def stops(path: Path) -> Checked:
        if path.name == "d.wav":
            raise KeyboardInterrupt
        return check(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checking, "check", stops)
        make_manifest(tmp_path / "in", tmp_path / "out", options=Options(workers=1))
    checked: list[str] = []
    monkeypatch.setattr(checking, "check", lambda path: checked.append(path.name) or check(path))
    assert make_manifest(tmp_path / "in", tmp_path / "out")["recordings"] == 3
    assert checked == ["d.wav"]


def test_join(tmp_path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "in"
    for speaker in ("a", "b"):
        for index in range(30):
            tone(source / speaker / f"{index}.wav", float(rng.uniform(0.2, 0.8)), 8000, hertz=300)
            (source / speaker / f"{index}.txt").write_text(f"{speaker} {index}\n")
    options = Options(join=3.0, seed=5)
    make_manifest(source, tmp_path / "out", options=options)
    entries = [e for s in ("train", "valid") for e in read_tsv(tmp_path / "out" / f"{s}.tsv")]
    rows = [line.split("\t") for line in (tmp_path / "out" / "parts.tsv").read_text().splitlines()[1:]]
    assert sorted(r[3] for r in rows) == sorted(f"{s}/{i}.wav" for s in "ab" for i in range(30))
    assert all(1.5 <= n / 16000 <= 4.5 for _, n in entries)
    root = Path((tmp_path / "out" / "train.tsv").read_text().splitlines()[0])
    for path, samples in entries:
        own = [r for r in rows if root / r[0] == path]
        assert {r[3].split("/")[0] for r in own} == {path.parent.name}  # one folder only
        assert float(own[0][1]) == 0 and float(own[-1][2]) == pytest.approx(samples / 16000, abs=1e-5)
        assert all(a[2] == b[1] for a, b in zip(own, own[1:]))
        assert [r[4] for r in own] == [f"{r[3].split('/')[0]} {Path(r[3]).stem}" for r in own]
        assert soundfile.info(path).frames == samples
    assert [Path(r[3]).stem for r in rows if r[3].startswith("a/")] != [str(i) for i in range(30)]  # shuffled
    make_manifest(source, tmp_path / "same", tmp_path / "c2", options)
    same = [line.split("\t")[1:] for line in (tmp_path / "same" / "parts.tsv").read_text().splitlines()[1:]]
    assert same == [r[1:] for r in rows]


def test_transcripts_of_each_layout(tmp_path) -> None:
    for name in ("x/1.wav", "x/2.wav", "x/7_x_3.wav", "103/1240/103-1240-0000.flac", "x/none.wav"):
        tone(tmp_path / name, 0.5)
    (tmp_path / "transcripts.tsv").write_text("x/1.wav\tfrom the table\n")
    (tmp_path / "x" / "2.lab").write_text("from\na label\n")
    (tmp_path / "103" / "1240" / "103-1240.trans.txt").write_text("103-1240-0000 CHAPTER ONE\n")
    summary = make_manifest(tmp_path, tmp_path / "out")
    rows = (line.split("\t") for line in (tmp_path / "out" / "parts.tsv").read_text().splitlines()[1:])
    assert {r[3]: r[4] for r in rows} == {
        "x/1.wav": "from the table", "x/2.wav": "from a label", "x/7_x_3.wav": "seven",
        "103/1240/103-1240-0000.flac": "CHAPTER ONE", "x/none.wav": "",
    }  # fmt: skip
    assert summary["transcribed"] == 4


def test_fairseq_reads_it(tmp_path) -> None:
    dataset = pytest.importorskip("fairseq.data.audio.hubert_dataset")
    make_manifest(speakers_folder(tmp_path / "in", 4, 3), tmp_path / "out")
    for split, count in (("train", 9), ("valid", 3)):
        root, names, _, total, sizes = dataset.load_audio(str(tmp_path / "out" / f"{split}.tsv"), None, None)
        assert total == len(names) == count and set(sizes) == {8000} and (Path(root) / names[0]).is_file()


def test_real_recordings(fsdd, tmp_path, capsys) -> None:
    assert main(["manifest", str(fsdd), "--out", str(tmp_path), "--join", "4", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["recordings"], summary["left_out"], summary["transcribed"]) == (2000, 0, 2000)
    entries = [e for s in ("train", "valid") for e in read_tsv(tmp_path / f"{s}.tsv")]
    assert sum(n for _, n in entries) / 16000 / 60 == pytest.approx(13.4, abs=0.05)
    assert 3.8 < np.mean([n for _, n in entries]) / 16000 < 4.2
    rows = [line.split("\t") for line in (tmp_path / "parts.tsv").read_text().splitlines()[1:]]
    digits = "zero one two three four five six seven eight nine".split()
    assert all(r[4] == digits[int(Path(r[3]).name[0])] for r in rows)
