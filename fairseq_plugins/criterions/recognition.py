"""The losses of fine-tuning and, in validation, the error rates of the recognized texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from hubert_eff.errors import UserError
from hubert_eff.models.output import RecognizerOutput
from hubert_eff.recognition.ctc import greedy
from hubert_eff.recognition.label_search import label_search
from hubert_eff.recognition.scoring import score

from .throughput import audio_seconds, log_throughput

SPARE = 10  # letters that a text in validation may have beyond twice the longest transcript, because an untrained model finds no end


@dataclass
class HubertEffAsrConfig(FairseqDataclass):
    """Keys of `criterion`."""

    valid_beam: int = field(
        default=4, metadata={"help": "number of texts that the decoder's beam search keeps in validation if ctc_weight=0"}
    )


@register_criterion("hubert_eff_asr", dataclass=HubertEffAsrConfig)
class HubertEffAsrCriterion(FairseqCriterion):
    """CTC, or its weighted sum with the attention decoder's cross entropy, per letter; the weights are the model's.

    Logged: `loss`, `loss_ctc`, `loss_attention` (bits per letter), `accuracy`, the share of letters that the decoder predicts right after
    the true ones before; in validation `wer` and `cer`, word and character errors in %, of the CTC layer's greedy text; or, with
    `ctc_weight` 0, where that layer learns nothing, of the decoder's own beam search with `valid_beam` texts.
    """

    only_in_validation = ("wer", "cer")  # figures that training does not log

    def __init__(self, task: Any, valid_beam: int = 4) -> None:
        super().__init__(task)
        if valid_beam < 1:
            raise UserError(f"criterion.valid_beam={valid_beam} must be at least 1")
        self.valid_beam = valid_beam

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss (a sum over letters), the number of letters, and what to log."""
        output = model(targets=sample["targets"], target_lengths=sample["target_lengths"], **sample["net_input"])
        letters = int(sample["target_lengths"].sum())
        log: dict[str, Any] = {key: output[key] for key in ("loss_ctc", "loss_attention", "correct", "count") if key in output}
        log.update(
            loss=output["loss"].detach(), ntokens=letters, nsentences=sample["id"].numel(), sample_size=letters,
            audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        if not model.training:
            log.update(_errors(getattr(model, "module", model), sample, output, self.valid_beam))
        return output["loss"], letters, log

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        """Log one update or validation batch; shares are exact over any interval."""
        total = {key: float(sum(log[key] for log in logging_outputs)) for key in logging_outputs[0]}
        letters = max(total["sample_size"], 1.0)
        log_throughput(total["audio_seconds"])
        for key in ("loss", "loss_ctc", "loss_attention"):
            if key in total:
                metrics.log_scalar(key, total[key] / letters / math.log(2), letters, priority=0 if key == "loss" else 30, round=3)
        for key, part, whole, scale in (
            ("accuracy", "correct", "count", 1.0), ("wer", "word_errors", "words", 100.0), ("cer", "character_errors", "characters", 100.0)
        ):  # fmt: skip
            if part in total:
                metrics.log_scalar_sum(f"_{part}", total[part])
                metrics.log_scalar_sum(f"_{whole}", total[whole])
                metrics.log_derived(key, _share(f"_{part}", f"_{whole}", scale), priority=2)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: ranks exchange their logs in one all-reduce."""
        return True


def _errors(model: Any, sample: dict[str, Any], output: RecognizerOutput, beam: int) -> dict[str, int]:
    """Word and character errors of a batch."""
    text = model.alphabet.text
    said = [text(row[:n].tolist()) for row, n in zip(sample["targets"], sample["target_lengths"])]
    if output.log_probs is not None and output.lengths is not None:
        heard = [text(greedy(row[:n])) for row, n in zip(output.log_probs, output.lengths)]
    else:
        assert output.encoded is not None and output.frames is not None
        encoded = [row[:n] for row, n in zip(output.encoded, output.frames.tolist())]
        found = label_search(model, encoded, beam, longest=2 * int(sample["target_lengths"].max()) + SPARE)
        heard = [text(texts[0][0]) for texts in found]
    errors = score(said, heard)
    return {
        "word_errors": errors.words.count, "words": errors.words.total,
        "character_errors": errors.characters.count, "characters": errors.characters.total,
    }  # fmt: skip


def _share(part: str, whole: str, scale: float) -> Callable[[Any], float]:
    return lambda meters: round(scale * meters[part].sum / max(meters[whole].sum, 1.0), 4)
