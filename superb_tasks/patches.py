"""Patches of S3PRL 0.4.18 that make it run offline beside fairseq and torch 2.8, each with its reason.

`apply()` must run before the S3PRL modules concerned are imported, since some of them copy names at import time; `prepare(downstream,
cache)` before an expert of run_downstream is built.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

from hubert_eff.errors import UserError


def apply() -> None:
    """Apply all patches. Calling it again changes nothing."""
    _quiet_warnings()
    _read_own_checkpoints()
    _provide_catalyst_sampler()
    _provide_sox_effects()
    _import_transformers_when_needed()


def _quiet_warnings() -> None:
    """Hide warnings: S3PRL calls functions that later versions of torch and torchaudio than the pinned ones will remove, and says at each
    start that ESPnet, which one of its upstreams needs, is not installed."""
    logging.getLogger("s3prl.upstream.espnet_hubert.expert").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"(?s).*(torchaudio|pkg_resources|torch\.cuda\.amp).*deprecated")


def _read_own_checkpoints() -> None:
    """Allow argparse.Namespace, which run_downstream saves in `states-*.ckpt`: torch >= 2.6 reads only plain data unless a class is
    declared harmless, and a Namespace holds attributes and runs no code."""
    torch.serialization.add_safe_globals([argparse.Namespace])


def prepare(downstream: str, cache: Path) -> None:
    """Patch the modules of one downstream of run_downstream. `cache` is a folder for what S3PRL keeps about the data, one per data set,
    since S3PRL does not check whether it belongs to the same data. Calling it again only changes the place of the cache."""
    if downstream == "ctc":
        _provide_ctc_corpora()
    elif downstream == "voxceleb1":
        from s3prl.downstream.voxceleb1 import dataset

        # it keeps its lists of files beside its own code, under names that ignore the data: stale for the next data set
        dataset.CACHE_PATH = str(cache)
    elif downstream == "sv_voxceleb1":
        _patch_verification(cache)


def _provide_ctc_corpora() -> None:
    """Provide the package `corpus` that `s3prl.downstream.ctc.data` imports and the wheel lacks. Also keep `load_dataset` from removing the
    number of workers from its settings, which would give every loader except the first 12."""
    import s3prl.downstream.ctc as ctc

    place = str(Path(__file__).parent / "ctc")
    if place in ctc.__path__:
        return
    ctc.__path__.append(place)
    from s3prl.downstream.ctc import data

    original = data.load_dataset

    @functools.wraps(original)
    def load_dataset(split: str, tokenizer: Any, corpus: dict[str, Any]) -> Any:
        return original(split, tokenizer, dict(corpus))

    data.load_dataset = load_dataset


def _patch_verification(cache: Path) -> None:
    """Patch speaker verification, which keeps the lengths of recordings beside its own code, under a name that ignores the data, starts
    twelve processes to measure them on any machine, and asks for CUDA by name."""
    from joblib import Parallel
    from s3prl.downstream.sv_voxceleb1 import dataset, expert

    cache.mkdir(parents=True, exist_ok=True)
    dataset.__file__ = str(cache / "dataset.py")  # it looks for its cache beside this
    dataset.Parallel = lambda n_jobs: Parallel(n_jobs=min(n_jobs, os.cpu_count() or 1), prefer="threads")
    if not hasattr(expert.DownstreamExpert.forward, "__wrapped__"):
        expert.DownstreamExpert.forward = _cuda_where_the_features_are(expert.DownstreamExpert.forward)


def _cuda_where_the_features_are(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make `.cuda()` mean the device of the features in an expert's forward pass."""

    @functools.wraps(forward)
    def wrapped(self: Any, mode: str, features: Sequence[Tensor], *others: Any, **more: Any) -> Any:
        with _replaced(Tensor, "cuda", lambda tensor: tensor.to(features[0].device)):
            return forward(self, mode, features, *others, **more)

    return wrapped


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class DistributedSamplerWrapper(DistributedSampler):  # type: ignore[type-arg]
    """This process's share of the draws of another sampler; all processes must draw the same, so they need the same seed."""

    def __init__(self, sampler: Sampler[int], num_replicas: int | None = None, rank: int | None = None) -> None:
        super().__init__(sampler, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # only its length is used
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        return iter([drawn[i] for i in super().__iter__()])


def _provide_catalyst_sampler() -> None:
    """Provide the one class of `catalyst` that experts of run_downstream import; its last release fails to import beside current packages.
    The class is used in distributed runs only, but always imported."""
    sampler = types.ModuleType("catalyst.data.sampler")
    sampler.DistributedSamplerWrapper = DistributedSamplerWrapper  # type: ignore[attr-defined]
    for name, module in (
        ("catalyst", types.ModuleType("catalyst")),
        ("catalyst.data", types.ModuleType("catalyst.data")),
        ("catalyst.data.sampler", sampler),
    ):
        sys.modules[name] = module


def _import_transformers_when_needed() -> None:
    """Delay the import of transformers by two upstreams until one of them is built: S3PRL's hub imports all upstreams, and this takes
    longer than the rest."""
    for name in ("s3prl.upstream.hf_hubert.expert", "s3prl.upstream.hf_wav2vec2.expert"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.UpstreamExpert = functools.partial(_build_expert, module)  # type: ignore[attr-defined]
            sys.modules[name] = module


def _build_expert(stand_in: types.ModuleType, *arguments: Any, **more: Any) -> Any:
    name = stand_in.__name__
    if sys.modules[name] is stand_in:
        del sys.modules[name]
    return importlib.import_module(name).UpstreamExpert(*arguments, **more)


def _provide_sox_effects() -> None:
    """Provide the four SoX effects that SUPERB's tasks use: torchaudio's call the system's libsox, which pip cannot install."""
    try:
        ctypes.CDLL("libsox.so")
        return
    except OSError:
        import torchaudio

    torchaudio.sox_effects.apply_effects_tensor = apply_effects_tensor
    torchaudio.sox_effects.apply_effects_file = apply_effects_file


def apply_effects_tensor(
    tensor: Tensor, sample_rate: int, effects: Sequence[Sequence[str]], channels_first: bool = True
) -> tuple[Tensor, int]:
    """`torchaudio.sox_effects.apply_effects_tensor` for the effects `channels`, `rate`, `gain DB` and `silence`.

    `tensor` is (channels, samples), or (samples, channels) with `channels_first=False`; float, full scale 1. `rate` is
    the SoX resampler at its default quality (libsoxr). `silence 1 SECONDS LEVEL% -1 SECONDS LEVEL%` is reimplemented in `without_silence`:
    its cuts are close to SoX's, but not equal to the sample. Raises `UserError` for any other effect.
    """
    wav = tensor if channels_first else tensor.T  # (channels, samples)
    for effect in effects:
        match list(effect):
            case ["channels", count] if int(count) == 1:
                wav = wav.mean(0, keepdim=True)
            case ["channels", count] if int(count) == len(wav):
                pass
            case ["rate", rate]:
                wav, sample_rate = _resample(wav, sample_rate, int(float(rate))), int(float(rate))
            case ["gain", decibel] if not decibel.startswith("-") or decibel[1:2].isdigit():
                wav = (wav * 10 ** (float(decibel) / 20)).clamp(-1, 1)  # SoX clips at full scale
            case ["silence", "1", seconds, level, "-1", seconds_inside, level_inside] if (seconds, level) == (seconds_inside, level_inside):
                wav = without_silence(wav, sample_rate, float(seconds), float(level.rstrip("%")) / 100)
            case other:
                raise UserError(
                    f"the SoX effect '{' '.join(other)}' needs libsox, which is not installed: apt-get install libsox-dev "
                    "(here only channels, rate, gain and silence at one level are built in)"
                )
    return (wav if channels_first else wav.T), sample_rate


def without_silence(wav: Tensor, sample_rate: int, seconds: float, level: float) -> Tensor:
    """Remove the quiet start of a recording (channels, samples), and all parts that are quiet for `seconds` or longer.

    Quiet is a root mean square, over 20 ms and all channels, of at most `level` (full scale 1).
    """
    power = wav.square().mean(0).numpy().astype(np.float64)  # (samples,)
    window = max(1, sample_rate // 50)
    total = np.concatenate([[0.0], np.cumsum(power)])
    end = np.arange(1, len(power) + 1)
    start = np.maximum(0, end - window)
    quiet = (total[end] - total[start]) / (end - start) <= level**2
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet.astype(np.int8), [0]])))
    keep = np.ones(len(power), dtype=bool)
    for first, last in zip(edges[::2], edges[1::2]):
        if first == 0 or last - first >= seconds * sample_rate:
            keep[first:last] = False
    return wav[:, torch.from_numpy(keep)]


def _resample(wav: Tensor, rate: int, new_rate: int) -> Tensor:
    if rate == new_rate:
        return wav
    import soxr

    return torch.from_numpy(np.ascontiguousarray(soxr.resample(wav.T.numpy(), rate, new_rate, quality="HQ").T))


def apply_effects_file(path: str | os.PathLike[str], effects: Sequence[Sequence[str]], channels_first: bool = True) -> tuple[Tensor, int]:
    """`torchaudio.sox_effects.apply_effects_file` for the effects of `apply_effects_tensor`."""
    samples, rate = sf.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    wav, rate = apply_effects_tensor(torch.from_numpy(samples.T), rate, effects)
    return (wav if channels_first else wav.T), rate
