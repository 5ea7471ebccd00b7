"""Whatever ends the lines of a manifest, of labels or of a dictionary: an utterance has its own labels, or there is one line of error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq.tasks.hubert_pretraining import LabelEncoder  # noqa: E402

from fairseq_plugins.data import checks  # noqa: E402
from fairseq_plugins.data.dataset import SeededHubertDataset  # noqa: E402
from fairseq_plugins.tasks.safe import SafeTask  # noqa: E402
from hubert_eff.data.transcripts import Transcripts  # noqa: E402
from hubert_eff.data.tsv import read_manifest  # noqa: E402
from hubert_eff.recognition.transcripts import read_transcripts  # noqa: E402

COUNT, SAMPLES, FRAMES = 9, 2000, 11
LABELS = [[(7 * i + j * j) % 12 for j in range(FRAMES)] for i in range(COUNT)]  # of one and of two digits

Bytes = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of one length, whose first sample says which each is."""
    folder = tmp_path_factory.mktemp("audio")
    for i in range(COUNT):
        soundfile.write(folder / f"{i}.wav", np.full(SAMPLES, (i + 1) / 100), 16_000, subtype="FLOAT")
    return folder


@pytest.fixture
def data(audio: Path, tmp_path: Path) -> Path:
    (tmp_path / "train.tsv").write_text(f"{audio}\n" + "".join(f"{i}.wav\t{SAMPLES}\n" for i in range(COUNT)))
    (tmp_path / "train.km").write_text("".join(" ".join(map(str, labels)) + "\n" for labels in LABELS))
    (tmp_path / "dict.km.txt").write_text("".join(f"{i} {i + 5}\n" for i in range(12)))
    return tmp_path


def opened(data: Path) -> SeededHubertDataset:
    """The data set as the task opens it."""
    dictionary = checks.read_dictionary(data / "dict.km.txt")
    manifest, labels = checks.check_split(data, data, "train", ["km"], 100.0, 16_000, [dictionary], None, None, False)
    return SeededHubertDataset(manifest, labels, 16_000, 100.0, [1], [2], [LabelEncoder(dictionary)], seed=1)


def assert_own_labels(dataset: SeededHubertDataset) -> None:
    found = [dataset[i] for i in range(COUNT)]
    assert [(round(100 * float(item["source"][0])) - 1, (item["label_list"][0] - 4).tolist()) for item in found] == list(enumerate(LABELS))


def between(old: bytes, new: bytes, place: int = 3) -> Bytes:
    """Put something in place of the `place`-th of what is there."""

    def change(raw: bytes) -> bytes:
        parts = raw.split(old)
        return old.join(parts[:place]) + new + old.join(parts[place:])

    return change


READ: dict[str, Bytes] = {
    "CRLF": lambda raw: raw.replace(b"\n", b"\r\n"),
    "CRLF of some lines": between(b"\n", b"\r\n"),
    "byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "no last line feed": lambda raw: raw[:-1],
    "spaces before the ends": lambda raw: raw.replace(b"\n", b"  \n"),
    "tabs before the ends": lambda raw: raw.replace(b"\n", b"\t\n"),
    "all of these": lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b" \r\n")[:-2],
}
REFUSED: dict[str, Bytes] = {
    "CR": lambda raw: raw.replace(b"\n", b"\r"),
    "CR of one line": between(b"\n", b"\r"),
    "CR in a line": between(b"1", b"1\r"),
    "CR CR LF": between(b"\n", b"\r\r\n"),
    "empty line": between(b"\n", b"\n\n"),
    "blank line": between(b"\n", b"\n \n"),
    "empty last line": lambda raw: raw + b"\n",
    "no content": lambda raw: b"",
    "form feed": between(b"\n", b"\x0c\n"),
    "vertical tab": between(b"\n", b"\x0b"),
    "file separator": between(b"\n", b"\x1c"),
    "record separator in a line": between(b"1", b"1\x1e"),
    "next line": between(b"\n", "\u0085".encode()),
    "line separator": between(b"\n", "\u2028".encode()),
    "paragraph separator in a line": between(b"1", "1\u2029".encode()),
    "NUL": between(b"\n", b"\0\n"),
    "escape": between(b"1", b"\x1b[31m1"),
    "Latin-1": between(b"1", b"\xe9 1"),
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "half a character": lambda raw: raw + b"\xe2\x80",
    "full-width digits": between(b"1", "\uff11".encode()),
    "superscript": between(b"1", "\u00b2".encode()),
    "5000 digits": between(b"1", b"1" * 5000),
    "5000 zeros": between(b"1", b"0" * 5000 + b"1"),
    "minus": between(b"1", b"-1"),
    "exponent": between(b"1", b"1e5"),
    "lost": lambda raw: raw.split(b"\n", 2)[2],
}
FILES = ("train.tsv", "train.km", "dict.km.txt")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", READ)
def test_files_that_are_read(kind: str, file: str, data: Path) -> None:
    (data / file).write_bytes(READ[kind]((data / file).read_bytes()))
    assert_own_labels(opened(data))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(kind: str, file: str, data: Path) -> None:
    root, separator, rows = (data / file).read_bytes().partition(b"\n")  # (the root of the manifest may hold digits)
    changed = REFUSED[kind](rows if file == "train.tsv" else root + separator + rows)
    (data / file).write_bytes(root + separator + changed if file == "train.tsv" else changed)
    with pytest.raises(UserError) as caught:
        opened(data)
    message = str(caught.value)
    assert file in message and message.isprintable() and len(message) < 500


