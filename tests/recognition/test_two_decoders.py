"""What heads of a recognizer read, and a second decoder that says texts from their end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubert_eff.analysis.alignment import ctc_alignment
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.recognition import Recognizer, RecognizerConfig, load_recognizer, transcribe
from hubert_eff.recognition.decoder import backwards
from hubert_eff.recognition.search import decoder_scores

from ..helpers.recognizers import LETTERS, make, save


def two_ways(preset: str = "conformer-debug", norm: str = "layer_norm", **keys: object) -> Recognizer:
    """A recognizer with a decoder in either direction."""
    config = RecognizerConfig(letters=LETTERS, decoder_layers=1, decoder_right_layers=1, decoder_norm=norm, decoder_ffn_embed_dim=32,
                              decoder_attention_heads=2, **keys)  # fmt: skip
    config.describe(preset_config(preset))
    return Recognizer(config)


def test_the_second_decoder_says_texts_from_their_end() -> None:
    torch.manual_seed(0)
    model = two_ways(decoder_reverse_weight=0.25, ctc_weight=0.5, label_smoothing=0.0, apply_mask=False).eval()
    wav = torch.randn(2, 8000)
    targets, lengths = torch.tensor([[2, 3, 3, 4], [4, 2, 0, 0]]), torch.tensor([4, 2])
    assert backwards(targets, lengths).tolist() == [[4, 3, 3, 2], [2, 4, 4, 4]]
    with torch.no_grad():
        whole = model(wav, targets, lengths)
        encoded, _ = model.encode(wav)
        right = 0.0
        for row, text in ((0, [4, 3, 3, 2]), (1, [2, 4])):
            letters = torch.tensor([[model.alphabet.end, *text]])
            log_probs = model.head.right(letters, encoded[row : row + 1]).log_softmax(-1)[0]
            right -= float(log_probs[range(len(text) + 1), [*text, model.alphabet.end]].sum())
        model.config.decoder_reverse_weight = 0.0
        left = model(wav, targets, lengths)
    assert float(whole.loss_attention) == pytest.approx(0.75 * float(left.loss_attention) + 0.25 * right, rel=1e-4)
    assert float(whole.loss) == pytest.approx(0.5 * float(whole.loss_ctc) + 0.5 * float(whole.loss_attention), rel=1e-5)
    scores = {}
    for weight in (0.0, 0.3, 1.0):
        model.config.decoder_reverse_weight = weight
        scores[weight] = decoder_scores(model, encoded[:1], [[2, 3], [4]])
    for first, mixed, second in zip(scores[0.0], scores[0.3], scores[1.0]):
        assert mixed == pytest.approx(0.7 * first + 0.3 * second, rel=1e-5) and abs(first - second) > 1e-3


def test_both_decoders_learn_and_their_weights_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = two_ways("fusionformer-debug", "batch_norm", output_downsampling=2)
    wav, padding = torch.randn(2, 8000), torch.zeros(2, 8000, dtype=torch.bool)
    padding[1, 6000:] = True
    model(wav, torch.tensor([[2, 3], [4, 0]]), torch.tensor([2, 1]), padding).loss.backward()
    unused = ("hubert.final_proj", "hubert.mask_emb")
    assert [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(unused)] == []
    again = load_recognizer(save(model, tmp_path / "checkpoint.pt"))
    model.eval()
    assert transcribe(again, wav[:1], "rescore") == transcribe(model, wav[:1], "rescore")
    with pytest.raises(UserError, match="decoder_right_layers=2 needs a first decoder"):
        RecognizerConfig(letters=LETTERS, decoder_right_layers=2)


@pytest.mark.parametrize("rate", [2, 3])
def test_heads_may_read_fewer_frames_than_there_are_states(rate: int) -> None:
    torch.manual_seed(0)
    keys = {"encoder_config": make(streaming=True).config.encoder_config, "encoder": "conformer", "letters": LETTERS}
    model, plain = (Recognizer(RecognizerConfig(**keys, output_downsampling=r)).eval() for r in (rate, 1))
    assert model.state_dict().keys() - plain.state_dict().keys() == {"downsample.log_shares"}
    wav, padding = torch.randn(2, 8000), torch.zeros(2, 8000, dtype=torch.bool)
    padding[1, 6400:] = True
    with torch.no_grad():
        states, frames = model.hubert.hidden_states(wav, padding)
        encoded, left = model.encode(wav, padding)
        alone, _ = model.encode(wav[1:, :6400])
    assert states[-1].size(1) == 24 and encoded.size(1) == left.size(1) == -(-24 // rate) == model.num_frames(8000)
    torch.testing.assert_close(encoded[0, 1], states[-1][0, rate : 2 * rate].mean(0))  # all shares are alike at first
    valid = int((~left[1]).sum())
    assert valid == model.num_frames(6400) == alone.size(1)
    torch.testing.assert_close(encoded[1, :valid], alone[0], atol=1e-5, rtol=1e-4)
    text = [2, 3] * 5
    model.check_length(text, 8000 if rate == 2 else 12_000, "a text")
    with pytest.raises(UserError, match="10 letters need 10 frames, one each"):
        model.check_length(text, 5000, "a text")
    with pytest.raises(
        UserError, match=f"chunk_size=4 must be a multiple of output_downsampling={rate}" if rate == 3 else "chunk_size=5 must"
    ):
        model.encode(wav, chunk_size=4 if rate == 3 else 5)
    spans = ctc_alignment(model, wav[:1], [2, 3, 4])
    assert all(start % rate == 0 and start < end <= 24 for start, end in spans)
