"""Label-synchronous beam search: texts grow letter by letter, by the attention decoder alone or jointly with CTC."""

# B utterances, K texts of each, C letters that may follow, U letters, T frames, D model dim, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .alphabet import BLANK
from .ctc import PrefixScores
from .model import Recognizer
from .steps import steps_of

MOST_FRAMES = 20_000  # frames times texts of a batch: what bounds the memory of a search
PICKED = 1.5  # letters per kept text that CTC scores, the most probable ones of the decoder (as ESPnet)

Found = list[tuple[tuple[int, ...], float]]  # letters and log-probabilities of texts, the best first


def batches(lengths: Sequence[int], beam: int) -> Iterator[list[int]]:
    """Numbers of utterances of these frames that are searched together: of like lengths, padded at most `MOST_FRAMES` / `beam` frames."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] * beam > MOST_FRAMES:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.no_grad()
def label_search(
    model: Recognizer, encoded: Sequence[Tensor], beam: int, ctc_weight: float = 0.0, longest: int | None = None,
    length_penalty: float = 0.0,
) -> list[Found]:  # fmt: skip
    """The `beam` best texts that were found, by (1 - w) log p_decoder + w log p_CTC, w = `ctc_weight` (Watanabe et al. 2017, section IV-B).

    encoded: outputs of the encoder (T, D), one per utterance; `model` in eval mode. A text has at most `longest` letters, and at most as
    many as its utterance has frames. With a `length_penalty` the score of a text that has ended is divided by its `norm`. Scores only fall
    as a text grows, so that an utterance is done when a text that has ended has a score that no open one can exceed. Raises `UserError` for
    a model without a decoder, or, with a weight, one whose CTC layer has learned nothing.
    """
    _ = model.head
    if ctc_weight:
        model.check_ctc()
    found: list[Found] = [[] for _ in encoded]
    for batch in batches([len(x) for x in encoded], beam):
        memory = torch.nn.utils.rnn.pad_sequence([encoded[i] for i in batch], batch_first=True)
        lengths = torch.tensor([len(encoded[i]) for i in batch], device=memory.device)
        for i, texts in zip(batch, _search(model, memory, lengths, beam, ctc_weight, longest, length_penalty), strict=True):
            found[i] = texts
    return found


def norm(letters: int, length_penalty: float) -> float:
    """What the score of a text of so many letters is divided by: ((5 + U) / 6) ** `length_penalty`, U symbols with the end (Wu et al. 2016,
    section 7, equation 14): 1 without a penalty, and of a text without letters."""
    return float(((6 + letters) / 6) ** length_penalty)


def _search(
    model: Recognizer, memory: Tensor, lengths: Tensor, beam: int, weight: float, longest: int | None, length_penalty: float
) -> list[Found]:
    """Of memory (B, T, D) with `lengths` (B,) valid frames."""
    device, end = memory.device, model.alphabet.end
    padding = torch.arange(memory.size(1), device=device) >= lengths[:, None]
    steps = steps_of(model.head, memory, padding)
    ctc = PrefixScores(model.ctc_log_probs(memory), padding, end) if weight else None
    picked = min(len(model.alphabet) - 1, math.ceil(PICKED * beam)) if ctc else len(model.alphabet) - 1
    most = [int(n) if longest is None else min(int(n), longest) for n in lengths]
    ended: list[Found] = [[] for _ in most]
    alive = list(range(len(most)))  # utterances that are not done: the rows of what follows
    said = torch.empty(len(most), 1, 0, dtype=torch.long, device=device)  # (B, K, U)
    last = torch.full((len(most), 1), end, device=device)  # (B, K)
    spoken = torch.zeros(len(most), 1, dtype=torch.float64, device=device)  # (B, K), log p of the decoder
    for length in range(max(most) + 1):
        scores = steps.next(last).double() + spoken[..., None]  # (B, K, V)
        best, letters = scores[..., BLANK + 1 : end].topk(picked, -1)
        letters = torch.cat((letters + BLANK + 1, torch.full_like(letters[..., :1], end)), -1)  # (B, K, C), the last one is the end
        best = torch.cat((best, scores[..., end:]), -1)
        joint = best if ctc is None else (1 - weight) * best + weight * ctc.extend(letters)
        _end(ended, alive, said, joint[..., -1] / norm(length, length_penalty), beam)
        kept = min(beam, joint.size(1) * picked)
        top, index = joint[..., :-1].flatten(1).topk(kept, -1)  # (B, K')
        texts, places = index.div(picked, rounding_mode="floor"), index % picked
        going = [
            row for row, i in enumerate(alive)
            if length < most[i] and (not ended[i] or ended[i][0][1] < float(top[row, 0]) / norm(most[i], length_penalty))
        ]  # fmt: skip
        if not going:
            break
        rows = torch.arange(len(alive), device=device)[:, None]
        spoken, last = best[rows, texts, places], letters[rows, texts, places]
        spoken = torch.where(top == -math.inf, top, spoken)
        said = torch.cat((said[rows, texts], last[..., None]), -1)
        steps.choose(texts)
        if ctc is not None:
            ctc.choose(texts, places)
        if len(going) < len(alive):
            chosen = torch.tensor(going, device=device)
            said, last, spoken = said[chosen], last[chosen], spoken[chosen]
            steps.keep(chosen)
            if ctc is not None:
                ctc.keep(chosen)
            alive = [alive[row] for row in going]
    return ended


def _end(ended: list[Found], alive: list[int], said: Tensor, scores: Tensor, beam: int) -> None:
    """Note texts (B, K, U) as ended with their scores (B, K), and keep the `beam` best of each utterance."""
    for i, texts, values in zip(alive, said.tolist(), scores.tolist(), strict=True):
        ended[i] += [(tuple(text), value) for text, value in zip(texts, values, strict=True) if value > -math.inf]
        ended[i] = sorted(ended[i], key=lambda text: -text[1])[:beam]
