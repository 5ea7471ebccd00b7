"""A student, as a rule a binarised one, learns from a teacher what it does at every layer and at the codebook."""

# B batch, S samples, T frames, N masked frames, C classes of a codebook

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import MISSING
from torch import Tensor

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.quant.distill import check_teacher, codebook_divergence, distances_of, hidden_distances, hidden_sums

from ..runtime.stopping import one_line_errors
from .hubert_eff import HubertEffCriterion
from .throughput import audio_seconds


@dataclass
class HubertDistillConfig(FairseqDataclass):
    """Keys of `criterion`."""

    teacher: str = field(default=MISSING, metadata={"help": "checkpoint to learn from: of this plug-in, or of stock HuBERT"})
    codebook_weight: float = field(default=1.0, metadata={"help": "weight of KL(teacher || student) over the codebook at masked frames"})
    hidden_weight: float = field(default=1.0, metadata={"help": "weight of the mean squared differences of the hidden states, summed"})
    hidden_normalize: bool = field(default=False, metadata={"help": "divide each by the variance of the teacher's state"})


@register_criterion("hubert_distill", dataclass=HubertDistillConfig)
class HubertDistillCriterion(HubertEffCriterion):
    """KL at masked frames, as the batch's mean, plus the squared differences of all hidden states at valid frames.

    The teacher is in eval mode and sees the student's masks, in the student's chunks if it was built for them. It is no part of what is
    optimised or saved. Beside the figures of `hubert_eff` it logs `loss_kl` (bits per masked frame), `hidden_mse` (the sum over states) and
    `correct_t_i`, the share of masked frames at which student and teacher choose the same class.
    """

    def __init__(
        self,
        task: Any,
        teacher: str,
        codebook_weight: float,
        hidden_weight: float,
        hidden_normalize: bool,
    ) -> None:
        super().__init__(task, pred_masked_weight=0.0, pred_nomask_weight=0.0)  # labels are only compared with
        self.codebook_weight, self.hidden_weight, self.hidden_normalize = codebook_weight, hidden_weight, hidden_normalize
        with one_line_errors():
            if not teacher:
                raise UserError("criterion.teacher is not set: give the checkpoint to learn from, criterion.teacher=FILE")
            model = hubert_eff.load(teacher).requires_grad_(False)
            task.note_file("criterion.teacher", Path(teacher))
            try:
                check_teacher(model, task.model)
            except UserError as error:
                raise UserError(f"criterion.teacher={teacher}: {error}") from error
            if task.model.config.skip_masked or task.model.config.mask_prob == 0:
                raise UserError("criterion hubert_distill compares masked frames: set model.mask_prob above 0 and model.skip_masked=false")
        self.teacher = (model,)  # in a tuple: no part of the criterion's parameters

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss times the number of masked frames, that number, and what to log."""
        inputs, targets = sample["net_input"], sample["target_list"]
        output = model(target_list=targets, return_states=True, **inputs)
        teacher = self._placed(inputs["source"])
        with torch.no_grad():
            taught = teacher(
                inputs["source"], targets, inputs.get("padding_mask"), features_only=True, masks=output["masks"], return_states=True,
                chunks=output["chunks"] if teacher.config.streaming else None,
            )  # fmt: skip
            padding, masked = output["padding_mask"], output["mask_indices"]
            valid = None if padding is None else ~padding  # (B, T)
            wanted = teacher.logits(taught["x"][masked if valid is None else masked & valid])  # (N, C) per codebook
        frames = wanted[0].size(0)
        _, _, log = self.label_losses(output)
        divergence = codebook_divergence(output["logits_m"], wanted)
        distance = hidden_distances(output["states"], taught["states"], valid, self.hidden_normalize).sum()
        loss = self.codebook_weight * divergence + self.hidden_weight * distance * frames
        for i, (ours, theirs) in enumerate(zip(output["logits_m"], wanted)):
            log[f"correct_t_{i}"], log[f"count_t_{i}"] = (ours.argmax(-1) == theirs.argmax(-1)).sum(), frames
        log.update(
            loss_kl=divergence.detach(), ntokens=frames, nsentences=sample["id"].numel(), sample_size=frames,
            audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        if model.training:
            log.update(loss=loss.detach(), log_hidden_mse=distance.detach() * frames)
        else:
            sums, count = hidden_sums(output["states"], taught["states"], valid)
            weights = torch.tensor([self.codebook_weight, self.hidden_weight, float(self.hidden_normalize), 1.0])
            log.update(hidden_sums=sums.detach(), hidden_count=count, hidden_weights=weights)
        return loss, frames, log

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        """As of `hubert_eff`; in validation the loss is that of all frames together, however they lie in batches."""
        HubertEffCriterion.reduce_metrics(logging_outputs)
        if "hidden_sums" not in logging_outputs[0]:
            return
        for key in ("hidden_sums", "hidden_count", "hidden_weights", "loss_kl", "sample_size"):
            total = sum(log[key] for log in logging_outputs)
            metrics.log_scalar_sum(f"_{key}", torch.as_tensor(total).double().cpu())
        metrics.log_derived("hidden_mse", lambda meters: round(_hidden(meters), 4), priority=40)
        metrics.log_derived("loss", _loss, priority=0)

    def _placed(self, source: Tensor) -> Any:
        """The teacher where the audio (B, S) is, in its precision."""
        (teacher,) = self.teacher
        first = next(teacher.parameters())
        if first.device != source.device or first.dtype != source.dtype:
            teacher.to(source.device, source.dtype)
        return teacher


# Values derived from summed meters. A meter that was just reset holds the number 0.


def _weights(meters: Any) -> list[float]:
    """Weight of the codebook's loss, of the hidden states', and whether these are normalized."""
    total = torch.as_tensor(meters["_hidden_weights"].sum).expand(4)
    return (total / total[-1].clamp(min=1.0)).tolist()


def _hidden(meters: Any) -> float:
    sums = torch.as_tensor(meters["_hidden_sums"].sum)
    if sums.dim() < 2:
        return 0.0
    return float(distances_of(sums, float(meters["_hidden_count"].sum), _weights(meters)[2] > 0).sum())


def _loss(meters: Any) -> float:
    codebook, hidden, *_ = _weights(meters)
    divergence = float(meters["_loss_kl"].sum) / max(float(meters["_sample_size"].sum), 1.0)
    return round((codebook * divergence + hidden * _hidden(meters)) / math.log(2), 3)
