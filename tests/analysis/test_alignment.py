"""Gradient alignment, time reversal, identity attention."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import hubert_eff
from hubert_eff import cli
from hubert_eff.analysis.alignment import (
    block_norms,
    correlation,
    cross_attention,
    ctc_alignment,
    direction,
    gradients,
    prefix_scores,
    segments,
    viterbi,
)
from hubert_eff.errors import UserError
from hubert_eff.layers.attention import RelativeSelfAttention, SelfAttention, attention
from hubert_eff.layers.position import relative_sinusoids
from hubert_eff.recognition import load_recognizer

from ..helpers.recognizers import every_text_score, make, save


def test_prefix_scores_are_those_of_brute_force() -> None:
    log_probs = torch.randn(5, 4).log_softmax(-1).double()
    every = every_text_score(log_probs)
    for labels in ([1, 2, 3], [2, 2, 1], [3]):
        expected = []
        for n in range(len(labels) + 1):
            total = -math.inf
            for text, score in every.items():
                if list(text[:n]) == labels[:n]:
                    total = np.logaddexp(total, score)
            expected.append(total)
        torch.testing.assert_close(prefix_scores(log_probs, labels), torch.diff(torch.tensor(expected, dtype=torch.float64)))


def test_prefix_scores_have_finite_gradients() -> None:
    log_probs = torch.randn(6, 4).requires_grad_()
    prefix_scores(log_probs.log_softmax(-1), [2, 2, 1]).sum().backward()
    assert bool(torch.isfinite(log_probs.grad).all())


def test_viterbi_finds_the_best_path() -> None:
    scores = torch.randn(3, 6) * 2
    shares, silence = scores.double().log_softmax(1), -math.log(6)
    best, wanted = -math.inf, None
    cuts = itertools.combinations(range(7), 2)
    spans = [(a, b) for a, b in cuts]
    for triple in itertools.product(spans, repeat=3):
        if triple[0][1] <= triple[1][0] and triple[1][1] <= triple[2][0]:
            said = sum(float(shares[s, a:b].sum()) for s, (a, b) in enumerate(triple))
            total = said + silence * (6 - sum(b - a for a, b in triple))
            if total > best:
                best, wanted = total, list(triple)
    assert viterbi(scores) == wanted
    with pytest.raises(UserError, match="3 letters cannot be aligned with 2 frames"):
        viterbi(scores[:, :2])


class Flipped(nn.Module):
    """A block that turns its input round in time."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, frames: Any) -> torch.Tensor:
        return self.block(x.flip(1), frames)


@pytest.mark.parametrize("head", ["ctc", "attention"])
@pytest.mark.parametrize("flipped", [None, 2, 3])
def test_a_flipped_encoder_is_detected_and_a_normal_one_is_not(flipped: int | None, head: str) -> None:
    model = make(decoder_layers=1, encoder_layers=4, pos_enc_type="abs").eval()
    for block in model.hubert.encoder.layers:
        block.self_attn.out_proj.weight.data.zero_()  # so that what a frame sees stays near it
    if flipped:
        model.hubert.encoder.layers[flipped - 1] = Flipped(model.hubert.encoder.layers[flipped - 1])
    wav = torch.randn(1, 10_000)
    labels = model.alphabet.spell("AB CA BC")
    if head == "attention":
        follow_the_diagonal(model, len(labels), flipped is not None)
    found = direction(gradients(model, wav, labels, head), cross_attention(model, wav, labels) if head == "attention" else ())
    assert found.reversing == ([flipped] if flipped else []) and found.turned is bool(flipped), found
    assert len(found.places) == 6 and all(abs(value) > 0.5 for value in found.places.values())
    if head == "attention":
        (crossed,) = found.cross_attention.values()
        assert (crossed < -0.5) == bool(flipped)
    assert ("block" in str(found)) and ((f"block {flipped} reverses time" in str(found)) == bool(flipped))


@pytest.mark.parametrize("encoder", ["squeezeformer", "zipformer"])
@pytest.mark.parametrize("samples", [3_000, 10_000])
def test_gradients_of_blocks_at_lower_rates_stand_where_their_frames_are(encoder: str, samples: int) -> None:
    """A frame of a block at rate r has the same gradient in r neighboring frames of 20 ms, also in audio of few frames."""
    model = make(f"{encoder}-debug").eval()
    found = gradients(model, torch.randn(1, samples), model.alphabet.spell("A"))
    rates = model.hubert.encoder.block_rates
    assert max(rates) > 1
    for block, rate in enumerate(rates, start=1):
        row = found[str(block)][0]
        for start in range(0, len(row), rate):
            assert bool((row[start : start + rate] == row[start]).all())
        assert len(row[::rate].unique()) > len(row[::rate]) / 2  # and others in others


