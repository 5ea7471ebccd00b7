"""Where in time each letter comes from, by gradients; whether an encoder reverses time (Schmitt et al. 2024).

G[s, t] = log || d log p(a_s | a_1 ... a_{s-1}, x) / d h_t ||_2 for the audio and for what enters and leaves every block.
"""

# S letters, T frames of 20 ms, V labels, D model dim, H heads, U decoder steps

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FRAME_STRIDE, SAMPLE_RATE
from ..errors import UserError, missing_extra
from ..recognition.alphabet import BLANK
from ..recognition.decoder import shifted
from ..recognition.model import Recognizer
from ..utils.progress import progress

FRAME_SECONDS = FRAME_STRIDE / SAMPLE_RATE
HEADS = ("ctc", "attention")
CLEAR = 0.5  # correlations closer to zero do not show the direction of time
_NEVER = -1e30  # stands for log 0; its gradient is a number


@dataclass(frozen=True)
class Segment:
    """A letter or a word, with its start and end in seconds."""

    label: str
    start: float
    end: float


def prefix_scores(log_probs: Tensor, labels: Sequence[int]) -> Tensor:
    """Compute log p(a_s | a_1 ... a_{s-1}, x) under CTC, (S,), from log-probabilities (T, V).

    They are ratios of prefix probabilities, which sum over all continuations and alignments (Graves 2008, section 7.5.3; Watanabe et al.
    2017, algorithm 2).
    """
    x = log_probs.double()
    text = torch.tensor(labels, device=x.device)
    repeats = torch.zeros(len(text), dtype=torch.bool, device=x.device)
    repeats[1:] = text[1:] == text[:-1]
    never = x.new_full((len(text) + 1,), _NEVER)
    in_letter = never  # alignments of the first s letters up to now that end in the last of them
    in_blank = torch.cat((never.new_zeros(1), never[1:]))
    begun = []
    for frame in x:  # (V,)
        ready = torch.where(repeats, in_blank[:-1], torch.logaddexp(in_blank, in_letter)[:-1])
        begins = ready + frame[text]  # (S,)
        begun.append(begins)
        stays = torch.logaddexp(in_blank, in_letter) + frame[BLANK]
        in_letter = torch.cat((never[:1], torch.logaddexp(in_letter[1:] + frame[text], begins)))
        in_blank = stays
    prefixes = torch.stack(begun).logsumexp(0)  # (S,)
    return torch.diff(prefixes, prepend=prefixes.new_zeros(1))


def letter_scores(model: Recognizer, encoded: Tensor, labels: Sequence[int], head: str) -> Tensor:
    """Compute log p(a_s | a_1 ... a_{s-1}, x), (S,), by the CTC layer or the attention decoder, from encoded (1, T, D)."""
    if head == "ctc":
        return prefix_scores(model.ctc_log_probs(encoded)[0], labels)
    targets = torch.tensor([list(labels)], device=encoded.device)
    letters, wanted, _ = shifted(targets, torch.tensor([len(labels)], device=encoded.device), model.alphabet.end)
    scores = model.head(letters, encoded)[0].log_softmax(-1)  # (S + 1, V + 1)
    chosen: Tensor = scores.gather(1, wanted[0][:, None])[:-1, 0]
    return chosen


def gradients(model: Recognizer, wav: Tensor, labels: Sequence[int], head: str = "ctc") -> dict[str, Tensor]:
    """G (S, T) of "input", the audio by frames of 20 ms, "0", what enters block 1, "1" ... "L", the outputs of the blocks; on the CPU.

    wav (1, S'); `model` in eval mode. One backward pass per letter. A block at a lower frame rate has its values repeated to 20 ms.
    Raises `UserError` for a head that the model does not have, and for a text too long for the audio.
    """
    if head == "attention":
        _ = model.head
    if head == "ctc":
        model.check_length(list(labels), wav.size(1), "the text")
    wav = wav.clone().requires_grad_()
    tapped: list[Tensor] = []
    blocks = model.hubert.encoder.layers
    handles = [blocks[0].register_forward_pre_hook(lambda _m, inputs: tapped.append(inputs[0]))]
    handles += [block.register_forward_hook(lambda _m, _i, output: tapped.append(output)) for block in blocks]
    config, frozen = model.hubert.config, model.hubert.config.feature_grad_mult
    try:
        config.feature_grad_mult = 1.0  # a frozen extractor would let no gradient through
        with torch.set_grad_enabled(True):
            encoded, _ = model.encode(wav)
            scores = letter_scores(model, encoded, labels, head)
    finally:
        config.feature_grad_mult = frozen
        for handle in handles:
            handle.remove()
    frames = model.hubert.num_frames(wav.size(1))
    names = ["input", *map(str, range(len(tapped)))]
    block_rates = model.hubert.encoder.block_rates
    rates = dict(zip(names, [1, block_rates[0], *block_rates], strict=True))  # the input of block 1 has the rate of that block
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    with progress("letters", len(labels)) as advance:
        for score in scores:
            found = torch.autograd.grad(score, [wav, *tapped], retain_graph=True)
            for name, grad in zip(names, found, strict=True):
                if name == "input":
                    grad = grad[0, : frames * FRAME_STRIDE]
                    grad = torch.nn.functional.pad(grad, (0, frames * FRAME_STRIDE - len(grad))).view(1, frames, FRAME_STRIDE)
                norm = torch.linalg.vector_norm(grad[0], dim=-1)  # (T',)
                rows[name].append(norm.repeat_interleave(rates[name])[:frames])
            advance(1)
    return {name: torch.stack(norms).clamp(min=1e-30).log().cpu() for name, norms in rows.items()}


