"""Finds faults that libsndfile silently ignores: files that end too early, and audio behind the first stream of a file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

SLACK = 0.25  # seconds of audio that may follow the samples that a WAV header counts
PADDING = 0.5  # seconds of an MP3 file that are not audio: its first frame, and what the encoder adds at both ends
UNKNOWN = 0x7FFFF000  # lengths from here on mean unknown: programs that write to a pipe leave them in a WAV header
ENDS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN", b"id3 ")  # tags that programs append
SEVERAL = "several streams in one file: only the first would be read; write each to a file of its own"

# MPEG audio: kbit/s by (version, layer) and rates by version, numbered by the bits of a frame's header
_KBIT = {
    (3, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


class Unusable(Exception):
    """A file is left out; the message gives the reason in a few words."""


def check_container(path: Path) -> float:
    """The seconds of audio in the frames of an MP3 file; 0 for other files, whose containers show themselves what is wrong.

    Raises `Unusable` for a file that ends too early, and for one with more data than would be read.
    """
    with path.open("rb", buffering=1 << 16) as file:
        size = file.seek(0, 2)
        start = _behind_tags(file)
        file.seek(start)
        magic = file.read(12)
        if magic[:4] in (b"RIFF", b"RIFX", b"RF64") and magic[8:] == b"WAVE":
            _check_wav(file, ">" if magic[:4] == b"RIFX" else "<", start + 12, size)
        elif magic[:4] == b"OggS":
            _check_ogg(file, start, size)
        elif magic[:4] == b"fLaC":
            _check_flac(file, start, size)
        elif start or path.suffix.lower() == ".mp3" or _mpeg_frame(magic[:4]):
            _check_xing(file, start, size)
            return _mpeg_seconds(file, start, size)
    return 0.0


def _behind_tags(file: IO[bytes]) -> int:
    """The position behind all ID3v2 tags at the beginning."""
    position = 0
    while True:
        file.seek(position)
        tag = file.read(10)
        if tag[:3] != b"ID3" or len(tag) < 10 or max(tag[6:]) > 127:
            return position
        size = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
        position += 10 + size + (10 if tag[5] & 16 else 0)


# ---- WAV


def _check_wav(file: IO[bytes], order: str, position: int, size: int) -> None:
    speed = 0  # bytes per second
    long = 0  # the length in the header of a file of more than 4 GB
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        held = size - position - 8
        if name == b"fmt ":
            (speed,) = struct.unpack(f"{order}8xI", file.read(12).ljust(12, b"\0"))
        elif name == b"ds64":
            (long,) = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))
        elif name == b"data":
            length = long if long and length == 0xFFFFFFFF else length if length < UNKNOWN else held
            if held < length:
                raise Unusable(f"truncated: {held} of {length} bytes of samples")
            rest = _unclaimed(file, order, position + 8 + length, size)
            if rest > SLACK * speed:
                raise Unusable(f"more than its header says: {length} bytes of samples, and {rest} more; convert the whole file to flac")
            return
        position += 8 + length + length % 2
    raise Unusable("truncated: no samples in the WAV file")


def _unclaimed(file: IO[bytes], order: str, position: int, size: int) -> int:
    """Number of bytes behind the samples that are neither chunks, nor tags, nor zero."""
    while size - position >= 8:
        file.seek(position)
        start = file.read(9)
        if start[0] == 0 and position % 2:  # a chunk of odd length is filled up with a byte, by most programs
            start, position = start[1:], position + 1
        name, length = start[:4], struct.unpack(f"{order}I", start[4:8].ljust(4, b"\0"))[0]
        if name in (b"RIFF", b"RIFX", b"RF64", b"data"):
            raise Unusable(SEVERAL)
        if not (name.isascii() and name.decode("ascii").isprintable() and length <= size - position - 8):
            break
        position += 8 + length
    file.seek(position)
    rest = file.read()
    return 0 if rest.startswith(ENDS) or not any(rest) else len(rest)


# ---- Ogg


def _check_ogg(file: IO[bytes], position: int, size: int) -> None:
    began = ended = False  # whether the first and the last page of a stream have been seen
    while position + 27 <= size:
        file.seek(position)
        head = file.read(27)
        if head[:4] != b"OggS":
            break
        first, last, segments = head[5] & 2, head[5] & 4, file.read(head[26])
        if first and began:
            raise Unusable(SEVERAL)
        began = began or not first  # streams that play together begin together
        position += 27 + head[26] + sum(segments)
        ended = bool(last) and position <= size
    if not ended:
        raise Unusable("truncated: the Ogg stream has no end")


# ---- FLAC


def _check_flac(file: IO[bytes], start: int, size: int) -> None:
    position = start + 4
    while position < size:  # the beginning of another stream, anywhere
        file.seek(position)
        data = file.read(1 << 20)
        if b"fLaC\0\0\0\x22" in data or b"fLaC\x80\0\0\x22" in data:
            raise Unusable(SEVERAL)
        position += max(len(data) - 7, 1)
    file.seek(start)
    head = file.read(42)
    block, declared = int.from_bytes(head[8:10], "big"), int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF
    file.seek(max(start + 42, size - (1 << 17)))
    tail = file.read()
    place = len(tail)
    while (place := tail.rfind(b"\xff", 0, place)) >= 0:  # the last frame tells which samples it holds
        end = _flac_frame(tail[place : place + 16], block)
        if end > declared and _crc(tail[place:], 16, 0x8005) == 0:
            raise Unusable(f"more than its header says: {declared} samples, but its frames hold {end}; convert the whole file again")
        if 0 < end <= declared:
            return


def _flac_frame(head: bytes, block: int) -> int:
    """The sample behind a frame that begins with these bytes; 0 if none does. block: samples of a frame, if all have as many."""
    if len(head) < 16 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return 0
    length = next((n for n in range(8) if not head[4] << n & 0x80), 8)  # leading ones, as in UTF-8
    if length in (1, 8):
        return 0
    number = head[4] & (0x7F >> length)
    follow = max(length - 1, 0)
    for byte in head[5 : 5 + follow]:
        number = number << 6 | byte & 0x3F
    at = 5 + follow
    code = head[2] >> 4
    if code in (6, 7):
        samples = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        samples = 192 if code == 1 else 576 << (code - 2) if 2 <= code <= 5 else 256 << (code - 8) if code >= 8 else 0
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if _crc(head[: at + 1], 8, 0x07):
        return 0
    return (number if head[1] & 1 else number * block) + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """The checksum of data; 0 for data that ends with its own checksum."""
    top, mask, value = 1 << (bits - 1), (1 << bits) - 1, 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value & top else 0)) & mask
    return value


# ---- MPEG audio


def _mpeg_frame(head: bytes) -> tuple[int, float] | None:
    """(bytes, seconds) of the frame that begins with these four bytes; None if none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer, kbit, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 0 or rate == 3 or not 0 < kbit < 15:
        return None
    speed = 1000 * _KBIT[(3, layer) if version == 3 else (2, 3 if layer == 3 else 1)][kbit - 1]
    hertz, padding = _RATES[version][rate], head[2] >> 1 & 1
    if layer == 3:
        return (12 * speed // hertz + padding) * 4, 384 / hertz
    samples = 1152 if layer == 2 or version == 3 else 576
    return samples // 8 * speed // hertz + padding, samples / hertz


def _mpeg_seconds(file: IO[bytes], position: int, size: int) -> float:
    """Add up the frames; bytes between frames are skipped."""
    known: dict[bytes, tuple[int, float] | None] = {}
    seconds = 0.0
    in_step = False  # whether a frame ended here; elsewhere only two consecutive frames count
    while position + 4 <= size:
        file.seek(position)
        head = file.read(4)
        key = head[:3]
        if key not in known:
            known[key] = _mpeg_frame(head)
        frame = known[key]
        if frame is not None and not in_step:
            file.seek(position + frame[0])
            in_step = _mpeg_frame(file.read(4)) is not None
        if frame is not None and in_step:
            position, seconds = position + frame[0], seconds + frame[1]
            continue
        in_step = False
        file.seek(position + 1)
        data = file.read(1 << 16)
        skipped = data.find(b"\xff")
        position += 1 + (len(data) if skipped < 0 else skipped)
    return seconds


def _check_xing(file: IO[bytes], position: int, size: int) -> None:
    """Compare the size of the file with the number of bytes that its first frame may give."""
    file.seek(position)
    start = file.read(4096)
    tag = max(start.find(b"Xing"), start.find(b"Info"))
    if tag < 0 or len(start) < tag + 16:
        return
    flags = int.from_bytes(start[tag + 4 : tag + 8], "big")
    if flags & 2:  # follows the number of frames if flag 1 is set
        at = tag + 8 + 4 * (flags & 1)
        length = int.from_bytes(start[at : at + 4], "big")
        if size - position < length:
            raise Unusable(f"truncated: {size - position} of {length} bytes")
