"""Writes hidden states of audio files to one file: in batches of unequal lengths, and long recordings in windows."""

# T frames of 20 ms, L blocks, D model dim

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..checkpoints.open import open_model
from ..config import FRAME_STRIDE, SAMPLE_RATE
from ..data.audio import FOREIGN_SUFFIXES, Checked, Unusable, check, read_mono
from ..data.inputs import recordings
from ..errors import UnusableFile, UserError, missing_extra
from ..models.extractor import ConvBlock, TimeNorm, receptive_field
from ..models.hubert import HubertModel
from ..utils.evaluating import evaluation_copy
from ..utils.files import replacing, writable
from ..utils.progress import progress

Array = npt.NDArray[np.float32]

SUFFIXES = (".npz", ".pt")
WINDOW = 60.0  # seconds
CONTEXT = 5.0  # seconds on both sides of a window that are computed and discarded
SHORTEST = 4 * CONTEXT  # window
TOGETHER = 120.0  # most seconds of audio in a batch, including padding
FRAMES = SAMPLE_RATE // FRAME_STRIDE  # per second


@dataclass
class Recording:
    """The result for one file: its `key` in the output, its length, and the number of windows (1: in one piece)."""

    file: str
    key: str
    seconds: float
    frames: int
    windows: int


@dataclass(frozen=True)
class _Item:
    path: Path
    checked: Checked
    key: str
    frames: int


