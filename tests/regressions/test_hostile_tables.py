"""Tables and manifests of others, damaged in every way: a right result or one line that names the file, never a traceback."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubert_eff.cli import main
from hubert_eff.data.lhotse_kaldi import read_import
from hubert_eff.data.sources import Listing
from hubert_eff.data.transcripts import Transcripts
from hubert_eff.data.tsv import read_manifest, read_parts
from hubert_eff.errors import UserError
from hubert_eff.labels.classes import read_dictionary, read_labels
from hubert_eff.labels.make import make_labels
from hubert_eff.labels.quality import _read_alignments, _sources, label_quality
from hubert_eff.labels.record import read_record

RECORDING = {
    "id": "A", "sources": [{"type": "file", "channels": [0], "source": "a.flac"}], "sampling_rate": 16000, "num_samples": 96000,
    "duration": 6.0, "channel_ids": [0],
}  # fmt: skip
SAID = {"id": "A-1", "recording_id": "A", "start": 0.5, "duration": 2.0, "channel": 0, "text": "one two", "speaker": "S"}
CUT = {"id": "c", "start": 0.5, "duration": 1, "channel": 0, "supervisions": [SAID], "recording": RECORDING, "type": "MonoCut"}
SUMMARY = '{"source": "/corpus"}'
PARTS = "utterance\tstart\tend\tsource\ttranscript\tsource_start\nu.wav\t0\t1.5\ta.wav\tone two\t0\nu.wav\t1.5\t2\tb.wav\tthree\t0\n"
RECORD = {
    "rate": 100.0, "k": 3, "source": "mfcc", "manifest": "/m", "splits": {"train": {"tsv_sha256": "0", "km_sha256": "0"}},
}  # fmt: skip


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def of_source(**keys: Any) -> dict[str, Any]:
    return RECORDING | {"sources": [RECORDING["sources"][0] | keys]}


# -- values --------------------------------------------------------------------------------------------------------------

NESTED = "[" * 100_000
HALF = "\ud800"  # of a surrogate pair
NO_NUMBERS = [None, True, "1", "\u00b2", "\uff11", math.nan, math.inf, -1, 10**400, 1e300, [1], {"a": 1}]
NO_TEXTS = [True, 1.5, ["x"], {"a": 1}, HALF]
BAD_LHOTSE: dict[str, list[Any]] = {
    "duration": [RECORDING | {"duration": value} for value in NO_NUMBERS],
    "start": [CUT | {"start": value} for value in NO_NUMBERS],
    "a supervision's start": [CUT | {"supervisions": [SAID | {"start": value}]} for value in NO_NUMBERS if value != -1],
    "id": [RECORDING | {"id": value} for value in [*NO_TEXTS, None, ""]] + [CUT | {"id": value} for value in [*NO_TEXTS, None, ""]],
    "text": [CUT | {"supervisions": [SAID | {"text": value}]} for value in NO_TEXTS],
    "speaker": [CUT | {"supervisions": [SAID | {"speaker": value}]} for value in NO_TEXTS],
    "supervisions": [CUT | {"supervisions": value} for value in ("x", 1, {"a": 1}, [1], [[]])],
    "sources": [RECORDING | {"sources": value} for value in (None, "x", 1, {}, [1], [])],
    "channels": [of_source(channels=value) | {"channel_ids": None} for value in (None, 1, "0", {"0": 0}, [0, 1], [])],
    "path": [of_source(source=value) for value in (None, 1, "", " ", "a\0b", HALF)],
    "kind": [of_source(type=value) for value in (None, 1, ["file"], "x" * 10_000)],
    "no object": [1, "x", None, True, [], [RECORDING], {}, {"type": 1}, {"type": ["MonoCut"]}],
    "cut of no recording": [CUT | {"recording": value} for value in (None, 1, "A", [], {})],
}


def refused(function: Callable[[], object], *files: str) -> str:
    """The line that something is refused with; it names one of the files."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700 and any(file in message for file in files)
    return message


