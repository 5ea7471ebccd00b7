"""From encoder outputs to texts: by the CTC layer, by its texts rescored, and letter by letter by the attention decoder."""

# T frames, D model dim, U letters, N hypotheses

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown
from .alphabet import BLANK
from .ctc import greedy, prefix_beam
from .decoder import backwards, shifted
from .label_search import Found, label_search
from .model import Recognizer

SEARCHES = {
    "greedy": "the best label of each frame",
    "beam": "CTC prefix beam search (first pass)",
    "rescore": "its texts ranked by the attention decoder too (second pass)",
    "attention": "beam search letter by letter by the attention decoder alone",
    "joint": "the same, jointly with CTC's prefix scores",
}


@dataclass(frozen=True)
class Hypothesis:
    """A text, its letters as numbers, and its log-probability under what ranked it, divided as the length penalty asks."""

    text: str
    letters: tuple[int, ...]
    score: float


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


def default_search(model: Recognizer) -> str:
    """The search that is used where none is asked for: greedy, or that of the decoder where the CTC layer has learned nothing."""
    return "greedy" if model.learns_ctc else "attention"


def searches_of(model: Recognizer) -> list[str]:
    """The searches that a model can do."""
    by_ctc = ["greedy", "beam"] if model.learns_ctc else []
    by_decoder = ["rescore", "attention", "joint"] if model.learns_ctc else ["attention"]
    return by_ctc + (by_decoder if model.decoder is not None else [])


def check_search(model: Recognizer, search: str, beam: int, ctc_weight: float, length_penalty: float = 0.0) -> None:
    """Raise `UserError` for an unknown search, one that the model cannot do, and bad numbers: before any work."""
    if search not in SEARCHES:
        raise unknown("search", search, SEARCHES)
    if beam < 1:
        raise UserError(f"--beam {beam} must be at least 1")
    if not 0 <= length_penalty < math.inf:
        raise UserError(f"--length-penalty {length_penalty:g} must be 0 (none) or more: 0.6 favors longer texts, 1 more so")
    if search in ("rescore", "attention", "joint"):
        _ = model.head
    if search != "attention":
        model.check_ctc()
    if search == "joint" and not 0 < ctc_weight < 1:
        raise UserError(f"--ctc-weight {ctc_weight:g} must be between 0 and 1 for --search joint: 0 is --search attention")


@torch.no_grad()
def decode(
    model: Recognizer, encoded: Sequence[Tensor], search: str = "greedy", beam: int = 10, ctc_weight: float = 0.5,
    length_penalty: float = 0.0,
) -> list[list[Hypothesis]]:  # fmt: skip
    """The texts of several recordings, the best first. encoded: outputs of the encoder (T, D); else as `transcribe`.

    Searches letter by letter take recordings of like lengths together, as many as bounded memory allows (`label_search.MOST_FRAMES`).
    """
    check_search(model, search, beam, ctc_weight, length_penalty)
    if search in ("attention", "joint"):
        found = label_search(model, encoded, beam, ctc_weight if search == "joint" else 0.0, length_penalty=length_penalty)
    else:
        found = [_by_ctc(model, x[None], search, beam, ctc_weight) for x in encoded]
    return [[Hypothesis(model.alphabet.text(labels), labels, score) for labels, score in texts] for texts in found]


def _by_ctc(model: Recognizer, encoded: Tensor, search: str, beam: int, ctc_weight: float) -> Found:
    log_probs = model.ctc_log_probs(encoded)[0]
    if search == "greedy":
        return [(greedy(log_probs), float(log_probs.max(-1).values.sum()))]
    found = prefix_beam(log_probs, beam)
    if search == "rescore":
        second = decoder_scores(model, encoded, [labels for labels, _ in found])
        found = sorted(((f[0], s + ctc_weight * f[1]) for f, s in zip(found, second, strict=True)), key=lambda f: -f[1])
    return found


@torch.no_grad()
def transcribe(
    model: Recognizer, wav: Tensor, search: str = "greedy", beam: int = 10, ctc_weight: float = 0.5, length_penalty: float = 0.0,
    **chunks: Any,
) -> list[Hypothesis]:  # fmt: skip
    """The texts of one recording, the best first (one if greedy). wav (1, S) at 16 kHz; `model` in eval mode.

    search: "greedy"; "beam", CTC prefix beam search; "rescore", the second pass: its texts ranked by the decoder's log-probability plus
    `ctc_weight` times CTC's (U2, Zhang et al. 2020, section 2.3); "attention", beam search letter by letter by the decoder alone; "joint",
    the same by (1 - `ctc_weight`) times its log-probability plus `ctc_weight` times CTC's of all that begins so (Watanabe et al. 2017).
    length_penalty: in the last two, the power of the length that scores are divided by (`label_search.norm`); nothing to the others.
    chunks: `chunk_size` and `left_chunks` of the encoder.
    Raises `UserError` for an unknown search, one that needs a decoder without one, or CTC's where the CTC layer has learned nothing.
    """
    check_search(model, search, beam, ctc_weight, length_penalty)
    encoded, _ = model.encode(wav, **chunks)
    return decode(model, [encoded[0]], search, beam, ctc_weight, length_penalty)[0]
