"""Fine-tuning for recognition: alphabet, losses, decoders, searches, checkpoints without paths, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff import cli
from hubert_eff.errors import UserError
from hubert_eff.models.fuse import fuse
from hubert_eff.recognition import Alphabet, load_recognizer, normalize_text, transcribe
from hubert_eff.recognition.alphabet import frames_needed
from hubert_eff.recognition.decoder import AttentionDecoder, shifted
from hubert_eff.recognition.model import PRESETS, build_recognizer
from hubert_eff.recognition.search import decoder_scores, greedy, prefix_beam

from ..helpers.recognizers import LETTERS, every_text_score, make, save


def test_texts_become_numbers_and_back() -> None:
    assert normalize_text("The cat\u2019s 2nd  nap -- 'tis, O'Hara's.") == "THE CAT'S 2ND NAP 'TIS O'HARA'S"
    alphabet = Alphabet.of(["AB C", "CAB"])
    assert alphabet.letters == LETTERS and len(alphabet) == 5 and alphabet.end == 5
    numbers = alphabet.spell_any("cab, a")
    assert alphabet.text([0, *numbers, alphabet.end]) == "CAB A"
    assert Alphabet("|abc").spell_any("CAB") == [4, 2, 3]
    assert frames_needed(alphabet.spell("AABB")) == 6
    with pytest.raises(UserError, match="'D', which is not in the dictionary of 4 letters"):
        alphabet.spell("BAD")
    with pytest.raises(UserError, match="empty"):
        alphabet.spell_any("!")
    with pytest.raises(UserError, match="distinct"):
        Alphabet("AA")


def test_prefix_beam_search_finds_what_brute_force_finds() -> None:
    log_probs = torch.randn(5, 3).mul(2).log_softmax(-1).double()
    expected = every_text_score(log_probs)
    found = prefix_beam(log_probs, beam=60)
    assert {labels for labels, _ in found} == set(expected)
    for labels, score in found:
        assert score == pytest.approx(expected[labels], abs=1e-6)
    assert found[0][0] == max(expected, key=expected.__getitem__)
    assert prefix_beam(log_probs, beam=4)[0][1] <= found[0][1] + 1e-9


def test_greedy_removes_repetitions_and_blanks() -> None:
    log_probs = torch.eye(4)[[1, 1, 0, 1, 2, 2, 0, 3]]
    assert greedy(log_probs) == (1, 1, 2, 3)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_decoder_sees_no_later_letter_and_no_padded_frame(norm: str) -> None:
    decoder = AttentionDecoder(6, 16, 2, 32, 2, 0.0, norm).eval()
    letters, memory = torch.randint(0, 6, (2, 7)), torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    full = decoder(letters, memory, padding, valid)
    alone = decoder(letters[1:, :3], memory[1:, :5])
    torch.testing.assert_close(full[1, :3], alone[0], atol=1e-5, rtol=1e-5)
    weights: list[torch.Tensor] = []
    decoder(letters, memory, padding, valid, weights)
    assert len(weights) == 2 and weights[0].shape == (2, 2, 7, 9) and float(weights[0][1, :, :, 5:].abs().max()) == 0.0
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 2, 7))


def test_batch_norm_decoder_counts_valid_places_only_and_folds() -> None:
    decoder = AttentionDecoder(6, 16, 1, 32, 2, 0.0, "batch_norm")
    targets, lengths = torch.randint(1, 5, (2, 6)), torch.tensor([6, 3])
    letters, wanted, valid = shifted(targets, lengths, 5)
    assert letters[:, 0].tolist() == [5, 5] and wanted[1, 3] == 5 and valid.sum(1).tolist() == [7, 4]
    memory, padding = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    before = decoder(letters, memory, padding, valid)[valid]
    other = torch.where(padding[..., None], torch.full_like(memory, 9.0), memory)
    filled = letters.masked_fill(~valid, 2)
    torch.testing.assert_close(decoder(filled, other, padding, valid)[valid], before)
    decoder.eval()
    fused = fuse(decoder)
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in fused.modules())
    torch.testing.assert_close(fused(letters, memory), decoder(letters, memory), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "norm"), [(0, "layer_norm"), (1, "layer_norm"), (1, "batch_norm")])
def test_it_learns_a_batch_by_heart_and_says_it(layers: int, norm: str) -> None:
    model = make(decoder_layers=layers, norm=norm, dropout=0.0, attention_dropout=0.0, mask_prob=0.0)
    model.final_dropout.p = 0.0
    wav = torch.randn(2, 4000)
    padding = torch.zeros(2, 4000, dtype=torch.bool)
    padding[1, 3200:] = True
    texts = [model.alphabet.spell("AB CA"), model.alphabet.spell("CC")]
    targets = torch.tensor([texts[0], [*texts[1], 0, 0, 0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        output = model(wav, targets, torch.tensor([5, 2]), padding)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    assert float(output["loss_ctc"]) < 1.5
    model.eval()
    for search in ("greedy", "beam", *(["rescore"] if layers else [])):
        assert transcribe(model, wav[:1], search)[0].text == "AB CA"
        assert transcribe(model, wav[1:, :3200], search)[0].text == "CC"
    if layers:
        right, wrong = decoder_scores(model, model.encode(wav[:1])[0], [texts[0], model.alphabet.spell("BC")])
        assert right > wrong


def test_loss_is_the_weighted_sum_and_freezing_leaves_the_encoder_alone() -> None:
    model = make(decoder_layers=1)
    model.config.freeze_finetune_updates = 2
    targets, lengths = torch.tensor([[2, 3]]), torch.tensor([2])
    output = model(torch.randn(1, 8000), targets, lengths)
    model.config.label_smoothing = 0.0
    output["loss"].backward()
    weight = model.config.ctc_weight
    assert float(output["loss"]) == pytest.approx(float(weight * output["loss_ctc"] + (1 - weight) * output["loss_attention"]), rel=1e-5)
    assert all(p.grad is None for p in model.hubert.parameters()) and model.ctc_proj.weight.grad is not None
    model.set_num_updates(2)
    model(torch.randn(1, 8000), targets, lengths)["loss"].backward()
    assert model.hubert.post_extract_proj.weight.grad is not None


def test_fused_recognizer_says_the_same() -> None:
    model = make("fusionformer-debug", 1, "batch_norm").eval()
    wav = torch.randn(1, 8000)
    for a, b in zip(transcribe(model, wav, "rescore"), transcribe(fuse(model), wav, "rescore")):
        assert a.text == b.text and a.score == pytest.approx(b.score, rel=1e-3)


def test_presets_of_papers_have_their_sizes() -> None:
    sizes = [f"{size}+{decoders}" for size in (12, 16) for decoders in ("6", "3+3")]
    assert set(PRESETS) == {f"{encoder}-{size}" for encoder in ("fusionformer", "conformer") for size in sizes}
    with torch.device("meta"):
        model = build_recognizer("fusionformer-16+6", LETTERS)
    assert len(model.hubert.encoder.layers) == 16 and len(model.head.layers) == 6 and model.head.embedding.embedding_dim == 384
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in [*model.hubert.encoder.modules(), *model.head.modules()])
    with pytest.raises(UserError, match="unknown preset of a recognizer"):
        build_recognizer("conformer-13+6", LETTERS)


def test_a_checkpoint_needs_no_other_file(tmp_path: Path) -> None:
    model = make("fusionformer-debug", 1, "batch_norm").eval()
    path = save(model, tmp_path / "checkpoint.pt")
    again = load_recognizer(path)
    wav = torch.randn(1, 8000)
    assert transcribe(again, wav, "rescore") == transcribe(model, wav, "rescore")
    encoder = hubert_eff.load(path)
    torch.testing.assert_close(encoder.hidden_states(wav)[0][-1], model.encode(wav)[0])
    pretrained = tmp_path / "pretrained.safetensors"
    hubert_eff.export(hubert_eff.build("conformer-debug"), pretrained)
    with pytest.raises(UserError, match="has no CTC layer: it is a pre-trained model"):
        load_recognizer(pretrained)
    for key, value in (("encoder_config", "{"), ("letters", None), ("decoder_layers", "two")):
        content = torch.load(path)
        content["cfg"]["model"][key] = value
        torch.save(content, tmp_path / "broken.pt")
        with pytest.raises(UserError, match="broken.pt: its configuration describes no recognizer"):
            load_recognizer(tmp_path / "broken.pt")


def test_transcribe_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(make(), tmp_path / "checkpoint.pt")
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    samples = np.zeros(8000, np.float32)
    samples[7] = np.nan
    soundfile.write(bad, samples, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", np.full(300, 0.1), 16000)
    assert cli.main(["transcribe", str(path), str(good), "--search", "beam", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["recordings"]
    assert entry["audio"] == str(good) and entry["text"] == entry["hypotheses"][0]["text"]
    for arguments, message in (
        ([path, bad], "bad.wav cannot be used: NaN or infinite samples"),
        ([path, tmp_path / "none.wav"], "no recording at"),
        ([path, tmp_path / "short.wav"], "short.wav: 300 samples are too few"),
        ([path, good, "--search", "rescore"], "but no attention decoder"),
        ([path, good, "--search", "beam", "--beam", "0"], "--beam: 0 must be at least 1"),
        ([path, good, "--chunk-size", "16"], "streaming"),
    ):
        assert cli.main(["transcribe", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_streaming_model_is_heard_in_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(decoder_layers=1, streaming=True, chunk_sizes="16,0", left_chunks="4,-1").eval()
    wav = torch.randn(1, 16_000)
    whole, pieces = (model.encode(wav, **chunks)[0] for chunks in ({}, {"chunk_size": 16, "left_chunks": 1}))
    assert whole.shape == pieces.shape and not torch.allclose(whole, pieces, atol=1e-3)
    later = torch.cat((wav[:, :12_000], torch.randn(1, 4_000)), 1)  # from frame 37 on
    torch.testing.assert_close(model.encode(later, chunk_size=16, left_chunks=1)[0][:, :32], pieces[:, :32], atol=1e-5, rtol=1e-4)
    texts = transcribe(model, wav, "rescore", chunk_size=16, left_chunks=1)
    assert [h.score for h in texts] == sorted((h.score for h in texts), reverse=True)
    path, audio = save(model, tmp_path / "checkpoint.pt"), tmp_path / "a.wav"
    soundfile.write(audio, wav[0].numpy() / 5, 16_000)
    assert cli.main(["transcribe", str(path), str(audio), "--chunk-size", "16", "--left-chunks", "4"]) == 0
    assert capsys.readouterr().out.startswith(str(audio))
