"""Results of `forward`: typed fields that are also the keys of a read-only mapping, as fairseq's criteria expect.

The classes are pytrees, so that DistributedDataParallel, torch.export and torch.compile find the tensors in them.
"""

# B batch, T frames, D model dim, C classes of a codebook, N masked (or unmasked) frames, V labels

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

Masks = tuple["Tensor | None", "Tensor | None"]  # over time (B, T) and over channels (B, D), bool; None: there is none
Cls = TypeVar("Cls", bound=type)


class Output(Mapping[str, Any]):
    """The dict view of a dataclass. A field with a default is a key only if it was computed; `output["states"]` is None otherwise."""

    def __getitem__(self, key: str) -> Any:
        if key not in (field.name for field in fields(self)):  # type: ignore[arg-type]
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        for field in fields(self):  # type: ignore[arg-type]
            if field.default is MISSING or getattr(self, field.name) is not None:
                yield field.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return any(key == name for name in self)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default for unknown keys and for fields that were not computed."""
        return self[key] if key in self else default


def pytree(cls: Cls) -> Cls:
    """Register a dataclass, as a class decorator, so that torch finds the tensors in its fields; it is saved under the class's name."""
    torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


@pytree
@dataclass(eq=False)
class HubertOutput(Output):
    """The result of `HubertModel.forward`. With targets it has logits and labels per codebook, unless the config skips them (None).

    Attributes:
        x: (B, T, D), the output of the encoder, or of the block that was asked for.
        padding_mask: (B, T) bool, True = padding; None: there is none.
        mask_indices: (B, T) bool, the masked frames; None: nothing is masked.
        masks: the masks over time and over channels (B, D); another model that gets them sees the same frames.
        chunks: the (chunk_size, left_chunks) of the encoder; another model may get them too.
        features: (B, T, D), the input of the encoder before masking.
        features_pen: (), the mean square of the extractor's output.
        features_square: (B, T), the same for each frame; in evaluation.
        states: the hidden states 0 ... L, each (B, T, D); with `return_states`.
        logits_m: of the masked frames (N, C).
        logits_u: of the unmasked frames (N, C).
        targets_m: labels of the masked frames (N,), long.
        targets_u: labels of the unmasked frames (N,), long.
    """

    x: Tensor
    padding_mask: Tensor | None
    mask_indices: Tensor | None
    masks: Masks
    chunks: tuple[int | None, int]
    features: Tensor
    features_pen: Tensor
    features_square: Tensor | None = None
    states: list[Tensor] | None = None
    logits_m: list[Tensor] | None = None
    logits_u: list[Tensor] | None = None
    targets_m: list[Tensor] | None = None
    targets_u: list[Tensor] | None = None


@pytree
@dataclass(eq=False)
class RecognizerOutput(Output):
    """The result of `Recognizer.forward`; losses are in nats, summed over letters.

    Attributes:
        loss: (), the weighted sum of both losses, or the only one.
        loss_ctc: (), detached; if the CTC layer learns.
        log_probs: (B, T, V), detached; if the CTC layer learns.
        lengths: (B,), frames of each utterance; if the CTC layer learns.
        loss_attention: (), detached; with a decoder.
        correct: (), number of letters that the decoder gets right; with a decoder.
        count: (), number of letters that the decoder must predict; with a decoder.
        encoded: (B, T, D), detached, the output of the encoder; in evaluation, if the CTC layer does not learn.
        frames: (B,), number of its valid frames.
    """

    loss: Tensor
    loss_ctc: Tensor | None = None
    log_probs: Tensor | None = None
    lengths: Tensor | None = None
    loss_attention: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    encoded: Tensor | None = None
    frames: Tensor | None = None