def viterbi(scores: Tensor) -> list[tuple[int, int]]:
    """First and last frame (exclusive) of each letter on the best path through G (S, T).

    Each letter takes one or more neighboring frames, in order; frames between two letters may be silent. The score of a letter at a frame
    is the log of the frame's share of the letter's gradient; that of silence is log(1 / T), the share if all frames were equal.
    Raises `UserError` if there are fewer frames than letters.
    """
    letters, frames = scores.shape
    if frames < letters:
        raise UserError(f"{letters} letters cannot be aligned with {frames} frames")
    shares = scores.double().log_softmax(1)
    states = 2 * letters + 1  # silence, letter 1, silence, ..., letter S, silence
    emit = torch.full((frames, states), -float(torch.tensor(float(frames)).log()), dtype=torch.float64)
    emit[:, 1::2] = shares.T
    best = torch.full((states,), -torch.inf, dtype=torch.float64)
    best[:2] = emit[0, :2]
    skips = torch.zeros(states, dtype=torch.bool)
    skips[3::2] = True  # from letter to letter without silence
    came = torch.zeros(frames, states, dtype=torch.long)
    for t in range(1, frames):
        one = torch.cat((best.new_full((1,), -torch.inf), best[:-1]))
        two = torch.cat((best.new_full((2,), -torch.inf), best[:-2])).masked_fill(~skips, -torch.inf)
        best, came[t] = torch.stack((best, one, two)).max(0)
        best = best + emit[t]
    state = states - 1 if best[-1] > best[-2] else states - 2
    path = []
    for t in range(frames - 1, -1, -1):
        path.append(state)
        state -= int(came[t, state])
    return _spans(path[::-1], letters, lambda s: (s - 1) // 2 if s % 2 else None)


def _spans(path: Sequence[int], letters: int, letter_of: Any) -> list[tuple[int, int]]:
    spans = [(-1, -1)] * letters
    for t, state in enumerate(path):
        letter = letter_of(state)
        if letter is not None:
            spans[letter] = (spans[letter][0] if spans[letter][0] >= 0 else t, t + 1)
    return spans


@torch.no_grad()
def ctc_alignment(model: Recognizer, wav: Tensor, labels: Sequence[int]) -> list[tuple[int, int]]:
    """First and last frame (exclusive) of each letter by CTC forced alignment (torchaudio's `forced_align`): where it is emitted."""
    try:
        from torchaudio.functional import forced_align
    except ImportError as error:
        raise missing_extra("torchaudio", "data", "CTC forced alignment") from error
    log_probs = model.ctc_log_probs(model.encode(wav)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio 2.8 warns of its plans
        path = forced_align(log_probs, torch.tensor([list(labels)]), blank=BLANK)[0][0].tolist()
    spans: list[tuple[int, int]] = []
    before = BLANK
    for t, label in enumerate(path):
        if label != BLANK:
            spans = [*spans[:-1], (spans[-1][0], t + 1)] if label == before else [*spans, (t, t + 1)]
        before = label
    rate, frames = model.config.output_downsampling, model.hubert.num_frames(wav.size(1))
    return [(start * rate, min(end * rate, frames)) for start, end in spans]


def segments(model: Recognizer, labels: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[Segment], list[Segment]]:
    """Letters and words with their times; a word lasts from the first frame of its first letter to the last frame of its last letter."""
    letters: list[Segment] = []
    words: list[Segment] = []
    open_word = False
    for label, (start, end) in zip(labels, spans, strict=True):
        said, ended = model.alphabet.spoken(label)
        open_word = open_word and not ended
        if not said:
            continue
        letter = Segment(said, round(start * FRAME_SECONDS, 4), round(end * FRAME_SECONDS, 4))
        letters.append(letter)
        if open_word:
            words[-1] = Segment(words[-1].label + letter.label, words[-1].start, letter.end)
        else:
            words.append(letter)
            open_word = True
    return letters, words


# -- time reversal -------------------------------------------------------------------------------------------------------


def correlation(weights: Tensor) -> float:
    """Pearson's correlation between row numbers and the centers of the rows' weights (S, T) over time; 0 where it is undefined."""
    time = torch.arange(weights.size(1), dtype=torch.float64)
    centers = (weights.double() * time).sum(1) / weights.double().sum(1).clamp(min=1e-30)
    places = torch.arange(len(centers), dtype=torch.float64)
    places, centers = places - places.mean(), centers - centers.mean()
    size = places.norm() * centers.norm()
    return float((places * centers).sum() / size) if size > 0 else 0.0


@dataclass(frozen=True)
class Direction:
    """Which way time runs: correlations between the order of letters and the places of their gradients or of their cross-attention."""

    places: dict[str, float]  # "input", "0" ... "L"
    cross_attention: dict[str, float]  # decoder block -> correlation
    reversing: list[int]  # blocks that reverse time between input and output
    turned: bool | None  # whether the encoder as a whole reverses time; None: unclear

    def __str__(self) -> str:
        if self.turned is None:
            return f"unclear: no clear direction of time (|r| above {CLEAR}) at both ends of the encoder"
        if not self.reversing:
            return "no block reverses time"
        blocks = " and ".join(f"block {block}" for block in self.reversing)
        verb = "reverses" if len(self.reversing) == 1 else "reverse"
        return f"{blocks} {verb} time; the encoder's output is {'reversed' if self.turned else 'in order again'}"


def direction(found: dict[str, Tensor], cross: Sequence[Tensor] = ()) -> Direction:
    """Find where time is reversed. found: G of `gradients`; cross: attention weights of the decoder's blocks (S + 1, T), whose last row
    belongs to the end of the sentence and does not show the order of letters.

    A state with a clear correlation is compared with the last clear one before it; where the sign changes, the blocks between them have
    reversed time. Since letters are said in order, an encoder whose input and output disagree reverses time.
    """
    places = {name: correlation(scores.exp()) for name, scores in found.items()}
    reversing, sign = [], 0.0
    for name, value in places.items():
        if abs(value) < CLEAR:
            continue
        if sign and value * sign < 0:
            reversing.append(max(1, 0 if name == "input" else int(name)))
        sign = value
    ends = list(places.values())
    clear = abs(ends[0]) >= CLEAR and abs(ends[-1]) >= CLEAR
    crossed = {f"decoder block {i}": correlation(weights[:-1]) for i, weights in enumerate(cross, start=1)}
    return Direction(places, crossed, reversing, ends[0] * ends[-1] < 0 if clear else None)


@torch.no_grad()
def cross_attention(model: Recognizer, wav: Tensor, labels: Sequence[int]) -> list[Tensor]:
    """Attention weights of each decoder block, averaged over heads, for each letter and then the end of the sentence, (S + 1, T)."""
    weights: list[Tensor] = []
    encoded, _ = model.encode(wav)
    letters, _, _ = shifted(torch.tensor([list(labels)]), torch.tensor([len(labels)]), model.alphabet.end)
    model.head(letters, encoded, weights=weights)
    rate, frames = model.config.output_downsampling, model.hubert.num_frames(wav.size(1))
    return [block[0].mean(0)[: len(labels) + 1].repeat_interleave(rate, 1)[:, :frames] for block in weights]


# -- inside the blocks -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_norms(model: Recognizer, wav: Tensor) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Measure each block: mean L2 norms over frames of its input ("residual"), of its modules' outputs and of its own ("output"); and
    attention energies before the softmax, averaged over heads (T, T), where the attention declares them (`energies`)."""
    norms: dict[str, dict[str, float]] = {}
    energies: dict[str, Tensor] = {}
    handles = []

    def mean_norm(x: Tensor) -> float:
        return float(torch.linalg.vector_norm(x[0].float(), dim=-1).mean())

    for number, block in enumerate(model.hubert.encoder.layers, start=1):
        name = f"block {number}"
        row = norms[name] = {}

        def entering(_m: Any, inputs: tuple[Any, ...], row: dict[str, float] = row) -> None:
            row["residual"] = mean_norm(inputs[0])

        def leaving(_m: Any, _i: Any, output: Any, row: dict[str, float] = row) -> None:
            row["output"] = mean_norm(output)

        handles += [block.register_forward_pre_hook(entering), block.register_forward_hook(leaving)]
        for key, module in block.named_children():

            def inside(_m: Any, _i: Any, output: Any, row: dict[str, float] = row, key: str = key) -> None:
                if isinstance(output, Tensor) and output.dim() == 3 and key != "dropout":
                    row[key] = mean_norm(output)

            handles.append(module.register_forward_hook(inside))
            if hasattr(module, "energies"):

                def attending(module: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                    energies[name] = module.energies(*inputs)[0].mean(0)

                handles.append(module.register_forward_pre_hook(attending))
    try:
        model.encode(wav)
    finally:
        for handle in handles:
            handle.remove()
    return norms, energies
