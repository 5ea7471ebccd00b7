"""Searches of the CTC layer: greedy, prefix beam search that goes on as frames come, and scores of beginnings of texts."""

# B utterances, K texts of each, C letters that may follow, T frames, V labels: blank and letters

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from .alphabet import BLANK

NEVER = -1e30  # stands for log 0; differences of it are numbers
LEAST = -1e3  # log-probability of a label in a frame, below which none is told from another


def greedy(log_probs: Tensor) -> tuple[int, ...]:
    """The most probable label of each frame of (T, V), without repetitions and blanks (Graves et al. 2006, section 3.2)."""
    best = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return tuple(label for label in best if label != BLANK)


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


class PrefixBeam:
    """CTC prefix beam search (Hannun et al. 2014, algorithm 1, without a language model), frame by frame, however they are cut into pieces.

    Each frame extends the `beam` best beginnings by its `beam` best labels. `settle` moves what all beginnings share to `settled`, so that
    they do not grow with the audio; where none of them shares anything for `longest` letters, those that disagree with the best are
    dropped, and memory is bounded.
    """

    def __init__(self, beam: int, longest: int = 400) -> None:
        self.beam, self.longest = beam, longest
        self.settled: list[int] = []
        # what follows `settled` -> log-probability of its alignments that end in blank, and in its last letter
        self._beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}

    def feed(self, log_probs: Tensor) -> None:
        """Take the next frames, log-probabilities (T, V)."""
        values, labels = log_probs.topk(min(self.beam, log_probs.size(1)), dim=-1)
        for frame_values, frame_labels in zip(values.tolist(), labels.tolist(), strict=True):
            self._step(frame_values, frame_labels)

    def _step(self, values: list[float], labels: list[int]) -> None:
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (in_blank, in_letter) in self._beams.items():
            total = _add(in_blank, in_letter)
            for value, label in zip(values, labels, strict=True):
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
        best = sorted(possible, key=lambda item: _add(*item[1]), reverse=True)[: self.beam]
        self._beams = {prefix: (ends[0], ends[1]) for prefix, ends in best}

    def settle(self) -> list[int]:
        """Letters that no frame to come can change, of those not settled before; the last letter of a beginning stays open."""
        tails = list(self._beams)  # the best first
        if len(tails[0]) > self.longest:
            first = tails[0][: len(tails[0]) - self.longest]
            self._beams = {tail: ends for tail, ends in self._beams.items() if tail[: len(first)] == first}
            tails = list(self._beams)
        shared = 0
        for letters in zip(*tails, strict=False):
            if len(set(letters)) > 1:
                break
            shared += 1
        cut = max(0, min(shared, min(map(len, tails)) - 1))  # the next frame asks which letter was the last
        new = list(tails[0][:cut])
        self.settled += new
        self._beams = {tail[cut:]: ends for tail, ends in self._beams.items()}
        return new

    def best(self) -> list[tuple[tuple[int, ...], float]]:
        """The texts so far, best first, with the log-probability of all their alignments that the beam kept."""
        return [((*self.settled, *tail), _add(*ends)) for tail, ends in self._beams.items()]

    def open_letters(self) -> tuple[int, ...]:
        """The letters after `settled` in the best text."""
        return next(iter(self._beams))


def prefix_beam(log_probs: Tensor, beam: int) -> list[tuple[tuple[int, ...], float]]:
    """The most probable label sequences of (T, V) by `PrefixBeam`, best first, with their log-probabilities."""
    search = PrefixBeam(beam)
    search.feed(log_probs)
    return search.best()


class PrefixScores:
    """log p of all texts that begin so, under CTC, for K growing texts of each utterance (Watanabe et al. 2017, algorithm 2).

    The recursion over frames is a cumulative sum: r_t = logaddexp(r_{t-1}, p_t) + x_t has the closed form
    r_t = X_t + logcumsumexp(p_s - X_{s-1}) with X the running sum of x. Kept: two numbers per text and frame, in float64.
    """

    def __init__(self, log_probs: Tensor, padding: Tensor, end: int) -> None:
        """log_probs (B, T, V); padding (B, T), True = padding, at the end; end: the number of the end mark."""
        self.x = log_probs.double().clamp(min=LEAST)
        self.lengths, self.end = (~padding).sum(1), end
        blanks = self.x[..., BLANK].cumsum(1)
        start = blanks.new_zeros(len(blanks), 1)
        self.blanks = torch.cat((start, blanks), 1)  # (B, T + 1), from before the first frame on
        self.in_letter = torch.full_like(self.blanks, NEVER)[:, None]  # (B, K, T + 1)
        self.in_blank = self.blanks[:, None]
        self.last = torch.full((len(blanks), 1), BLANK, device=blanks.device)  # (B, K)
        self._grown: tuple[Tensor, Tensor, Tensor] | None = None

    def extend(self, letters: Tensor) -> Tensor:
        """letters (B, K, C) that may follow each text, the end mark among them or not -> log p of the longer beginnings (B, K, C)."""
        batch, texts, count = letters.shape
        frames = self.x.size(1)
        ending = letters == self.end
        chosen = letters.masked_fill(ending, BLANK)
        emit = self.x[:, None].expand(-1, texts, -1, -1).gather(3, chosen[:, :, None].expand(-1, -1, frames, -1))  # (B, K, T, C)
        total = torch.logaddexp(self.in_letter, self.in_blank)
        again = letters == self.last[..., None]
        ready = torch.where(again[:, :, None], self.in_blank[..., None], total[..., None])  # (B, K, T + 1, C)
        valid = torch.arange(frames, device=emit.device) < self.lengths[:, None]  # (B, T)
        score = (ready[:, :, :-1] + emit).masked_fill(~valid[:, None, :, None], NEVER).logsumexp(2)
        whole = total.gather(2, self.lengths[:, None, None].expand(-1, texts, 1))  # (B, K, 1), at the last valid frame
        self._grown = (letters, ready, emit)
        return torch.where(ending, whole, score)

    def choose(self, texts: Tensor, places: Tensor) -> None:
        """Go on with texts (B, K'), numbers below K, by the letters at `places` (B, K'), below C, that `extend` was given last."""
        assert self._grown is not None
        letters, ready, emit = self._grown
        rows = torch.arange(len(letters), device=letters.device)[:, None]
        self.last = letters[rows, texts, places]
        ready, emit = ready[rows, texts, :, places], emit[rows, texts, :, places]  # (B, K', T + 1), (B, K', T)
        sums = emit.cumsum(2)
        before = torch.cat((torch.zeros_like(sums[..., :1]), sums[..., :-1]), 2)
        in_letter = (sums + (ready[..., :-1] - before).logcumsumexp(2)).clamp(min=NEVER)
        self.in_letter = torch.cat((torch.full_like(in_letter[..., :1], NEVER), in_letter), 2)
        blanks = self.blanks[:, None]
        in_blank = blanks[..., 1:] + (self.in_letter[..., :-1] - blanks[..., :-1]).logcumsumexp(2)
        self.in_blank = torch.cat((torch.full_like(in_blank[..., :1], NEVER), in_blank.clamp(min=NEVER)), 2)

    def keep(self, utterances: Tensor) -> None:
        """Go on with these utterances alone, (B',)."""
        self.x, self.lengths, self.blanks = self.x[utterances], self.lengths[utterances], self.blanks[utterances]
        self.in_letter, self.in_blank, self.last = self.in_letter[utterances], self.in_blank[utterances], self.last[utterances]
        self._grown = None