def extract(
    model: HubertModel | str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *,
    layer: int | None = None, batch: int = 8, window: float = WINDOW, left_out: Callable[[str], object] | None = None,
) -> list[Recording]:  # fmt: skip
    """Write the hidden states of audio files to one file, as one float32 array per recording at 20 ms per frame.

    An .npz file is written array by array; a .pt file holds all arrays in memory at the end. The file appears when it is complete.

    Args:
        model: a model, which is left as it is and may be used by other threads meanwhile, or what `open_model` takes.
        files: audio files of any rate, folders of audio files, and manifests (SPLIT.tsv).
        out: the file to write: .npz, or .pt for a dict of tensors. A recording is named after its file without folder and suffix, or
            after its path below the folder or manifest that was given.
        layer: the hidden state to write, (T, D), where 0 enters block 1; None for all of them, (L + 1, T, D).
        batch: how many files to compute together at most; files of different lengths share a batch only where padding changes nothing.
        window: recordings longer than this many seconds are computed in windows of that length; 0 to compute each in one piece.
        left_out: a function that is called with one line for each file that cannot be used; such files are then left out as long as
            others can be used. Without it, the first one is an error.

    Returns:
        One entry per recording, in the order of the files.

    Raises:
        UserError: before any model runs, a file is missing or is not valid audio, the model does not have the layer, `out` has another
            suffix, the disk is too small, or a number is invalid.
    """
    target = Path(out)
    _check_options(target, files, batch, window)
    given = recordings(files)
    keys = [key for _, key in given]
    hubert = evaluation_copy(model) if isinstance(model, HubertModel) else open_model(model)
    depth = len(hubert.encoder.layers)
    if layer is not None and not 0 <= layer <= depth:
        raise UserError(f"layer {layer} is not there: this model has hidden states 0 to {depth}")
    items = _usable(given, hubert, left_out)
    _check_space(target, [item.frames * (depth + 1 if layer is None else 1) * hubert.config.encoder_embed_dim * 4 for item in items])
    results: dict[str, Recording] = {}
    total = sum(item.checked.samples for item in items)
    with torch.inference_mode(), _writer(target) as write, progress("seconds", total // SAMPLE_RATE) as advance:
        samples, told = 0, 0

        def tell(more: int) -> None:
            nonlocal samples, told
            samples += more
            before, told = told, samples // SAMPLE_RATE
            advance(told - before)

        for together in _batches(items, hubert, batch, window):
            if window and together[0].checked.samples > window * SAMPLE_RATE:
                with _leaving_out(left_out):
                    results[together[0].key] = _in_windows(hubert, together[0], layer, window, write, target, tell)
                continue
            audio: dict[_Item, Array] = {}
            for item in together:
                with _leaving_out(left_out):
                    audio[item] = np.concatenate(list(_blocks(item)))
            if audio:
                for item, states in zip(audio, _states(hubert, list(audio.values()), layer)):
                    write(item.key, states[..., : item.frames, :])
                    results[item.key] = _recording(item, 1)
            tell(sum(item.checked.samples for item in together))
        if not results:
            raise UserError(f"{target} is not written: no file can be read any more")
    return [results[key] for key in keys if key in results]


def summary(recordings: Sequence[Recording], out: Path) -> dict[str, Any]:
    """A summary of what was written, as plain values."""
    return {"out": str(out), "bytes": out.stat().st_size, "recordings": [asdict(recording) for recording in recordings]}


# -- before anything runs ---------------------------------------------------------------------------------------------------------------


def _check_options(target: Path, files: Sequence[str | os.PathLike[str]], batch: int, window: float) -> None:
    if target.suffix not in SUFFIXES:
        raise UserError(f"features are written to a file in {' or '.join(SUFFIXES)}, not {target}")
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1")
    if not (window == 0 or SHORTEST <= window <= 3600):
        raise UserError(f"window={window:g} must be {SHORTEST:g} to 3600 seconds, or 0 for one piece of any length")
    writable(target.parent)


def _usable(given: Sequence[tuple[Path, str]], model: HubertModel, left_out: Callable[[str], object] | None) -> list[_Item]:
    """The usable files. Others are reported to `left_out`. Raises `UserError` for the first of them without it, or if no file is usable."""
    items, faults = [], []
    with progress("checking", len(given)) as advance:
        for path, key in given:
            try:
                items.append(_item(path, key, model))
            except UnusableFile as fault:
                if left_out is None:
                    raise
                faults.append(str(fault))
            advance(1)
    if not items:
        raise UserError(faults[0] + (f"; nor can the {len(faults) - 1} others be used" if len(faults) > 1 else ""))
    if left_out is not None:
        for line in faults:
            left_out(line)
    return items


def _item(path: Path, key: str, model: HubertModel) -> _Item:
    try:
        if path.is_dir():
            raise UnusableFile(f"no recording in the folder {path}")
        if not path.is_file():
            raise UnusableFile(f"{path} is not a regular file" if path.exists() else f"no audio file at {path}")
        if path.suffix.lower() in FOREIGN_SUFFIXES:
            raise UnusableFile(f"{path}: {path.suffix} is not decoded here; convert it to wav, flac, ogg or mp3")
        checked = check(path, silent=True)
    except (Unusable, OSError) as error:  # the latter for a name that is too long or a folder that may not be entered
        raise UnusableFile(f"{path}: {error}") from error
    if checked.rate != SAMPLE_RATE and importlib.util.find_spec("soxr") is None:
        raise missing_extra("soxr", "data", f"{path} has {checked.rate} Hz: resampling")
    frames = model.num_frames(checked.samples)
    if frames < 1:
        raise UnusableFile(f"{path}: {checked.samples} samples at 16 kHz are too few for one frame")
    return _Item(path, checked, key, frames)


def _check_space(target: Path, sizes: Sequence[int]) -> None:
    """Raise `UserError` if the disk has no room for these arrays and a second copy of the largest, which may be computed in windows."""
    needed, free = sum(sizes) + max(sizes), shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(
            f"{target}: about {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free: take another disk, or one layer (--layer)"
        )


@contextmanager
def _leaving_out(left_out: Callable[[str], object] | None) -> Iterator[None]:
    """Skip a file that was valid when it was checked and can no longer be read."""
    try:
        yield
    except UnusableFile as fault:
        if left_out is None:
            raise
        left_out(str(fault))


def _batches(items: list[_Item], model: HubertModel, most: int, window: float) -> Iterator[list[_Item]]:
    """Batches, the longest files first; a recording that is cut into windows is alone."""
    pads = model.config.extractor_mode == "layer_norm" and model.config.valid_frames == "receptive_field"
    batch: list[_Item] = []
    for item in sorted(items, key=lambda item: -item.checked.samples):
        long = window and item.checked.samples > window * SAMPLE_RATE
        if batch:
            first = batch[0].checked.samples
            full = len(batch) == most or first * (len(batch) + 1) > TOGETHER * SAMPLE_RATE
            if full or long or (not pads and first != item.checked.samples) or (window and first > window * SAMPLE_RATE):
                yield batch
                batch = []
        batch.append(item)
    yield batch


# -- in one piece -----------------------------------------------------------------------------------------------------------------------


def _blocks(item: _Item) -> Iterator[Array]:
    """The samples of a file. Raises `UnusableFile` if it has changed since it was checked."""
    try:
        yield from read_mono(item.path, item.checked)
    except OSError as error:
        raise UnusableFile(f"{item.path} cannot be read any more: {error}") from error


def _recording(item: _Item, windows: int) -> Recording:
    return Recording(item.path.name, item.key, round(item.checked.samples / SAMPLE_RATE, 3), item.frames, windows)


def _states(model: HubertModel, audio: Sequence[Array], layer: int | None) -> Iterator[Array]:
    """Yield for each recording its states (L + 1, T, D), or one of them (T, D); T is that of the longest recording."""
    device = next(model.parameters()).device
    length = max(map(len, audio))
    wav, padding = torch.zeros(len(audio), length), torch.zeros(len(audio), length, dtype=torch.bool)
    for row, samples in enumerate(audio):
        wav[row, : len(samples)] = torch.from_numpy(samples)
        padding[row, len(samples) :] = True
    mask = padding.to(device) if bool(padding.any()) else None
    states, _ = model.hidden_states(wav.to(device), mask)
    for row in range(len(audio)):
        chosen = states[layer][row] if layer is not None else torch.stack([state[row] for state in states])
        yield chosen.float().cpu().numpy()


# -- in windows -------------------------------------------------------------------------------------------------------------------------


def _in_windows(
    model: HubertModel, item: _Item, layer: int | None, window: float, write: Callable[[str, Array], None], target: Path,
    tell: Callable[[int], None],
) -> Recording:  # fmt: skip
    """Compute a long recording window by window into an unnamed file, so that memory does not grow with its length and nothing remains on
    disk however this process ends; `tell` is called with the number of samples done.

    Statistics over a whole recording are computed over all of it: mean and variance of the samples (`normalize`), and of the first
    convolution's channels (the default extractor). So the extractor's output equals that of a whole pass, and so does state 0, whose
    positional convolution sees less than the context; blocks see a window with its context.
    """
    reach = receptive_field(model.config.conv_layers)
    core, context = int((window - 2 * CONTEXT) * FRAMES), int(CONTEXT * FRAMES)
    cores = [(start, min(start + core, item.frames)) for start in range(0, item.frames, core)]
    seen = [(max(0, a - context), min(item.frames, b + context)) for a, b in cores]
    spans = [(a * FRAME_STRIDE, item.checked.samples if b == item.frames else (b - 1) * FRAME_STRIDE + reach) for a, b in seen]
    config = model.config
    with tempfile.TemporaryFile(dir=target.parent) as file:
        try:
            wave = _normalized(item, config.normalize_eps) if config.normalize else None
            model.config = replace(config, normalize=False)
            shape: tuple[int, ...] = ()
            with _over_recording(model, lambda: _pieces(item, wave, _tiles(model, item.checked.samples))):
                for (a, b), (first, _), piece in zip(cores, seen, _pieces(item, wave, spans)):
                    (states,) = _states(model, [piece], layer)
                    shape = (*states.shape[:-2], item.frames, states.shape[-1])
                    for number, state in enumerate(states[..., a - first : b - first, :].reshape(-1, b - a, shape[-1])):
                        file.seek((number * item.frames + a) * shape[-1] * state.itemsize)
                        file.write(state.tobytes())  # a memory map would end the process on a full disk
                    tell((item.checked.samples if b == item.frames else b * FRAME_STRIDE) - a * FRAME_STRIDE)
        finally:
            model.config = config
        file.flush()
        write(item.key, np.memmap(file, np.float32, "r", shape=shape))
    return _recording(item, len(cores))


Wave = tuple[float, float]  # mean and deviation of a recording


def _normalized(item: _Item, eps: float) -> Wave:
    count, total, square = 0, 0.0, 0.0
    for block in _blocks(item):
        wide = block.astype(np.float64)
        count, total, square = count + len(wide), total + float(wide.sum()), square + float(wide @ wide)
    mean = total / count
    return mean, float(np.sqrt(max(square / count - mean**2, 0.0) + eps))


def _pieces(item: _Item, wave: Wave | None, spans: Sequence[tuple[int, int]]) -> Iterator[Array]:
    """Yield the samples of each span; spans are in order, and only the samples that later spans need are kept."""
    blocks, held, place = _blocks(item), np.zeros(0, np.float32), 0
    for start, end in spans:
        if start > place:
            held, place = held[start - place :], start
        parts = [held]
        have = len(held)
        while place + have < end:
            parts.append(next(blocks))
            have += len(parts[-1])
        held = np.concatenate(parts) if len(parts) > 1 else held
        piece = held[: end - place]
        yield piece if wave is None else ((piece - wave[0]) / wave[1]).astype(np.float32)


def _tiles(model: HubertModel, samples: int) -> list[tuple[int, int]]:
    """Spans that give every frame of the first convolution exactly once, in order."""
    _, kernel, stride = model.config.conv_layers[0]
    frames, step = (samples - kernel) // stride + 1, 1 << 17
    return [(a * stride, (min(a + step, frames) - 1) * stride + kernel) for a in range(0, frames, step)]


class _Affine(nn.Module):
    """Replaces `TimeNorm` with known statistics."""

    def __init__(self, norm: TimeNorm, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.scale = norm.weight.double() * torch.rsqrt(variance + norm.eps)
        self.shift = norm.bias.double() - mean * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


def _over_recording(model: HubertModel, pieces: Callable[[], Iterator[Array]]) -> Any:
    """A context in which the default extractor's GroupNorm over time uses the statistics of the whole recording."""
    if not any(isinstance(module, TimeNorm) for module in model.feature_extractor.modules()):
        return nullcontext()
    layers = model.feature_extractor.conv_layers
    assert isinstance(layers, nn.ModuleList)
    block = layers[0]
    if not isinstance(block, ConvBlock) or not isinstance(block[2], TimeNorm):
        raise UserError("this model's extractor normalizes over time in a place that windows do not know: give window=0")
    conv, norm = block[0], block[2]
    assert isinstance(conv, nn.Conv1d)
    total = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for piece in pieces():
        wav = torch.from_numpy(piece).to(conv.weight)
        y = torch.nn.functional.conv1d(wav[None, None], conv.weight, conv.bias, conv.stride).double()[0]  # (C, T)
        total, square, count = total + y.sum(1), square + y.square().sum(1), count + y.size(1)
    mean = total / count
    fixed = _Affine(norm, mean, (square / count - mean.square()).clamp(min=0.0))
    return _replaced(block, norm, fixed)


@contextmanager
def _replaced(block: ConvBlock, norm: nn.Module, fixed: nn.Module) -> Iterator[None]:
    block[2] = fixed
    try:
        yield
    finally:
        block[2] = norm


# -- output -----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _writer(target: Path) -> Iterator[Callable[[str, Array], None]]:
    """Yield write(key, array); the file appears when everything is written."""
    with replacing(target) as temporary:
        if target.suffix == ".npz":
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

                def write(key: str, array: Array) -> None:
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)

                yield write
        else:
            held: dict[str, Tensor] = {}
            yield lambda key, array: held.update({key: torch.from_numpy(np.array(array))})
            torch.save(held, temporary)
