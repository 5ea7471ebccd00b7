"""What `forward` returns: typed fields, which are also the keys of a read-only mapping, as fairseq's criteria read a model's output.

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
    """The dict view of a dataclass: a field with a default is a key only if it was computed. `output["states"]` is None if it was not."""

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
        """The value of a key; the default for a field that was not computed, as for an unknown key."""
        return self[key] if key in self else default


def pytree(cls: Cls) -> Cls:
    """Class decorator: let torch find the tensors in the fields of a dataclass. The name it is saved by is that of the class."""
    torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


@pytree
@dataclass(eq=False)
class HubertOutput(Output):
    """What `HubertModel.forward` returns. Logits and targets, one per codebook, come with targets; None where the config skips them.

    Attributes:
        x: (B, T, D), the output of the encoder, or of the block that was asked for.
        padding_mask: (B, T) bool, True = padding; None: there is none.
        mask_indices: (B, T) bool, the masked frames; None: nothing is masked.
        masks: over time, the same, and over channels (B, D); another model that is given them sees the same frames.
        chunks: (chunk_size, left_chunks), in which the encoder ran; another model may be given them, too.
        features: (B, T, D), what enters the encoder, before the masks.
        features_pen: (), the mean square of the extractor's output.
        features_square: (B, T), the same of each frame; in evaluation.
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
    """What `Recognizer.forward` returns: losses in nats, summed over letters.

    Attributes:
        loss: (), the weighted sum of both, or the one there is.
        loss_ctc: (), detached; if the CTC layer learns.
        log_probs: (B, T, V), detached; if the CTC layer learns.
        lengths: (B,), frames of each utterance; if the CTC layer learns.
        loss_attention: (), detached; with a decoder.
        correct: (), letters that the decoder has right; with a decoder.
        count: (), letters that the decoder has to say; with a decoder.
        encoded: (B, T, D), detached, the output of the encoder; in evaluation, if the CTC layer does not learn.
        frames: (B,), valid frames of it.
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
