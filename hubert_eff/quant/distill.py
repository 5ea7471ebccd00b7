"""What a binarized student learns from a teacher (Liu et al. 2022, "BiT", section 3: each stage's model teaches the next one)."""

# B batch, T frames, D model dim, N chosen frames, C codewords

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import HubertConfig
from ..encoders.registry import encoder_of
from ..errors import UserError
from ..models.extractor import receptive_field
from ..models.hubert import LABEL_EMBEDDINGS, HubertModel
from .storage import is_packed

CODEBOOKS = ("final_proj.", "target_glu.", LABEL_EMBEDDINGS)  # prefixes of the names in the pre-training head


def codebook_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """KL(teacher || student) of logits (N, C), one pair per codebook, in nats, summed over frames and codebooks.

    Its gradient is that of the cross entropy with the teacher's probabilities; equal logits give 0.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        wanted, found = F.log_softmax(theirs.float(), -1), F.log_softmax(ours.float(), -1)
        total = total + F.kl_div(found, wanted, reduction="sum", log_target=True)
    return total


def hidden_distances(student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor | None, normalize: bool = False) -> Tensor:
    """Mean squared difference of each pair of hidden states (B, T, D) over an utterance's valid frames (B, T), None = all: (B, L + 1).

    normalize: divide by the variance of the teacher's state over the same frames and channels, so that each layer counts by how well it is
    matched and not by its scale. An utterance without a valid frame gives 0. Utterances do not affect each other.
    """
    distances = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        square = (ours.float() - theirs).square()
        distance = _mean(square, valid)
        if normalize:
            mean = _mean(theirs, valid)
            variance = _mean((theirs - mean.view(-1, 1, 1)).square(), valid)
            distance = distance / variance.clamp(min=1e-6)
        distances.append(distance)
    return torch.stack(distances, 1)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of x (B, T, D) over valid frames (B, T) and channels: (B,)."""
    if valid is None:
        return x.mean((1, 2))
    elements = valid.sum(1).clamp(min=1) * x.size(2)
    return x.masked_fill(~valid.unsqueeze(-1), 0.0).sum((1, 2)) / elements


def check_teacher(teacher: HubertModel, student: HubertModel, codebooks: bool = True) -> None:
    """Raise `UserError` unless each of the student's states, and with `codebooks` of its logits, has a counterpart in the teacher."""

    def sizes(model: HubertModel) -> dict[str, Any]:
        config = model.config
        receptive = receptive_field(model.config.conv_layers)
        of_codebooks = {"codebooks (classes of each)": list(model.num_classes), "label rate (task.label_rate)": config.label_rate}
        return {
            "layers": len(model.encoder.layers),
            "width (encoder_embed_dim)": config.encoder_embed_dim,
            **(of_codebooks if codebooks else {}),
            "samples under a frame (conv_feature_layers)": receptive,
            "normalization of the audio (task.normalize)": config.normalize,
            "rule for padding (valid_frames)": config.valid_frames,
        }

    if codebooks:
        _has_codebooks(teacher)
    wanted = sizes(student)
    for what, value in sizes(teacher).items():
        if value != wanted[what]:
            raise UserError(
                f"the teacher does not fit the student: {what} {value}, the student's {wanted[what]}: change the student's configuration, "
                "take another teacher, or name the states that are to be compared (criterion.student_layers, teacher_layers)"
            )
    if student.config.mask_channel_prob > 0 and teacher.config.input_dim != student.config.input_dim:
        raise UserError("masks of channels need a teacher whose first block has the student's width: set model.mask_channel_prob=0")


def _has_codebooks(model: HubertModel) -> None:
    if not model.num_classes:
        raise UserError(
            "it has no codebooks, which exports leave out: give the checkpoint that fairseq-hydra-train wrote, or set the weights of KL "
            "(criterion.codebook_weight, codebook_nomask_weight) to 0"
        )


def start_from(student: HubertModel, source: HubertModel, new_codebooks: bool = False) -> str:
    """Give the student the weights of another model, in place; returns a sentence that says which.

    Codebooks, and the projections to them, are copied if the source has as many classes in each, unless `new_codebooks` is set; otherwise
    the student keeps its own. From a float model, or one with activations of another width, a binarized student takes all weights and finds
    its scales on the first batch. From a model of the same width it also takes the scales, as a w1a1 model does from a w1a2 one. Raises
    `UserError` if the two models differ in more than `quant` and codebooks.
    """
    ours, theirs = encoder_of(student.config).name, encoder_of(source.config).name
    if ours != theirs:
        raise UserError(f"a model with the encoder {ours} cannot start from the weights of one with the encoder {theirs}")
    if source.fused or is_packed(source):
        raise UserError(
            f"it is {'fused' if source.fused else 'packed'} for inference and cannot be trained: give the model it was made from"
        )
    binarized = source.config.quant != "none"
    if binarized and student.config.quant == "none":
        raise UserError(f"a float model cannot start from a binarized one ({source.config.quant}): set model.quant=w1a1, or another start")
    _check_settings(student.config, source.config)
    kept = not new_codebooks and bool(source.num_classes) and tuple(student.num_classes) == tuple(source.num_classes)
    passed: tuple[str, ...] = () if kept else CODEBOOKS
    own = {name: tensor.shape for name, tensor in student.state_dict().items() if not name.startswith(passed)}
    quantizers = [name.removesuffix("initialized") for name in own if name.endswith(".initialized")]
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(passed)}
    started_anew: set[str] = set()
    was, becomes = source.config.quant, student.config.quant
    if binarized and was != becomes and (was, becomes) != ("w1a2", "w1a1"):
        started_anew = {f"{prefix}{part}" for prefix in quantizers for part in ("scale", "initialized")}
        state = {name: tensor for name, tensor in state.items() if name not in started_anew}
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"the student has no '{name}', which its source has: the two must agree in the model's keys and quant_policy")
        if own[name] != tensor.shape:
            raise UserError(f"'{name}' is {tuple(tensor.shape)} in the source, {tuple(own[name])} in the student: the sizes must agree")
    for name in own:
        if name not in state and name not in started_anew and (binarized or not name.startswith(tuple(quantizers))):
            raise UserError(f"the source has no '{name}', which the student has: the two must agree in the model's keys and quant_policy")
    student.load_state_dict({**student.state_dict(), **state})
    parameters = sum(tensor.numel() for tensor in state.values())
    codebooks = f"codebooks of {list(student.num_classes)} classes"
    if not kept:
        codebooks += f" are new (the source has {list(source.num_classes) or 'none'})"
    return f"{len(state)} tensors ({parameters:,} numbers) are taken over, {codebooks}" + (" too" if kept else "")


def _check_settings(student: HubertConfig, source: HubertConfig) -> None:
    """Raise `UserError` if the same weights would compute something else, although names and shapes agree."""
    for key, option in (
        ("conv_layers", "model.conv_feature_layers"), ("encoder_attention_heads", "model.encoder_attention_heads"),
        ("layer_norm_first", "model.layer_norm_first"), ("normalize", "task.normalize"),
    ):  # fmt: skip
        if getattr(student, key) != getattr(source, key):
            wanted = source.conv_feature_layers.replace(" ", "") if key == "conv_layers" else json.dumps(getattr(source, key))
            raise UserError(f"the source has another {option.partition('.')[2]}: set {option}={wanted}")
