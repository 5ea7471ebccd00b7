"""Masked prediction loss of HuBERT, with figures that distinguish learning from collapse."""

# S frames of one kind (masked or unmasked) in the batch, C classes of a codebook

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.hubert_criterion import HubertCriterionConfig
from fairseq.logging import metrics
from torch import Tensor

from hubert_eff.config import HubertConfig
from hubert_eff.errors import UserError
from hubert_eff.models.output import HubertOutput

from ..runtime.stopping import one_line_errors
from .throughput import audio_seconds, log_throughput


def class_counts(classes: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs. classes (S,) long -> (C,) long, without waiting for the device as bincount does."""
    counts = torch.zeros(num_classes, dtype=torch.long, device=classes.device)
    return counts.scatter_add_(0, classes, torch.ones_like(classes))


def perplexity(counts: Tensor) -> float:
    """2 to the entropy (bits) of a histogram (C,): 1 for a single class, C if all classes are equally frequent."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(torch.special.entr(share).sum()))


def skipped(key: str, part: str) -> UserError:
    """The error for a model that leaves out the frames to which a weight applies."""
    skip = {"m": "skip_masked", "u": "skip_nomask"}[part]
    return UserError(f"criterion.{key} is positive, but model.{skip}=true leaves these frames out: change one of the two")


def check_frames(key: str, part: str, config: HubertConfig) -> None:
    """Raise `UserError` if a model has no frames of the kind to which a positive weight applies; "" is every kind."""
    if (part == "m" and config.skip_masked) or (part == "u" and config.skip_nomask):
        raise skipped(key, part)
    if part == "m" and config.mask_prob == 0:
        raise UserError(f"criterion.{key} is positive, but model.mask_prob=0 masks no frame: change one of the two")


@register_criterion("hubert_eff", dataclass=HubertCriterionConfig)
class HubertEffCriterion(FairseqCriterion):
    """Cross entropy over the codebook, summed over masked (and, weighted, unmasked) frames, plus the feature penalty.

    Takes the keys of fairseq's `hubert` criterion. Logged per codebook i, each exact over the whole interval or validation set
    and over all ranks: `correct_m_i` masked accuracy, `majority_m_i` share of the most frequent label among masked frames (what a
    constant prediction would reach), `code_ppl_i` perplexity of the predicted classes, `label_ppl_i` that of the labels,
    `correct_u_i` accuracy on unmasked frames; losses in bits per frame; `audio_per_s` and `mem_gb` (`throughput`).
    """

    only_in_validation: tuple[str, ...] = ()  # figures that training does not log
    terms: ClassVar[Mapping[str, str]] = {"pred_masked_weight": "m", "pred_nomask_weight": "u"}  # key of a loss's weight -> its frames

    def __init__(
        self,
        task: Any,
        pred_masked_weight: float,
        pred_nomask_weight: float,
        loss_weights: Sequence[float] | None = None,
        log_keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__(task)
        with one_line_errors():
            if loss_weights is not None and len(loss_weights) != 1:
                raise UserError(
                    f"criterion.loss_weights has {len(loss_weights)} values, but the model has one extra loss, the feature "
                    "penalty: write one value, or null for none"
                )
        self.weights = {"m": pred_masked_weight, "u": pred_nomask_weight}
        self.penalty_weight = loss_weights[0] if loss_weights else 0.0
        self.log_keys = list(log_keys or ())

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        """Build from `cfg`. Raises `UserError` for invalid weights and for weights of frames that the task's model leaves out."""
        with one_line_errors():
            weights = {key: getattr(cfg, key) for key in cls.terms}
            for key, weight in weights.items():
                if not 0 <= weight < math.inf:
                    raise UserError(f"criterion.{key}={weight:g}: the weight of a loss must be 0 or more")
            if not any(weights.values()):
                raise UserError(f"criterion: {', '.join(weights)} are all 0, so nothing would be learned: set one of them above 0")
            model = getattr(task, "model", None)
            for key, weight in weights.items():
                if weight > 0 and model is not None:
                    check_frames(key, cls.terms[key], model.config)
        return super().build_criterion(cfg, task)

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss (a sum over frames), the number of frames it counts, and what to log: numbers and histograms."""
        output = model(target_list=sample["target_list"], **sample["net_input"])
        loss, sample_size, log = self.label_losses(output)
        if self.penalty_weight:
            penalty = self.penalty_weight * (output["features_pen"].float() * sample_size if model.training else self._penalty(output))
            loss = loss + penalty
            log["loss_features_pen"] = penalty.detach()
        for key in self.log_keys:
            if key in output:
                log[f"log_{key}"] = float(output[key]) * sample_size
        log.update(
            loss=loss.detach(), ntokens=sample_size, nsentences=sample["id"].numel(), sample_size=sample_size,
            audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        return loss, sample_size, log

    def _penalty(self, output: HubertOutput) -> Tensor:
        """The feature penalty of a validation, summed over the frames that count, for each utterance independent of its batch."""
        square, masked, padding = output["features_square"], output["mask_indices"], output["padding_mask"]  # (B, T)
        valid = torch.ones_like(square, dtype=torch.bool) if padding is None else ~padding
        masked = torch.zeros_like(valid) if masked is None else masked
        chosen = {"m": valid & masked, "u": valid & ~masked}
        frames = torch.stack([chosen[part].sum(1) for part, weight in self.weights.items() if weight > 0]).sum(0)  # (B,)
        means = (square * valid).sum(1) / valid.sum(1).clamp(min=1)
        return (means * frames).sum()

    def label_losses(self, output: HubertOutput) -> tuple[Tensor, int, dict[str, Any]]:
        """The weighted cross entropy of a model's output with the labels, the number of frames it counts, what to log of both kinds."""
        loss = output["features_pen"].new_zeros((), dtype=torch.float32)
        log: dict[str, Any] = {}
        sample_size = 0
        for part, weight in self.weights.items():
            if output[f"logits_{part}"] is None:
                if weight > 0:
                    raise skipped(next(key for key, kind in HubertEffCriterion.terms.items() if kind == part), part)
                continue
            for i, (logits, targets) in enumerate(zip(output[f"logits_{part}"], output[f"targets_{part}"])):
                logits = logits.float()  # (S, C)
                part_loss = F.cross_entropy(logits, targets, reduction="sum")
                log[f"loss_{part}_{i}"] = part_loss.detach()
                with torch.no_grad():
                    predicted = logits.argmax(-1)  # (S,)
                    log[f"correct_{part}_{i}"] = (predicted == targets).sum()
                    log[f"count_{part}_{i}"] = targets.numel()
                    if part == "m":
                        log[f"codes_{i}"] = class_counts(predicted, logits.size(-1))
                        log[f"labels_{i}"] = class_counts(targets, logits.size(-1))
                if weight > 0:
                    loss = loss + weight * part_loss
            if weight > 0:
                sample_size += output[f"targets_{part}"][0].numel()
        return loss, sample_size, log

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        """Log one update or validation batch. Sums go to hidden meters, so that ratios are exact over any interval."""
        total = {key: sum(log[key] for log in logging_outputs) for key in logging_outputs[0]}
        frames = max(float(total["sample_size"]), 1.0)
        metrics.log_scalar("loss", float(total["loss"]) / frames / math.log(2), frames, priority=0, round=3)
        log_throughput(float(total["audio_seconds"]))
        for key, value in total.items():
            name, _, index = key.rpartition("_")
            if key.startswith("loss_"):
                count = max(float(total.get(key.replace("loss_", "count_"), frames)), 1.0)  # bits per frame of its own kind
                metrics.log_scalar(key, float(value) / count / math.log(2), count, priority=30, round=3)
            elif key.startswith("log_"):
                metrics.log_scalar(key.removeprefix("log_"), float(value) / frames, frames, priority=40, round=4)
            elif name.startswith("correct_"):
                counted = key.replace("correct_", "count_")
                metrics.log_scalar_sum(f"_{key}", float(value))
                metrics.log_scalar_sum(f"_{counted}", float(total[counted]))
                metrics.log_derived(key, _share(f"_{key}", f"_{counted}"), priority=2)
            elif name in ("codes", "labels"):
                metrics.log_scalar_sum(f"_{key}", torch.as_tensor(value).double().cpu())
                if name == "labels":
                    metrics.log_derived(f"majority_m_{index}", _majority(f"_{key}"), priority=3)
                metrics.log_derived(f"{name[:-1]}_ppl_{index}", _perplexity(f"_{key}"), priority=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: ranks exchange their logs, histograms included, in one all-reduce."""
        return True


# Values derived from summed meters. A meter that was just reset holds the number 0.


def _share(part: str, whole: str) -> Callable[[Any], float]:
    return lambda meters: round(meters[part].sum / max(meters[whole].sum, 1.0), 4)


def _majority(labels: str) -> Callable[[Any], float]:
    def value(meters: Any) -> float:
        counts = torch.as_tensor(meters[labels].sum)
        return round(float(counts.max() / counts.sum().clamp(min=1)), 4)

    return value


def _perplexity(counts: str) -> Callable[[Any], float]:
    return lambda meters: round(perplexity(torch.as_tensor(meters[counts].sum)), 2)