@pytest.mark.parametrize("kind", BAD_LHOTSE)
def test_values_that_lhotse_does_not_write(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for entry in BAD_LHOTSE[kind]:
        file.write_text(lines(entry))
        message = refused(lambda: read_import(file), "x.jsonl")
        assert "line 1" in message or "first line" in message


@pytest.mark.parametrize(
    "text",
    [NESTED, '{"id": ' + NESTED, lines(RECORDING) + '{"id": ' + "9" * 5000 + "}", lines(RECORDING)[:-10], "\ufeff\ufeff{}", "{}\0", "'"],
    ids=["nested", "nested value", "5000 digits", "cut off", "two marks", "NUL", "quote"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_lines_that_are_no_json(text: str, compressed: bool, tmp_path: Path) -> None:
    file = tmp_path / ("x.jsonl.gz" if compressed else "x.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    message = refused(lambda: read_import(file), file.name)
    assert "cannot be read as JSON lines" in message and f"line {text.count(chr(10)) + 1}" in message


def test_what_expands_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hubert_eff.data import lines as module

    monkeypatch.setattr(module, "LONGEST", 1 << 16)
    file = tmp_path / "x.jsonl.gz"
    for content, said in ((b" " * (1 << 20), "longer than"), (b"\n" * 10_000, "blank lines")):
        file.write_bytes(gzip.compress(content))
        assert said in refused(lambda: read_import(file), "x.jsonl.gz")
    table = tmp_path / "train.tsv"
    table.write_bytes(b"/root\n" + b"a" * (1 << 17) + b"\t5\n")
    assert "line 2 is longer than" in refused(lambda: read_manifest(table), "train.tsv")


def test_what_lhotse_may_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = [SAID | {"text": "one\u2028two\x85 \x01three\t\n"}, SAID | {"start": -0.25, "text": None, "speaker": None, "id": 7}]
    raw = json.dumps(CUT | {"id": 12, "supervisions": said}, ensure_ascii=False)  # line separators as they are
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"\n{raw}\r\n\n".encode())
    listing = read_import(tmp_path / "x.jsonl")
    assert listing is not None
    (item,) = listing.items
    assert (item.name, item.text, item.speaker, item.start, item.end) == ("12", "one two three", "S", 0.5, 1.5)
    assert item.path == str(tmp_path / "a.flac")


def test_a_pipe_is_not_waited_for_and_half_of_a_pair_is_not_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "train.tsv")
    assert read_import(tmp_path) is None
    refused(lambda: read_manifest(tmp_path / "train.tsv"), "train.tsv")
    (tmp_path / "recordings.jsonl").write_text(lines(RECORDING))
    (tmp_path / "supervisions.jsonl.gz").write_bytes(gzip.compress(lines(SAID).encode())[:20])
    refused(lambda: read_import(tmp_path), "supervisions.jsonl.gz")


NUMBERS = ["\u00b2", "\uff11", "1_0", "0x10", "nan", "infinity", "1" * 5000, "1e400", "1e9", "--1", "1,5", "1.2.3", "+", "."]


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_of_seconds_are_decimal(number: str, tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("A a.wav\n")
    (tmp_path / "utt2dur").write_text(f"A {number}\n")
    assert "line 1" in refused(lambda: read_import(tmp_path), "utt2dur")
    (tmp_path / "segments").write_text(f"u A 0 1\nv A 0.5 {number}\n")
    assert "line 2" in refused(lambda: read_import(tmp_path), "segments")
    (tmp_path / "alignments.tsv").write_text(f"path\ttier\tstart\tend\tlabel\na\tphone\t0\t{number}\tx\n")
    assert "line 2" in refused(lambda: _read_alignments(tmp_path / "alignments.tsv"), "alignments.tsv")
    (tmp_path / "manifest.json").write_text(SUMMARY)
    (tmp_path / "parts.tsv").write_text(PARTS.replace("1.5\ta", f"{number}\ta"))
    assert "line 2" in refused(lambda: _sources(tmp_path), "parts.tsv")


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "1", '"x"', "{", "{} {}", NESTED, '{"rate": ' + NESTED, '{"k": ' + "9" * 5000 + "}", '{"rate": NaN}',
        '{"rate": -1}', '{"rate": 0}', '{"rate": "100"}', '{"rate": true}', '{"rate": [100]}', '{"k": 0}', '{"k": 1e5}', '{"k": "3"}',
        '{"k": 10000000000}',
        '{"splits": "train"}', '{"splits": [1]}', '{"splits": {"train": 1}}', '{"splits": {"../train": {}}}', '{"splits": ["/train"]}',
        "\0", "\ud800",
    ],
)  # fmt: skip
def test_records_that_are_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(lambda: read_record(tmp_path), "labels.json")
    (tmp_path / "alignments.tsv").write_text("a\tphone\t0\t1\tx\n")
    assert main(["labels", "quality", str(tmp_path), "--alignments", str(tmp_path / "alignments.tsv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_parts_that_are_malformed(tmp_path: Path) -> None:
    file = tmp_path / "parts.tsv"
    row = PARTS.splitlines(keepends=True)[1]
    for text, said in {
        "": "is empty",
        "utterance\n": "lacks a column",
        PARTS.replace("transcript", "start"): "lacks a column",
        PARTS.replace("\tone two\t", "\tone\ttwo\t"): "line 2: expected 6 columns, found 7",
        PARTS.replace("\tthree\t0", ""): "line 3: expected 6 columns, found 4",
        PARTS.replace("one two", "x\u2028y"): "line 2 holds the character U+2028",
        PARTS + PARTS: "line 5: 'u.wav' was there before|line 4: 'utterance'",
        PARTS + row.replace("u.wav", "v.wav") + row: "line 5: 'u.wav' was there before",
    }.items():
        file.write_text(text)
        message = refused(lambda: list(read_parts(file, ("utterance", "transcript"))), "parts.tsv")
        assert any(part in message for part in said.split("|"))
    file.write_text(PARTS.replace("one two", '"' + "x" * 200_000))  # the field limit of the csv module is 131,072
    assert [len(row["transcript"]) for _, row in read_parts(file, ("transcript",))] == [200_001, 5]


def test_tables_of_phones_and_clusters_are_of_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(RECORD | {"k": 1_000_000}))
    (tmp_path / "alignments.tsv").write_text("".join(f"a\tphone\t0\t1\tx{i}\n" for i in range(100)))
    assert "too many for 1000000 clusters" in refused(lambda: label_quality(tmp_path, tmp_path / "alignments.tsv"), "alignments.tsv")


# -- mutations -----------------------------------------------------------------------------------------------------------

NASTY = [
    b"\0", b"\r", b"\n", b"\r\n", b"\n\n", b"\t", b" ", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xff", b"\x1b[2J", b"\xef\xbb\xbf", b"\xc3",
    "\u0085".encode(), "\u2028".encode(), "\u00b2".encode(), "\uff11".encode(), "\u202e".encode(), b"-", b"1e5", b"nan", b"9" * 5000, b"|",
    b'"', b"{", b"[", b"]", b",", b"\\ud800", b"\\u0000", b"null", b"true", b"[" * 2000, b"../", b"0",
]  # fmt: skip


def mutated(raw: bytes, r: random.Random) -> bytes:
    for _ in range(r.randint(1, 3)):
        start = r.randrange(len(raw) + 1)
        end = min(len(raw), start + r.randint(0, 6))
        match r.randrange(6):
            case 0:
                raw = raw[:start] + r.choice(NASTY) + raw[start:]
            case 1:
                raw = raw[:start] + r.choice(NASTY) + raw[end:]
            case 2:
                raw = raw[:start] + bytes(r.randrange(256) for _ in range(end - start)) + raw[end:]
            case 3:
                raw = raw[:start] + raw[end:]
            case 4:
                raw = raw[: r.choice([start, len(raw)])]
            case _:
                rows = raw.splitlines(keepends=True)
                r.shuffle(rows)
                raw = b"".join(rows + rows[:1])
    return raw


def check_listing(listing: Listing | None) -> None:
    names = set()
    for item in listing.items if listing else ():
        assert item.name and item.name not in names and os.path.isabs(item.path) and "\0" not in item.path
        names.add(item.name)
        (item.name + item.text + item.speaker).encode()
        assert item.text == " ".join(item.text.split()) and 0 <= item.start < 1e9 and (item.end is None or item.start < item.end < 2e9)


def rows_of(raw: bytes) -> list[list[str]]:
    """The words of each line, read another way."""
    text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    rows = text.split("\n")
    return [row.split() for row in (rows[:-1] if not rows[-1] else rows)]


def manifest_of(folder: Path, raw: bytes) -> None:
    found = read_manifest(folder / "train.tsv")
    rows = [row.split("\t") for row in raw.removeprefix(b"\xef\xbb\xbf").decode().split("\n")[1:] if row]
    assert found.entries == tuple((row[0], int(row[1])) for row in rows)


def labels_of(folder: Path, raw: bytes) -> None:
    found = read_labels(folder / "train.km", {"0", "1", "2"}, "dict.km.txt")
    assert [found.line(i).split() for i in range(len(found))] == rows_of(raw) and found.counts.tolist() == list(map(len, rows_of(raw)))


def dictionary_of(folder: Path, raw: bytes) -> None:
    assert [[name, count] for name, count in read_dictionary(folder / "dict.km.txt")] == [[row[0], int(row[1])] for row in rows_of(raw)]


def folder_of(folder: Path, raw: bytes) -> None:
    check_listing(read_import(folder))


def transcripts_of(folder: Path, raw: bytes) -> None:
    for name in ("a.wav", "x"):
        text = Transcripts(folder).find(name)
        assert text == " ".join(text.split()) and text.encode() is not None


READERS: dict[str, tuple[str, bytes, Callable[[Path, bytes], object]]] = {
    "manifest": ("train.tsv", b"/data/audio\na.wav\t16000\nb/c d.flac\t400\n\xc3\xa9.wav\t99\n", manifest_of),
    "labels": ("train.km", b"0 1 2 1 0\n2 2\n1\n", labels_of),
    "dictionary": ("dict.km.txt", b"0 12\n1 5\n2 0\n", dictionary_of),
    "record": ("labels.json", json.dumps(RECORD, indent=1).encode(), lambda folder, raw: read_record(folder)),
    "parts": ("parts.tsv", PARTS.encode(), lambda folder, raw: _sources(folder)),
    "alignments": ("phones.tsv", b"a.wav\tphone\t0\t0.5\tx\na.wav\tword\t0\t1\txy\n", lambda f, raw: _read_alignments(f / "phones.tsv")),
    "cuts": ("x.jsonl", lines(CUT, CUT | {"id": "d"}).encode(), lambda folder, raw: check_listing(read_import(folder / "x.jsonl"))),
    "recordings": ("recordings.jsonl", lines(RECORDING).encode(), folder_of),
    "supervisions": ("supervisions.jsonl", lines(SAID, SAID | {"id": "B"}).encode(), folder_of),
    "compressed": ("x.jsonl.gz", gzip.compress(lines(CUT).encode(), mtime=0), lambda f, raw: check_listing(read_import(f / "x.jsonl.gz"))),
    "scp": ("wav.scp", b"A a.wav\nB /b c.wav\n", folder_of),
    "segments": ("segments", b"A-1 A 0 1.5\nA-2 A 1 -1\n", folder_of),
    "text": ("text", b"A one two\nB\n", folder_of),
    "transcripts": ("transcripts.tsv", b"a.wav\tone two\nb.wav\tthree\n", transcripts_of),
}
BESIDE = {
    "parts": {"manifest.json": SUMMARY}, "recordings": {"supervisions.jsonl": lines(SAID)},
    "supervisions": {"recordings.jsonl": lines(RECORDING)}, "segments": {"wav.scp": "A a.wav\n", "utt2spk": "A-1 s\n"},
    "text": {"wav.scp": "A a.wav\n"},
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_mutations(reader: str, tmp_path: Path) -> None:
    name, raw, read = READERS[reader]
    for beside, text in BESIDE.get(reader, {}).items():
        (tmp_path / beside).write_text(text)
    (tmp_path / name).write_bytes(raw)
    read(tmp_path, raw)  # as it is, it is read
    r = random.Random(reader)
    taken = 0
    for _ in range(200):
        changed = mutated(raw, r)
        (tmp_path / name).write_bytes(changed)
        try:
            read(tmp_path, changed)
            taken += 1
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 700 and str(tmp_path) in message, (changed, message)
    assert taken < 200 or reader == "transcripts"


def test_a_path_of_any_length_is_named_in_a_short_line(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"{split}.tsv").write_text(f"{tmp_path}\n{'x' * 131_073}\t16000\n")
    with pytest.raises(UserError, match="cannot be read any more") as caught:
        make_labels(tmp_path, tmp_path / "labels", clusters=5)
    assert len(str(caught.value)) < 400
