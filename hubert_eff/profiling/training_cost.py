"""Estimates what a training run needs, from counts: GPU-hours, GPU memory and disk."""

# B rows of a batch, T frames

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SAMPLE_RATE, HubertConfig
from ..encoders.registry import written_config
from ..errors import UserError
from ..models.hubert import HubertModel
from .cost import profile
from .device import read_device

CONTEXT_GB = 1.0  # for CUDA's context, libraries and the allocator's slack
STATE_BYTES = {16: 2 + 2 + 4 + 8, 32: 4 + 4 + 8}  # per parameter: weight, gradient, at 16 bits the float32 copy, Adam's two averages
SAVED_BYTES = 4 + 8  # per parameter in a checkpoint: weight, Adam's two averages


@dataclass(frozen=True)
class Needs:
    """The needs of one run: `gpu_hours` of all GPUs together, at an assumed share of the device's peak; `gpu_gb`, the minimum for each GPU;
    `checkpoint_gb` of a file. A GB is 10^9 bytes."""

    params: int
    updates: int
    audio_seconds_per_update: float
    pflop: float
    gpu_hours: float
    gpu_gb: float
    checkpoint_gb: float


# "Attention or Convolution" (Jeon et al. 2023), section 4.1: 32 A100, two phases, 8.5 hours per 100k updates: 680 and 1,632 GPU-hours
PAPER_GPUS = 32
PAPER_UPDATES = (250_000, 600_000)
PAPER_HOURS = 8.5  # per 100k updates
# share of an A100's peak at 16 bits with which `training_needs` gives those hours for transformer_base; the paper gives one time without
# naming the model
MFU = 0.010914
MFU_SOURCE = (
    f"the paper's {PAPER_HOURS:g} h per 100k updates on {PAPER_GPUS} A100, taken as those of transformer_base (680 + 1,632 GPU-hours)"
)


def training_needs(written: Mapping[str, Any], clusters: int, gpus: int, device: str, mfu: float, teacher: bool = False) -> Needs:
    """Estimate the needs of a run of the configuration `written` on `gpus` GPUs of `device`, at a share `mfu` (0 to 1) of its peak.

    Training takes three times the products of a forward pass (forward, gradients of inputs and of weights), and a teacher of the same size
    one more. One-bit models train in floats. Activations are those that autograd keeps for a batch of the longest crops, counted without
    computing: in float32, halved at 16 bits, without attention probabilities, which fused attention does not keep.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} must be above 0 and at most 1: the share of the device's peak that training reaches")
    config, common = written_config(written), written["common"]
    bits = 16 if common["fp16"] or common.get("bf16") else 32
    crop = written["task"]["max_sample_size"] or written["dataset"]["max_tokens"]
    seconds = crop / SAMPLE_RATE
    rows = max(1, written["dataset"]["max_tokens"] // crop)
    with torch.device("meta"):
        model = HubertModel(config, (clusters,))
    params = sum(p.numel() for p in model.parameters())
    per_second = 2 * profile(model, seconds).macs / seconds  # FLOP of a forward pass
    accumulated = written["optimization"]["update_freq"][0]
    per_update = rows * seconds * gpus * accumulated
    updates = written["optimization"]["max_update"]
    flop = (4 if teacher else 3) * per_second * per_update * updates
    hours = flop / (read_device(device).rate(bits) * 1e12 * mfu) / 3600
    memory = (STATE_BYTES[bits] + (bits // 8 if teacher else 0)) * params + rows * kept_bytes(config, crop) * bits / 32
    return Needs(params, updates, per_update, flop / 1e15, hours, memory / 1e9 + CONTEXT_GB, SAVED_BYTES * params / 1e9)


def kept_bytes(config: HubertConfig, samples: int) -> int:
    """Bytes of float32 activations that autograd keeps for one utterance of so many samples, without weights."""
    values = {**config.to_dict(), "attention_dropout": 0.0, "encoder_layerdrop": 0.0}
    with torch.device("meta"):
        model = HubertModel(type(config).from_dict(values)).train()
        wav = torch.empty(1, samples)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in weights:
            kept[key] = x  # kept alive, so its address stays unique
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.set_grad_enabled(True):
        model.hidden_states(wav)
    return sum(x.untyped_storage().nbytes() for x in kept.values())
