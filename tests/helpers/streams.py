"""Models that stream, streams cut at random, and the masked full pass."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import hubert_eff
from hubert_eff.models.hubert import HubertModel
from hubert_eff.streaming.stream import StreamingModel


def streaming_model(preset: str, **keys: object) -> HubertModel:
    model = hubert_eff.build(preset, streaming=True, **keys).eval()
    for module in model.modules():  # statistics that are not those of a fresh BatchNorm
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def fed(stream: StreamingModel, pieces: list[Tensor]) -> Tensor:
    outputs = [stream.feed(piece) for piece in pieces] + [stream.flush()]
    return torch.cat([y for y in outputs if y is not None], 1)


def cut_at_random(wav: Tensor, longest: int) -> list[Tensor]:
    sizes = torch.randint(0, longest, (wav.size(1),)).tolist()
    ends = [end for end in itertools.accumulate(sizes) if end < wav.size(1)]
    return [wav[:, a:b] for a, b in zip([0, *ends], [*ends, wav.size(1)])]


def reference(model: HubertModel, wav: Tensor, size: int, left: int) -> Tensor:
    with torch.no_grad():
        return model.hidden_states(wav, chunk_size=size, left_chunks=left)[0][-1]
