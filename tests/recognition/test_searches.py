"""Searches that go letter by letter, and frame by frame as audio comes: against brute force, and against what computes all at once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hubert_eff.errors import UserError
from hubert_eff.recognition import Recognizer, decode, transcribe
from hubert_eff.recognition.ctc import PrefixBeam, PrefixScores, prefix_beam
from hubert_eff.recognition.label_search import batches, label_search
from hubert_eff.recognition.lstm_decoder import LSTMDecoder
from hubert_eff.recognition.search import decoder_scores, searches_of
from hubert_eff.recognition.steps import steps_of

from ..helpers.recognizers import LETTERS, every_text_score, make

DECODERS = [("transformer", "layer_norm"), ("transformer", "batch_norm"), ("lstm", "layer_norm")]


def recognizer(decoder: str = "transformer", norm: str = "layer_norm") -> Recognizer:
    return make(decoder_layers=1 if decoder == "lstm" else 2, norm=norm, decoder=decoder).eval()


@pytest.mark.parametrize(("decoder", "norm"), DECODERS)
def test_letter_by_letter_is_all_at_once(decoder: str, norm: str) -> None:
    model = recognizer(decoder, norm)
    memory, padding = torch.randn(2, 9, 64), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    texts = torch.randint(1, 6, (2, 3, 5))  # three texts of each of two utterances
    texts[:, :, 0] = model.alphabet.end
    texts[:, 1:, 1] = texts[:, :1, 1]
    with torch.no_grad():
        steps = steps_of(model.head, memory, padding)
        steps.next(texts[:, :1, 0])
        steps.choose(torch.zeros(2, 3, dtype=torch.long))
        for place in range(1, 5):
            found = steps.next(texts[:, :, place])
            for text in range(3):
                expected = model.head(texts[:, text, : place + 1], memory, padding)[:, -1].log_softmax(-1)
                torch.testing.assert_close(found[:, text], expected, atol=1e-5, rtol=1e-4)
        steps.keep(torch.tensor([1]))
        steps.choose(torch.tensor([[2]]))
        more = torch.cat((texts[1:, 2], torch.tensor([[3]])), 1)
        expected = model.head(more, memory[1:, :6])[:, -1].log_softmax(-1)
        torch.testing.assert_close(steps.next(torch.tensor([[3]]))[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_prefix_scores_are_sums_over_all_texts_that_begin_so() -> None:
    log_probs = torch.randn(2, 5, 4).log_softmax(-1).double()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4:] = True
    every = [every_text_score(log_probs[0]), every_text_score(log_probs[1, :4])]

    def expected(utterance: int, *prefix: int) -> float:
        return float(np.logaddexp.reduce([s for text, s in every[utterance].items() if text[: len(prefix)] == prefix]))

    scores = PrefixScores(log_probs, padding, end=4)
    letters = torch.tensor([1, 2, 3, 4]).expand(2, 1, 4)
    first = scores.extend(letters)
    for utterance, letter in itertools.product(range(2), (1, 2, 3)):
        assert float(first[utterance, 0, letter - 1]) == pytest.approx(expected(utterance, letter))
    assert float(first[0, 0, 3]) == pytest.approx(every[0][()])  # the end: nothing was said
    scores.choose(torch.tensor([[0, 0], [0, 0]]), torch.tensor([[1, 0], [1, 2]]))
    second = scores.extend(letters.expand(2, 2, 4))
    for utterance, text, begun in ((0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 3)):
        for letter in (1, 2, 3):
            assert float(second[utterance, text, letter - 1]) == pytest.approx(expected(utterance, begun, letter))
        assert float(second[utterance, text, 3]) == pytest.approx(every[utterance][(begun,)])
    scores.choose(torch.tensor([[1], [0]]), torch.tensor([[0], [2]]))
    scores.keep(torch.tensor([1]))
    assert float(scores.extend(letters[:1])[0, 0, 1]) == pytest.approx(expected(1, 2, 3, 2))


@pytest.mark.parametrize(("decoder", "norm"), DECODERS)
def test_searches_by_letters_find_the_best_text_there_is(decoder: str, norm: str) -> None:
    model = recognizer(decoder, norm)
    with torch.no_grad():
        model.head.output.bias[model.alphabet.end] = -1.0  # texts of some length
        model.head.output.bias[0] = -9.0
        encoded = [torch.randn(3, 64), torch.randn(4, 64)]
        for weight, penalty in itertools.product((0.0, 0.4), (0.0, 0.6, 3.0)):
            found = label_search(model, encoded, beam=400, ctc_weight=weight, longest=3, length_penalty=penalty)
            for x, texts in zip(encoded, found, strict=True):
                every = [text for n in range(4) for text in itertools.product(range(1, 5), repeat=n) if n <= 3]
                scores = dict(zip(every, ((1 - weight) * s for s in decoder_scores(model, x[None], every)), strict=True))
                if weight:
                    by_ctc = every_text_score(model.ctc_log_probs(x[None])[0])
                    scores = {text: score + weight * by_ctc.get(text, -math.inf) for text, score in scores.items()}
                scores = {text: score / ((6 + len(text)) / 6) ** penalty for text, score in scores.items()}
                best = max(scores, key=scores.__getitem__)
                assert texts[0][0] == best and texts[0][1] == pytest.approx(scores[best], abs=1e-4)
                assert [score for _, score in texts] == sorted((score for _, score in texts), reverse=True)


def test_a_length_penalty_lengthens_texts() -> None:
    model = recognizer()
    encoded = [torch.randn(n, 64) for n in (8, 12)]
    with torch.no_grad():
        model.head.output.bias[0] = -9.0
    for search in ("attention", "joint"):
        lengths = [
            sum(len(texts[0].letters) for texts in decode(model, encoded, search, beam=4, length_penalty=penalty))
            for penalty in (0.0, 1.0, 4.0)
        ]  # fmt: skip
        assert lengths[0] <= lengths[1] <= lengths[2] and lengths[0] < lengths[2]


def test_a_batch_is_one_by_one_and_bounded() -> None:
    model = recognizer()
    encoded = [torch.randn(n, 64) for n in (7, 30, 12)]
    for search in ("attention", "joint"):
        together = decode(model, encoded, search, beam=3)
        for x, texts in zip(encoded, together, strict=True):
            (alone,) = decode(model, [x], search, beam=3)
            assert [h.letters for h in alone] == [h.letters for h in texts] and len(texts) == 3
            assert [h.score for h in alone] == pytest.approx([h.score for h in texts], abs=1e-4)
    assert list(batches([500, 1500, 1400, 10], beam=10)) == [[1], [2], [0, 3]]


def test_a_beam_goes_on_however_frames_are_cut_and_settles_what_cannot_change() -> None:
    log_probs = (3 * torch.randn(60, 5)).log_softmax(-1).double()
    whole = prefix_beam(log_probs, 8)
    search, settled = PrefixBeam(8), []
    for piece in log_probs.split([1, 7, 20, 2, 30]):
        search.feed(piece)
        settled += search.settle()
    assert search.settled == settled and settled
    assert [text for text, _ in search.best()] == [text for text, _ in whole]
    assert [score for _, score in search.best()] == pytest.approx([score for _, score in whole])
    assert (*settled, *search.open_letters()) == whole[0][0]
    flat = torch.full((200, 5), 0.2).log()  # nothing is ever sure: memory is bounded all the same
    flat[:, 1:] += 0.01 * torch.rand(200, 4)
    search = PrefixBeam(6, longest=10)
    for frame in flat.split(1):
        search.feed(frame)
        search.settle()
        assert len(search.open_letters()) <= 11


def test_a_model_can_do_what_it_has_learned() -> None:
    wav = torch.randn(1, 8000)
    both, ctc = recognizer(), make().eval()
    assert searches_of(both) == ["greedy", "beam", "rescore", "attention", "joint"] and searches_of(ctc) == ["greedy", "beam"]
    for search in ("attention", "joint", "rescore"):
        with pytest.raises(UserError, match="no attention decoder: search greedy or beam"):
            transcribe(ctc, wav, search)
    both.config.ctc_weight = 0.0
    assert searches_of(both) == ["attention"]
    with pytest.raises(UserError, match="unknown search 'best'"):
        transcribe(both, wav, "best")
    with pytest.raises(UserError, match="must be between 0 and 1 for --search joint"):
        transcribe(recognizer(), wav, "joint", ctc_weight=1.0)
    with pytest.raises(UserError, match=r"--length-penalty -1 must be 0 \(none\) or more"):
        transcribe(recognizer(), wav, "attention", length_penalty=-1.0)


def test_lstm_decoder_sees_no_padded_frame_and_learns() -> None:
    torch.manual_seed(0)
    decoder = LSTMDecoder(6, 16, 32, 0.0)
    letters, memory = torch.randint(0, 6, (2, 7)), torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    weights: list[torch.Tensor] = []
    full = decoder(letters, memory, padding, None, weights)
    torch.testing.assert_close(full[1, :3], decoder(letters[1:, :3], memory[1:, :5])[0], atol=1e-5, rtol=1e-5)
    assert weights[0].shape == (2, 1, 7, 9) and float(weights[0][1, :, :, 5:].abs().max()) == 0.0
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 1, 7))
    model = make(decoder_layers=1, decoder="lstm", dropout=0.0, attention_dropout=0.0, mask_prob=0.0)
    model.config.ctc_weight = model.final_dropout.p = model.config.label_smoothing = 0.0
    wav, target = torch.randn(1, 4000), torch.tensor([model.alphabet.spell("AB CA")])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(wav, target, torch.tensor([5])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert transcribe(model.eval(), wav, "attention")[0].text == "AB CA"


def test_keys_of_an_lstm_contradict_none() -> None:
    with pytest.raises(UserError, match="decoder_type=lstm is one layer: set decoder_layers=1, not 2"):
        make(decoder_layers=2, decoder="lstm")
    with pytest.raises(UserError, match="decoder_type=lstm has no norms"):
        make(decoder_layers=1, norm="batch_norm", decoder="lstm")
    assert LETTERS == make(decoder_layers=1, decoder="lstm").alphabet.letters
