"""From frame-wise log-probabilities to texts: greedy, CTC prefix beam search, and rescoring by the attention decoder."""

# T frames, V vocabulary, U letters, N hypotheses

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown
from .alphabet import BLANK
from .decoder import backwards, shifted
from .model import Recognizer

SEARCHES = ("greedy", "beam", "rescore")


@dataclass(frozen=True)
class Hypothesis:
    """A text, its letters as numbers, and its log-probability under what ranked it."""

    text: str
    letters: tuple[int, ...]
    score: float


def greedy(log_probs: Tensor) -> tuple[int, ...]:
    """The most probable label of each frame of (T, V), repetitions and blanks removed (Graves et al. 2006, section 3.2)."""
    best = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return tuple(label for label in best if label != BLANK)


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def prefix_beam(log_probs: Tensor, beam: int) -> list[tuple[tuple[int, ...], float]]:
    """The most probable label sequences of (T, V), best first, with the log-probability of all their alignments that the beam kept.

    CTC prefix beam search (Hannun et al. 2014, algorithm 1, without a language model). Each frame extends by its `beam` best labels.
    """
    top = min(beam, log_probs.size(1))
    values, labels = log_probs.topk(top, dim=-1)
    # prefix -> log-probability of its alignments that end in blank, and in its last letter
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame_values, frame_labels in zip(values.tolist(), labels.tolist(), strict=True):
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (in_blank, in_letter) in beams.items():
            total = _add(in_blank, in_letter)
            for value, label in zip(frame_values, frame_labels, strict=True):
                if value == -math.inf:
                    continue
                if label == BLANK:
                    same = grown[prefix]
                    same[0] = _add(same[0], total + value)
                    continue
                longer = grown[(*prefix, label)]
                if prefix and prefix[-1] == label:
                    same = grown[prefix]
                    same[1] = _add(same[1], in_letter + value)
                    longer[1] = _add(longer[1], in_blank + value)
                else:
                    longer[1] = _add(longer[1], total + value)
        possible = ((prefix, ends) for prefix, ends in grown.items() if max(ends) > -math.inf)
        best = sorted(possible, key=lambda item: _add(*item[1]), reverse=True)[:beam]
        beams = {prefix: (ends[0], ends[1]) for prefix, ends in best}
    return [(prefix, _add(*ends)) for prefix, ends in beams.items()]


@torch.no_grad()
def decoder_scores(model: Recognizer, encoded: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """log p(text | audio) of N texts under the attention decoder; encoded (1, T, D), all frames valid.

    With a second decoder its log p of the texts from their end counts as in training, by `decoder_reverse_weight` (U2++, Wu et al. 2021).
    """
    lengths = torch.tensor([len(t) for t in texts], device=encoded.device)
    targets = torch.full((len(texts), max(1, int(lengths.max()))), BLANK, device=encoded.device)
    for row, text in enumerate(texts):
        targets[row, : len(text)] = torch.tensor(text, dtype=torch.long)
    memory, end = encoded.expand(len(texts), -1, -1), model.alphabet.end

    def of(decoder: Any, said: Tensor) -> Tensor:
        letters, wanted, valid = shifted(said, lengths, end)
        scores = decoder(letters, memory, None, valid).float().log_softmax(-1)
        chosen: Tensor = scores.gather(-1, wanted[..., None]).squeeze(-1)  # (N, U + 1)
        return chosen.masked_fill(~valid, 0.0).sum(1)

    scores = of(model.head, targets)
    if model.config.decoder_right_layers:
        scores = torch.lerp(scores, of(model.head.right, backwards(targets, lengths)), model.config.decoder_reverse_weight)
    return scores.tolist()


@torch.no_grad()
def transcribe(
    model: Recognizer, wav: Tensor, search: str = "greedy", beam: int = 10, ctc_weight: float = 0.5, **chunks: Any
) -> list[Hypothesis]:
    """The texts of one recording, the best first (one if greedy). wav (1, S) at 16 kHz; `model` in eval mode.

    search: "greedy"; "beam", CTC prefix beam search; "rescore", the second pass: its texts ranked by the decoder's log-probability plus
    `ctc_weight` times CTC's (U2, Zhang et al. 2020, section 2.3). chunks: `chunk_size` and `left_chunks` of the encoder.
    Raises `UserError` for an unknown search, "rescore" without a decoder, or a model whose CTC layer has learned nothing.
    """
    if search not in SEARCHES:
        raise unknown("search", search, SEARCHES)
    if beam < 1:
        raise UserError(f"--beam {beam} must be at least 1")
    model.check_ctc()  # refused before any work
    if search == "rescore":
        _ = model.head
    encoded, padding = model.encode(wav, **chunks)
    log_probs = model.ctc_log_probs(encoded)[0]
    if search == "greedy":
        labels = greedy(log_probs)
        found = [(labels, float(log_probs.max(-1).values.sum()))]
    else:
        found = prefix_beam(log_probs, beam)
    if search == "rescore":
        second = decoder_scores(model, encoded, [labels for labels, _ in found])
        found = sorted(((f[0], s + ctc_weight * f[1]) for f, s in zip(found, second, strict=True)), key=lambda f: -f[1])
    return [Hypothesis(model.alphabet.text(labels), labels, score) for labels, score in found]
