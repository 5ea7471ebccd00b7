"""Feeds a file or a pipe to a stream as fast as it comes, and reports on it, for `hubert-eff run --stream`."""

# S samples at 16 kHz, T frames of 20 ms, D model dim

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.open import open_model
from ..config import SAMPLE_RATE
from ..data.containers import Unusable, check_container
from ..errors import UserError
from ..models.fuse import fuse
from ..models.hubert import HubertModel
from ..quant.packing import packed_copy
from ..quant.storage import is_packed
from ..utils.files import replacing
from .stream import StreamingModel, mode_seconds, parse_mode

EVERY = 1.0  # seconds between lines of progress
PIECE = 0.1  # seconds of audio that are read at a time
STDIN = "-"


@dataclass
class StreamReport:
    """The cost of a stream. Times are seconds of this process; RTF is computing time over audio time."""

    seconds: float  # of audio
    frames: int
    chunks: int
    mode: str
    latency_s: float  # seconds of audio that a chunk waits for
    compute_s: float  # seconds, all chunks together
    first_ms: float  # computing time of the first chunk, which also warms up caches
    p50_ms: float  # median computing time of the later chunks (of the first if there are none)
    p95_ms: float  # 95th percentile of them
    slowest_ms: float  # of all
    state_bytes: int  # size of what is kept at the end

    @property
    def rtf(self) -> float:
        """Real-time factor: below 1 the model keeps up with the audio."""
        return self.compute_s / self.seconds

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "mode_seconds": mode_seconds(self.mode), "rtf": self.rtf}

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s in {self.chunks} chunks, {self.frames} frames (mode {self.mode}: {mode_seconds(self.mode)}): RTF "
            f"{self.rtf:.4f}; "
            f"a chunk waits {1e3 * self.latency_s:.0f} ms for its audio "
            f"and takes p50 {self.p50_ms:.1f} ms, p95 {self.p95_ms:.1f} ms (the first {self.first_ms:.1f} ms, "
            f"the slowest {self.slowest_ms:.1f} ms); "
            f"the stream keeps {self.state_bytes / 1e3:,.1f} kB"
        )


def pieces_of(source: str | os.PathLike[str], stdin: BinaryIO | None = None) -> Iterator[Tensor]:
    """Yield audio (1, S) in pieces of at most `PIECE` seconds from a 16 kHz mono file or, for `-`, from raw 16-bit little-endian PCM of
    that rate on `stdin`. Only one piece is in memory at a time. Raises `UserError` for files that are not audio or have another rate."""
    length = round(PIECE * SAMPLE_RATE)
    if os.fspath(source) == STDIN:
        assert stdin is not None
        odd = b""
        while data := stdin.read(2 * length):
            data = odd + data
            whole = len(data) // 2 * 2
            odd = data[whole:]
            yield torch.from_numpy(np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32_768)[None]
        if odd:
            raise UserError("standard input ends in the middle of a sample: give 16-bit little-endian mono PCM at 16 kHz")
        return
    import soundfile

    path = Path(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder: a stream takes one audio file")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file" if path.exists() else f"no audio file at {path}")
    frames = 0
    try:
        check_container(path)
        with soundfile.SoundFile(os.fsencode(path)) as file:  # bytes, because soundfile encodes names strictly
            if file.samplerate != SAMPLE_RATE or file.channels != 1:
                raise UserError(
                    f"{path} has {file.channels} channel{'s' * (file.channels != 1)} at {file.samplerate} Hz: a stream takes mono at "
                    f"{SAMPLE_RATE} Hz; convert it: ffmpeg -i {shlex.quote(str(path))} -ar {SAMPLE_RATE} -ac 1 OUT.wav"
                )
            for block in file.blocks(length, dtype="float32"):
                frames += len(block)
                yield torch.from_numpy(block)[None]
            if frames < file.frames < 1 << 40:  # files written to a pipe declare a huge length
                raise UserError(f"{path} is truncated: {frames / SAMPLE_RATE:.2f} of {file.frames / SAMPLE_RATE:.2f} s")
    except (soundfile.SoundFileError, Unusable) as error:
        raise UserError(f"{path} cannot be read as audio ({error})") from error


