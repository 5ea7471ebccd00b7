"""Everything of S3PRL 0.4.18 that needs help to run offline beside fairseq and torch 2.8, each with its reason.

`apply()` must run before the S3PRL modules concerned are imported, since some of them copy names at import time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence

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


def _quiet_warnings() -> None:
    """S3PRL calls functions that announce their removal from later versions of torch and torchaudio than those it is pinned to."""
    warnings.filterwarnings("ignore", message=r"(?s).*(torchaudio|pkg_resources|torch\.cuda\.amp).*deprecated")


def _read_own_checkpoints() -> None:
    """run_downstream saves its argparse.Namespace in `states-*.ckpt`, which torch >= 2.6 refuses to read back: torch.load
    reads plain data only unless a class is declared harmless. A Namespace holds attributes and runs no code."""
    torch.serialization.add_safe_globals([argparse.Namespace])


class DistributedSamplerWrapper(DistributedSampler):  # type: ignore[type-arg]
    """This process' share of what another sampler draws; every process must draw the same, so seed them alike."""

    def __init__(self, sampler: Sampler[int], num_replicas: int | None = None, rank: int | None = None) -> None:
        super().__init__(sampler, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # only its length is used
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        return iter([drawn[i] for i in super().__iter__()])


def _provide_catalyst_sampler() -> None:
    """The experts of run_downstream import one class of `catalyst`, whose last release cannot be imported beside current
    packages. It is used in distributed runs only, but imported always."""
    sampler = types.ModuleType("catalyst.data.sampler")
    sampler.DistributedSamplerWrapper = DistributedSamplerWrapper  # type: ignore[attr-defined]
    for name, module in (
        ("catalyst", types.ModuleType("catalyst")),
        ("catalyst.data", types.ModuleType("catalyst.data")),
        ("catalyst.data.sampler", sampler),
    ):
        sys.modules[name] = module


def _provide_sox_effects() -> None:
    """torchaudio's SoX effects call the system's libsox, which pip cannot install. Keyword spotting uses three of them."""
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
    """`torchaudio.sox_effects.apply_effects_tensor` for the effects `channels`, `rate` and `gain DB`.

    `tensor` is (channels, samples), or (samples, channels) with `channels_first=False`; float, full scale 1. `rate` is
    the SoX resampler at its default quality (libsoxr). Raises `UserError` for any other effect.
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
            case other:
                raise UserError(
                    f"the SoX effect '{' '.join(other)}' needs libsox, which is not installed: apt-get install libsox-dev "
                    "(here only channels, rate and gain are built in)"
                )
    return (wav if channels_first else wav.T), sample_rate


def _resample(wav: Tensor, rate: int, new_rate: int) -> Tensor:
    if rate == new_rate:
        return wav
    import soxr

    return torch.from_numpy(np.ascontiguousarray(soxr.resample(wav.T.numpy(), rate, new_rate, quality="HQ").T))


def apply_effects_file(
    path: str | os.PathLike[str], effects: Sequence[Sequence[str]], channels_first: bool = True
) -> tuple[Tensor, int]:
    """`torchaudio.sox_effects.apply_effects_file` for the effects of `apply_effects_tensor`."""
    samples, rate = sf.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    wav, rate = apply_effects_tensor(torch.from_numpy(samples.T), rate, effects)
    return (wav if channels_first else wav.T), rate
