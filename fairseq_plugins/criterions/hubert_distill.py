"""A student, as a rule a binarized one, learns from labels and from what a teacher does at every layer and at the codebook."""

# B batch, S samples, T frames, N frames of one kind (masked or unmasked), C classes of a codebook, L layers

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import FairseqDataclass
from omegaconf import MISSING
from torch import Tensor

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.quant.distill import check_teacher, codebook_divergence, hidden_distances

from ..runtime.stopping import one_line_errors
from .hubert_eff import HubertEffCriterion
from .throughput import audio_seconds


@dataclass
class HubertDistillConfig(FairseqDataclass):
    """Keys of `criterion`."""

    teacher: str = field(default=MISSING, metadata={"help": "checkpoint to learn from: of this plug-in, or of stock HuBERT"})
    pred_masked_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy with the labels at masked frames"})
    pred_nomask_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy with the labels at unmasked frames"})
    codebook_weight: float = field(default=1.0, metadata={"help": "weight of KL(teacher || student) over the codebook at masked frames"})
    codebook_nomask_weight: float = field(default=0.0, metadata={"help": "weight of the same at unmasked frames"})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "weight of the mean squared difference of the hidden states, a mean over states"}
    )
    hidden_normalize: bool = field(default=False, metadata={"help": "divide that of each state by the variance of the teacher's state"})


@register_criterion("hubert_distill", dataclass=HubertDistillConfig)
class HubertDistillCriterion(HubertEffCriterion):
    """Cross-entropy with labels and KL from a teacher, each at masked and at unmasked frames, and the differences of all hidden states.

    With the weights l, k and h of the keys, M masked and U unmasked frames (of every codebook), the loss is a sum over frames,

        l_m CE(M) + l_u CE(U) + k_m KL(M) + k_u KL(U) + h sum_b n_b mean_s |student_s - teacher_s|^2

    where n_b is the number of frames of utterance b that count, those of a kind (masked, unmasked) in which labels or KL have a weight, or
    all of them where only hidden states do; their total is what fairseq divides by. The last mean is over the states 0 ... L, valid
    frames and channels of the utterance, so that neither depth nor the other utterances of a batch change the balance.

    The teacher is in eval mode and sees the student's masks, in the student's chunks if it was built for them. It is no part of what is
    optimized or saved. Beside the figures of `hubert_eff` it logs `loss_kl` and `loss_kl_u` (bits per masked and per unmasked frame),
    `hidden_mse` (a mean over states) and
    `correct_t_i`, the share of masked frames at which student and teacher choose the same class.
    """

    terms: ClassVar[Mapping[str, str]] = {
        **HubertEffCriterion.terms, "codebook_weight": "m", "codebook_nomask_weight": "u", "hidden_weight": "",
    }  # fmt: skip

    def __init__(
        self,
        task: Any,
        teacher: str,
        codebook_weight: float,
        hidden_weight: float,
        hidden_normalize: bool,
        pred_masked_weight: float = 0.0,
        pred_nomask_weight: float = 0.0,
        codebook_nomask_weight: float = 0.0,
    ) -> None:
        super().__init__(task, pred_masked_weight, pred_nomask_weight)
        self.divergence_weights = {"m": codebook_weight, "u": codebook_nomask_weight}
        self.hidden_weight, self.hidden_normalize = hidden_weight, hidden_normalize
        with one_line_errors():
            if not teacher:
                raise UserError("criterion.teacher is not set: give the checkpoint to learn from, criterion.teacher=FILE")
            model = hubert_eff.load(teacher).requires_grad_(False)
            task.note_file("criterion.teacher", Path(teacher))
            try:
                check_teacher(model, task.model)
            except UserError as error:
                raise UserError(f"criterion.teacher={teacher}: {error}") from error
        self.teacher = (model,)  # in a tuple: no part of the criterion's parameters

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss (a sum over frames), the number of frames it counts, and what to log: numbers and histograms."""
        inputs, targets = sample["net_input"], sample["target_list"]
        output = model(target_list=targets, return_states=True, **inputs)
        teacher = self._placed(inputs["source"])
        with torch.no_grad():
            taught = teacher(
                inputs["source"], targets, inputs.get("padding_mask"), features_only=True, masks=output["masks"], return_states=True,
                chunks=output["chunks"] if teacher.config.streaming else None,
            )  # fmt: skip
            padding, masked = output["padding_mask"], output["mask_indices"]  # (B, T)
            valid = torch.ones(taught["x"].shape[:2], dtype=torch.bool, device=taught["x"].device) if padding is None else ~padding
            masked = torch.zeros_like(valid) if masked is None else masked
            frames = {"m": valid & masked, "u": valid & ~masked}
        loss, _, log = self.label_losses(output)
        for part, weight in self.divergence_weights.items():
            ours = output[f"logits_{part}"]  # (N, C) per codebook
            if ours is None or (part == "u" and weight == 0):
                continue
            with torch.no_grad():
                theirs = teacher.logits(taught["x"][frames[part]])
            divergence = codebook_divergence(ours, theirs)
            loss = loss + weight * divergence
            name = "kl" if part == "m" else "kl_u"
            log[f"loss_{name}"], log[f"count_{name}"] = divergence.detach(), theirs[0].size(0)
            if part == "m":
                for i, (mine, wanted) in enumerate(zip(ours, theirs)):
                    log[f"correct_t_{i}"], log[f"count_t_{i}"] = (mine.argmax(-1) == wanted.argmax(-1)).sum(), wanted.size(0)
        counted = torch.stack([frames[part].sum(1) for part in self._counted()]).sum(0)  # (B,)
        sample_size = int(counted.sum())
        distance = hidden_distances(output["states"], taught["states"], None if padding is None else valid, self.hidden_normalize).mean(1)
        hidden = (distance * counted).sum()
        loss = loss + self.hidden_weight * hidden
        log.update(
            log_hidden_mse=hidden.detach(), loss=loss.detach(), ntokens=sample_size, nsentences=sample["id"].numel(),
            sample_size=sample_size, audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        return loss, sample_size, log

    def _counted(self) -> list[str]:
        """The kinds of frames that the loss is a mean over."""
        return [part for part in "mu" if self.weights[part] > 0 or self.divergence_weights[part] > 0] or ["m", "u"]

    def _placed(self, source: Tensor) -> Any:
        """The teacher where the audio (B, S) is, in its precision."""
        (teacher,) = self.teacher
        first = next(teacher.parameters())
        if first.device != source.device or first.dtype != source.dtype:
            teacher.to(source.device, source.dtype)
        return teacher