def run_stream(
    model: HubertModel,
    source: str | os.PathLike[str],
    mode: str = "16-4",
    out: Path | None = None,
    stdin: BinaryIO | None = None,
    tell: Callable[[str], object] | None = None,
) -> StreamReport:
    """Feed a file or standard input to a `StreamingModel`; the last hidden states go to `out` (.npy, (T, D) float32) as they come.

    tell: called with a line of progress at the first chunk and then at most once a second.
    mode: see `streaming.parse_mode`; `full` is not a stream. Raises `UserError` for audio that is too short for a frame, and what
    `StreamingModel`, `feed` and `pieces_of` raise.
    """
    size, left = parse_mode(mode)
    if size is None:
        raise UserError("mode full is the whole utterance at once: leave out --stream")
    if out is not None and out.suffix != ".npy":
        raise UserError(f"--out {out}: a stream writes a .npy file, frame after frame")
    stream = StreamingModel(model, size, left)
    times: list[float] = []
    told = -math.inf
    frames = samples = kept = 0

    def timed(compute: Callable[[], Tensor | None]) -> Tensor | None:
        begin = time.perf_counter()
        y = compute()
        if y is not None:
            times.append(time.perf_counter() - begin)
        return y

    def outputs() -> Iterator[Tensor]:
        nonlocal samples, kept
        for piece in pieces_of(source, stdin):
            try:
                y = timed(lambda piece=piece: stream.feed(piece))  # type: ignore[misc]
            except UserError as error:
                raise UserError(f"{source}, from {samples / SAMPLE_RATE:.1f} s on: {error}") from error
            samples += piece.size(1)
            if y is not None:
                yield y
        kept = stream.state().nbytes
        y = timed(stream.flush)
        if y is not None:
            yield y

    with growing_npy(out) if out is not None else nullcontext() as add:
        for y in outputs():
            frames += y.size(1)
            if add is not None:
                add(y[0])
            if tell is not None and (now := time.perf_counter()) - told >= EVERY:
                told = now
                tell(f"{samples / SAMPLE_RATE:.1f} s heard, {frames} frames; the last chunk took {1e3 * times[-1]:.1f} ms")
        if not frames:
            raise UserError(f"{source}: {samples} samples are too few for one frame")
    later = times[1:] or times
    median, p95 = (1e3 * float(np.quantile(later, share)) for share in (0.5, 0.95))
    return StreamReport(
        samples / SAMPLE_RATE, frames, len(times), mode, stream.latency, sum(times), 1e3 * times[0], median, p95, 1e3 * max(times),
        kept,
    )  # fmt: skip


def stream_command(name: str, audio: Sequence[Path], mode: str, out: Path | None, as_json: bool) -> int:
    """`hubert-eff run NAME AUDIO --stream MODE`: one file, or `-` for standard input, through a fused model, or one that runs from bits if
    it is w1a1; prints the report."""
    if len(audio) != 1:
        raise UserError(f"--stream takes one file, or - for standard input, not {len(audio)}")
    size, left = parse_mode(mode)  # checked before the model is read
    model = open_model(name, streaming=True)
    model.chunks(size, left)  # refused here, with the proper reason, rather than by `fuse`
    tell = None if as_json else functools.partial(print, flush=True)
    report = run_stream(for_inference(model.eval()), audio[0], mode, out, sys.stdin.buffer, tell)
    print(json.dumps(report.plain(), indent=2) if as_json else report)
    return 0


def for_inference(model: HubertModel) -> HubertModel:
    """The fastest form of a model, with the same outputs."""
    if model.config.quant == "none":
        return fuse(model)
    return packed_copy(model) if model.config.quant == "w1a1" and not is_packed(model) else model


@contextmanager
def growing_npy(path: Path) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that appends (t, D) to a .npy file (T, D) float32; T is written at the end."""
    rows = width = 0

    def header() -> None:
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})

    def add(part: Tensor) -> None:
        nonlocal rows, width
        rows, width = rows + part.size(0), part.size(1)
        file.write(part.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())

    with replacing(path) as temporary, temporary.open("w+b") as file:
        header()
        start = file.tell()
        yield add
        header()  # it has the same length, because numpy pads it to a multiple of 64 bytes
        assert file.tell() == start