def test_names_beyond_ascii_are_read(data: Path, audio: Path) -> None:
    name = "\u97f3\u3000\u00e9 .wav"
    os.link(audio / "0.wav", audio / name)
    table = data / "train.tsv"
    table.write_text(table.read_text().replace("\n0.wav", f"\n{name}"), encoding="utf-8")
    assert_own_labels(opened(data))


@pytest.mark.parametrize("kind", ["replaced", "cut", "gone", "touched"])
def test_labels_that_change_while_training_runs_end_it(kind: str, data: Path) -> None:
    dataset, file = opened(data), data / "train.km"
    raw = file.read_bytes()
    if kind == "touched":
        file.write_bytes(raw)
        assert_own_labels(dataset)
        return
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[:60] if kind == "cut" else raw[::-1])
    batch = dataset.collater([dataset[7], dataset[8]])
    with pytest.raises(UserError, match="train.km (has changed since it was checked|cannot be read any more).*run the same command again"):
        SafeTask.note_unreadable(None, batch)  # type: ignore[arg-type]


def test_letters_are_of_their_utterances(data: Path) -> None:
    said = [f"{'abc'[i % 3]} b | c" for i in range(COUNT)]
    for change in READ.values():
        (data / "train.ltr").write_bytes(change("".join(f"{line}\n" for line in said).encode()))
        assert read_transcripts(read_manifest(data / "train.tsv"), data, "ltr")[0] == [f"{'abc'[i % 3]}b c" for i in range(COUNT)]
    for kind in ("CR", "CR of one line", "empty line", "form feed", "next line", "line separator", "Latin-1", "UTF-16"):
        change = REFUSED[kind]
        (data / "train.ltr").write_bytes(change("".join(f"{line} 1\n" for line in said).encode()))
        with pytest.raises(UserError, match="train.ltr"):
            read_transcripts(read_manifest(data / "train.tsv"), data, "ltr")
    (data / "train.wrd").write_text("one two\n" * COUNT)  # words: "onetwo" would be learned
    with pytest.raises(UserError, match="train.wrd, line 1: expected letters with spaces between them, .* found 'one'"):
        read_transcripts(read_manifest(data / "train.tsv"), data, "wrd")


def test_transcripts_of_recordings_are_whole_or_none(tmp_path: Path) -> None:
    rows = ["a.wav\tone", "b.wav\ttwo\u2028three\u0085four", "c.wav\tfi\x0cve", "d.wav\tsix", "d.wav\tseven"] + 2 * ["e.wav\teight"]
    wanted = {"a.wav": "one", "b.wav": "two three four", "c.wav": "fi ve", "d.wav": "", "e.wav": "eight", "f.wav": "", "g.wav": "g\u00e9"}
    table = "\n".join(rows).encode() + b"\nf.wav\tcaf\xe9\n"
    (tmp_path / "f.txt").write_bytes(b"not this")  # the table comes first
    (tmp_path / "g.txt").write_bytes("\ufeffg\u00e9\r\n".encode())
    (tmp_path / "h.lab").write_bytes(b"caf\xe9")
    for ends in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "transcripts.tsv").write_bytes(b"\xef\xbb\xbf" + table.replace(b"\n", ends))
        found = Transcripts(tmp_path)
        assert {name: found.find(name) for name in wanted} == wanted and found.find("h.wav") == ""
