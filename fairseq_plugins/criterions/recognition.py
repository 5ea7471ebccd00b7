"""The losses of fine-tuning, and in validation the word error rate of the CTC layer's greedy text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from hubert_eff.errors import missing_extra
from hubert_eff.models.output import RecognizerOutput
from hubert_eff.recognition.search import greedy

from .throughput import audio_seconds, log_throughput


@register_criterion("hubert_eff_asr", dataclass=FairseqDataclass)
class HubertEffAsrCriterion(FairseqCriterion):
    """CTC, or its weighted sum with the attention decoder's cross entropy, per letter; the weights are the model's.

    Logged: `loss`, `loss_ctc`, `loss_attention` (bits per letter), `accuracy`, the share of letters that the decoder predicts right after
    the true ones before; in validation `wer` and `uer`, word and letter errors in %, of the CTC layer alone. With `ctc_weight` 0 that layer
    learns nothing, and nothing of it is logged.
    """

    only_in_validation = ("wer", "uer")  # figures that training does not log

    def forward(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns the loss (a sum over letters), the number of letters, and what to log."""
        output = model(targets=sample["targets"], target_lengths=sample["target_lengths"], **sample["net_input"])
        letters = int(sample["target_lengths"].sum())
        log: dict[str, Any] = {key: output[key] for key in ("loss_ctc", "loss_attention", "correct", "count") if key in output}
        log.update(
            loss=output["loss"].detach(), ntokens=letters, nsentences=sample["id"].numel(), sample_size=letters,
            audio_seconds=audio_seconds(sample),
        )  # fmt: skip
        if not model.training and "log_probs" in output:
            log.update(_errors(model, sample, output))
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
            ("accuracy", "correct", "count", 1.0), ("wer", "word_errors", "words", 100.0), ("uer", "letter_errors", "letters", 100.0)
        ):  # fmt: skip
            if part in total:
                metrics.log_scalar_sum(f"_{part}", total[part])
                metrics.log_scalar_sum(f"_{whole}", total[whole])
                metrics.log_derived(key, _share(f"_{part}", f"_{whole}", scale), priority=2)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: ranks exchange their logs in one all-reduce."""
        return True


def _errors(model: Any, sample: dict[str, Any], output: RecognizerOutput) -> dict[str, int]:
    """Word and letter errors of a batch, by jiwer."""
    try:
        import jiwer
    except ImportError as error:
        raise missing_extra("jiwer", "fairseq", "the word error rate of a validation") from error
    module = getattr(model, "module", model)
    said = [module.alphabet.text(row[:n].tolist()) for row, n in zip(sample["targets"], sample["target_lengths"])]
    heard = [module.alphabet.text(greedy(row[:n])) for row, n in zip(output["log_probs"], output["lengths"])]
    words, letters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
    return {
        "word_errors": words.substitutions + words.deletions + words.insertions,
        "words": words.hits + words.substitutions + words.deletions,
        "letter_errors": letters.substitutions + letters.deletions + letters.insertions,
        "letters": letters.hits + letters.substitutions + letters.deletions,
    }


def _share(part: str, whole: str, scale: float) -> Callable[[Any], float]:
    return lambda meters: round(scale * meters[part].sum / max(meters[whole].sum, 1.0), 4)
