"""Files that go on behind what a decoder reads of them are left out by name; what is not audio behind them is passed over."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.data.audio import Unusable, check

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0.0, 0.1, 16_000)
FORMATS = {"wav": {}, "flac": {}, "ogg": {}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {}}
TAG = b"TAG" + b"x" * 125  # ID3v1
PREFIX = b"ID3\x04\0\0\0\0\x0a\0" + bytes(1280)  # ID3v2


def encoded(suffix: str, rate: int = 16_000, samples: np.ndarray = NOISE, **options: object) -> bytes:
    """A sound file, as bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": suffix.upper(), **FORMATS[suffix], **options})  # type: ignore[arg-type]
    return file.getvalue()


def put(folder: Path, suffix: str, content: bytes) -> Path:
    """Write a file."""
    path = folder / f"a.{suffix}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_two_of_them_are_named(suffix: str, tmp_path: Path) -> None:
    one = encoded(suffix)
    with pytest.raises(Unusable, match="several streams in one file"):
        check(put(tmp_path, suffix, one + one))
    with pytest.raises(Unusable, match="several streams in one file"):  # the name does not decide
        check(put(tmp_path, "wav", one + one))


def test_two_mp3_streams_with_tags_or_of_two_rates_are_named(tmp_path: Path) -> None:
    one = encoded("mp3")
    for content in (one + PREFIX + one, PREFIX + one + TAG + one, one + encoded("mp3", 44_100, np.tile(NOISE, 2))):
        with pytest.raises(Unusable, match=r"several streams in one file.*1.00 instead of (1\.[89]|2\.)"):
            check(put(tmp_path, "mp3", content))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("behind", [TAG, RNG.bytes(5000)])
def test_one_with_a_tag_or_a_little_junk_behind_it_is_used_as_a_whole(suffix: str, behind: bytes, tmp_path: Path) -> None:
    one = encoded(suffix)
    if suffix == "opus" and behind != TAG:  # libsndfile refuses that
        with pytest.raises(Unusable, match="not readable as audio"):
            check(put(tmp_path, suffix, one + behind))
        return
    assert check(put(tmp_path, suffix, one + behind)).frames == 16_000
    if suffix in ("mp3", "flac"):
        assert check(put(tmp_path, suffix, PREFIX + one + behind)).frames == 16_000


def test_headers_that_count_less_than_there_is_are_named(tmp_path: Path) -> None:
    wav, flac = encoded("wav"), encoded("flac")
    at = wav.index(b"data") + 4
    for length in (0, 16_000, 16_001):  # as a recorder leaves it that was switched off
        with pytest.raises(Unusable, match=f"more than its header says: {length} bytes"):
            check(put(tmp_path, "wav", wav[:at] + struct.pack("<I", length) + wav[at + 4 :]))
    for count in (0, 8_000):
        changed = flac[:21] + bytes([flac[21] & 0xF0]) + count.to_bytes(4, "big") + flac[26:]
        with pytest.raises(Unusable, match=f"more than its header says: {count} samples, but its frames hold 16000"):
            check(put(tmp_path, "flac", changed))


def test_chunks_behind_the_samples_of_a_wav_file_are_no_junk(tmp_path: Path) -> None:
    wav = encoded("wav", samples=NOISE[:8001], subtype="PCM_U8")  # of odd length
    chunk = b"LIST" + struct.pack("<I", 40_000) + b"INFO" + RNG.bytes(39_996)
    for content in (wav + chunk, wav.removesuffix(b"\0") + chunk, wav + bytes(50_000)):
        assert check(put(tmp_path, "wav", content)).frames == 8001
    with pytest.raises(Unusable, match="more than its header says"):
        check(put(tmp_path, "wav", encoded("wav") + b"junk" * 5000))


def test_an_mp3_file_without_its_length_is_whole_or_named(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros(32_000), np.tile(NOISE, 3)])
    constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
    for options, used in ((constant, True), ({"bitrate_mode": "VARIABLE"}, False), ({}, False)):
        content = encoded("mp3", samples=samples, **options)
        path = put(tmp_path, "mp3", content[content.index(b"\xff\xf3", 4) :])  # without the first frame, which holds the length
        if used:
            assert check(path).frames == pytest.approx(len(samples), abs=4000)
        else:
            with pytest.raises(Unusable, match="no length in its header"):
                check(path)


def test_cut_files_are_named(tmp_path: Path) -> None:
    for suffix in FORMATS:
        one = encoded(suffix)
        for end in (len(one) * 2 // 3, len(one) - 1):
            with pytest.raises(Unusable, match="truncated|not readable as audio"):
                check(put(tmp_path, suffix, one[:end]))
    long = encoded("wav", format="RF64")
    with pytest.raises(Unusable, match="truncated"):
        check(put(tmp_path, "wav", long[:20_000]))
    with pytest.raises(Unusable, match="format W64 under another name"):
        check(put(tmp_path, "wav", encoded("wav", format="W64")))