def follow_the_diagonal(model: Any, letters: int, backwards: bool) -> None:
    """Make the decoder attend to the frames one after the other, as a trained one does: from the end, if its encoder is turned."""
    cross = model.head.layers[0].cross_attn

    def weights(x: torch.Tensor, memory: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
        step = torch.arange(x.size(1))[:, None] / max(letters - 1, 1)
        place = torch.arange(memory.size(1)) / (memory.size(1) - 1)
        place = 1 - place if backwards else place
        return (-200 * (step - place) ** 2).softmax(-1).expand(1, 2, -1, -1)

    def forward(x: torch.Tensor, memory: torch.Tensor, attend: torch.Tensor, *_: Any) -> torch.Tensor:
        mixed = weights(x, memory, attend) @ cross.split(cross.v_proj(memory, None))
        return cross.out_proj(mixed.transpose(1, 2).flatten(2), None)

    cross.weights, cross.forward = weights, forward


def test_direction_is_not_guessed() -> None:
    noise = {name: torch.zeros(5, 50) for name in ("input", "0", "1")}
    assert direction(noise).turned is None and "unclear: no clear direction" in str(direction(noise))
    diagonal = torch.full((5, 50), -30.0)
    diagonal[torch.arange(5), torch.arange(5) * 10] = 0.0
    assert correlation(diagonal.exp()) == pytest.approx(1.0)
    twice = direction({"input": diagonal, "0": diagonal, "1": diagonal.flip(1), "2": diagonal})
    assert twice.reversing == [1, 2] and twice.turned is False


@pytest.mark.parametrize("preset", [p for p in hubert_eff.list_presets() if p.endswith("-debug")])
def test_gradients_of_every_encoder_have_all_places(preset: str) -> None:
    model = make(preset).eval()
    model.hubert.config.feature_grad_mult = 0.0
    found = gradients(model, torch.randn(1, 8_000), model.alphabet.spell("A B"))
    assert list(found) == ["input", *map(str, range(len(model.hubert.encoder.layers) + 1))]
    assert all(scores.shape == (3, 24) and bool(torch.isfinite(scores).all()) for scores in found.values())
    assert float(found["input"].max()) > -60  # not the floor
    norms, _ = block_norms(model, torch.randn(1, 8_000))
    assert all({"residual", "output"} <= set(row) and len(row) > 2 for row in norms.values())


@pytest.mark.parametrize("kind", [SelfAttention, RelativeSelfAttention])
def test_energies_are_what_the_softmax_is_taken_of(kind: type) -> None:
    module = kind(16, 2).eval()
    x = torch.randn(1, 9, 16)
    positions = (relative_sinusoids(9, 16, x),) if kind is RelativeSelfAttention else ()
    v = module.heads_of(x)[2]
    mixed = module.energies(x, *positions).softmax(-1) @ v
    torch.testing.assert_close(module.out_proj(mixed.transpose(1, 2).flatten(2)), module(x, *positions), atol=1e-5, rtol=1e-4)


# -- identity attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [p for p in hubert_eff.list_presets() if p.endswith("-debug") and not p.startswith("zipformer")])
def test_identity_attention_is_the_product_of_two_matrices_for_n_updates(preset: str) -> None:
    model = hubert_eff.build(preset, identity_attention_updates=2, attention_dropout=0.0, dropout=0.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in model.encoder.modules():
        if type(module).__name__ in ("SelfAttention", "RelativeSelfAttention", "SparseSelfAttention", "Attention"):
            module.register_forward_hook(lambda m, inputs, output: seen.append((identity_of(m, *inputs), output)))
    x = torch.randn(2, 13, 64)
    padding = torch.zeros(2, 13, dtype=torch.bool)
    padding[1, 9:] = True
    model.set_num_updates(1)
    out = model.encoder(x, padding)
    assert seen and all(torch.allclose(a, b, atol=1e-5) for a, b in seen)
    out.square().sum().backward()
    query = next(p for name, p in model.encoder.named_parameters() if name.endswith(("q_proj.weight", "qkv_proj.weight")))
    size = query.grad.abs()  # in the graph, without a say
    assert float(size[:64].max()) < 1e-5 * float(size.max()) + 1e-6
    for update, mode in ((2, True), (1, False)):
        seen.clear()
        model.set_num_updates(update)
        model.train(mode).encoder(x, padding)
        assert not all(torch.allclose(a, b, atol=1e-5) for a, b in seen)
    model.train()


def identity_of(module: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """W_o W_v x."""
    if hasattr(module, "qkv_norm"):
        was = module.qkv_norm.momentum, module.out_norm.momentum
        module.qkv_norm.momentum = module.out_norm.momentum = 0.0
        value = module.heads_of(x, rest[0].valid)[2].transpose(1, 2).flatten(2)
        result = module.out_norm(module.out_proj(value), rest[0].valid)
        module.qkv_norm.momentum, module.out_norm.momentum = was
        return result
    return module.out_proj(module.v_proj(x))


def test_identity_attention_of_zipformer_mixes_no_frames() -> None:
    model = hubert_eff.build("zipformer-debug", identity_attention_updates=1)
    found: list[Any] = []
    for module in model.encoder.modules():
        if type(module).__name__ == "AttentionWeights":
            module.register_forward_hook(lambda _m, _i, output: found.append(output))
    model.encoder(torch.randn(1, 16, 64))
    assert found
    for weights in (part for output in found for part in output.parts):
        away = weights * (1 - torch.eye(weights.size(-1)))
        assert float(away.abs().max()) == 0.0


def test_identity_attention_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match="identity_attention_updates=5 must be 0 for a binarized model"):
        hubert_eff.build("conformer-debug+w1a1", identity_attention_updates=5)
    assert attention(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), None, 0.0).shape == (1, 1, 3, 4)


# -- the command -------------------------------------------------------------------------------------------------------------


def test_align_command_writes_what_tools_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(make(decoder_layers=1), tmp_path / "checkpoint.pt")
    audio = tmp_path / "a.wav"
    soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    out = tmp_path / "out"
    assert cli.main(["align", str(checkpoint), str(audio), "Ab, c\u2014a.", "--check-flip", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [w["label"] for w in result["words"]] == ["AB", "C", "A"] and [x["label"] for x in result["letters"]] == list("ABCA")
    assert all(0 <= x["start"] < x["end"] <= 0.98 + 1e-9 for x in result["letters"])
    assert set(result["time"]["places"]) == {"input", "0", "1", "2"} and "decoder block 1" in result["time"]["cross_attention"]
    rows = [line.split() for line in (out / "a.ctm").read_text().splitlines()]
    assert [row[4] for row in rows] == ["AB", "C", "A"] and all(float(row[3]) > 0 for row in rows)
    grid = (out / "a.TextGrid").read_text()
    assert grid.startswith('File type = "ooTextFile"') and grid.count('class = "IntervalTier"') == 2
    times = [float(line.split("=")[1]) for line in grid.splitlines() if line.startswith("            xmax")]
    assert times.count(1.0) == 2  # both tiers end where the audio does
    assert (out / "a.png").stat().st_size > 10_000 and (out / "a-blocks.png").stat().st_size > 10_000
    assert (out / "a-attention.png").stat().st_size > 10_000
    model = load_recognizer(checkpoint)
    (weights,) = cross_attention(model, torch.randn(1, 16_000), model.alphabet.spell("ABC"))
    assert weights.size(0) == 3 + 1 and torch.allclose(weights.sum(1), torch.ones(4))  # the end of the sentence has a row
    assert cli.main(["align", str(checkpoint), str(audio), "ab", "--method", "ctc", "--json"]) == 0
    assert [w["label"] for w in json.loads(capsys.readouterr().out)["words"]] == ["AB"]


def test_ctc_alignment_and_segments() -> None:
    model = make().eval()
    labels = model.alphabet.spell("AA B")
    spans = ctc_alignment(model, torch.randn(1, 8_000), labels)
    assert len(spans) == 4 and all(a < b for a, b in spans) and all(x[1] <= y[0] for x, y in itertools.pairwise(spans))
    letters, words = segments(model, labels, [(1, 2), (3, 4), (4, 6), (7, 9)])
    assert [(w.label, w.start, w.end) for w in words] == [("AA", 0.02, 0.08), ("B", 0.14, 0.18)]
    assert [x.label for x in letters] == ["A", "A", "B"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("AB" * 40, [], "a.wav: 80 letters need 80 frames, one each"),
        ("ZAB", [], "the text has 'Z', which is not in the dictionary of 4 letters: |ABC"),
        ("...", [], "the text is empty"),
        ("AB", ["--layer", "7"], "unknown value of --layer '7'"),
        ("AB", ["--head", "attention"], "but no attention decoder"),
        ("AB", ["--method", "ctc", "--check-flip"], "--method ctc uses no gradients"),
    ],
)
def test_bad_input_is_one_line(text: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(make(), tmp_path / "checkpoint.pt")
    audio = tmp_path / "a.wav"
    soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    assert cli.main(["align", str(checkpoint), str(audio), text, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
