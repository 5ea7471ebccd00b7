"""Symbols of several characters by sentencepiece, <unk>, and SpecAugment of log-mel fronts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.recognition import Alphabet, Recognizer, RecognizerConfig, load_recognizer, transcribe
from hubert_eff.recognition.pieces import Pieces

from ..helpers.recognizers import save

TEXTS = ["ONE TWO THREE", "FOUR FIVE SIX", "SEVEN EIGHT NINE ZERO", "ONE NINE"]


def bpe(path: Path, **keys: object) -> Path:
    """A sentencepiece model of `TEXTS`."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'hubert-eff[text]'")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=written, model_type="bpe", character_coverage=1.0, minloglevel=2,
        **{"vocab_size": 34, **keys},
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return path


def test_unknown_characters_have_a_symbol_if_it_is_wanted() -> None:
    alphabet = Alphabet.of(["AB"], unknown=True)
    assert alphabet.symbols == ("|", "A", "B", "<unk>") and alphabet.letters == "| A B <unk>" and len(alphabet) == 5
    numbers = alphabet.spell("AXB")
    assert numbers == [2, 4, 3] and alphabet.text(numbers) == "A<unk>B"
    again = Alphabet(alphabet.letters)
    assert again.symbols == alphabet.symbols and again.spell_any("b?q") == [3, 1, 4]
    with pytest.raises(UserError, match="'X', which is not in the dictionary of 2 letters"):
        Alphabet("AB").spell("AXB")


def test_pieces_spell_and_say(tmp_path: Path) -> None:
    pieces = Pieces.read(bpe(tmp_path / "bpe.model"))
    alphabet = Alphabet(pieces.symbols, pieces)
    assert any(len(symbol) > 2 for symbol in alphabet.symbols) and "<unk>" not in alphabet.symbols and "<s>" not in alphabet.symbols
    numbers = alphabet.spell_any("nine, one!")
    assert alphabet.text([0, *numbers, alphabet.end]) == "NINE ONE" and len(numbers) < len("NINE ONE")
    words = "".join((" " if ended else "") + said for said, ended in map(alphabet.spoken, numbers)).split()
    assert words == ["NINE", "ONE"]
    again = Alphabet(alphabet.letters, Pieces(pieces.packed))  # as a checkpoint keeps them
    assert again.symbols == alphabet.symbols and again.spell("NINE ONE") == numbers
    with pytest.raises(UserError, match="'Q', which is not in the dictionary of"):
        alphabet.spell("NQ")
    wide = Alphabet([*pieces.symbols, "<unk>"], pieces)
    assert wide.unknown in wide.spell("NQ")
    with pytest.raises(UserError, match="symbols of several characters"):
        Alphabet(alphabet.letters)


def test_a_checkpoint_keeps_its_pieces(tmp_path: Path) -> None:
    pieces = Pieces.read(bpe(tmp_path / "bpe.model"))
    config = RecognizerConfig(letters=Alphabet(pieces.symbols, pieces).letters, sentencepiece=pieces.packed)
    config.describe(preset_config("conformer-debug"))
    model = Recognizer(config).eval()
    (tmp_path / "bpe.model").unlink()
    again = load_recognizer(save(model, tmp_path / "model.pt"))
    assert again.alphabet.spell("ONE SIX") == model.alphabet.spell("ONE SIX")
    wav = torch.randn(1, 8000)
    assert transcribe(again, wav, "beam") == transcribe(model, wav, "beam")


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_what_is_no_sentencepiece_model_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "bpe.model"
    if content is None:
        bpe(file, byte_fallback=True, vocab_size=300)
    else:
        pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'hubert-eff[text]'")
        file.write_bytes(content)
    with pytest.raises(
        UserError, match="spells unknown characters by bytes" if content is None else "bpe.model is not a sentencepiece model"
    ):
        Pieces.read(file)
    with pytest.raises(UserError, match="no sentencepiece model at"):
        Pieces.read(tmp_path / "none.model")


def test_specaugment_masks_the_spectrogram_by_seed_update_and_utterance() -> None:
    config = RecognizerConfig(letters="|AB", specaug_freq_masks=2, specaug_time_masks=2, specaug_time_share=0.2)
    config.describe(preset_config("conformer-debug", conv_feature_layers="logmel-dws", mask_prob=0.0, mask_channel_prob=0.0))
    model = Recognizer(config)
    wav, padding = torch.randn(2, 16_000), torch.zeros(2, 16_000, dtype=torch.bool)
    padding[1, 9_000:] = True
    ids = torch.tensor([5, 6])
    masked = model._specaugment(wav, padding, ids)
    assert masked.shape == (2, model.hubert.feature_extractor.mel_frames(16_000), 80)
    bands, spans = masked.all(1).sum(1), masked.all(2).sum(1)
    assert bool((bands <= 2 * 27).all()) and bool((spans <= 2 * 20).all()) and bool(masked.any())
    assert torch.equal(masked, model._specaugment(wav, padding, ids))
    assert torch.equal(masked[1, :, 0], model._specaugment(wav.flip(0), padding.flip(0), ids.flip(0))[0, :, 0])
    model.set_num_updates(1)
    assert not torch.equal(masked, model._specaugment(wav, padding, ids))
    mel = model.hubert.feature_extractor.mel
    found = []
    mel.register_forward_hook(lambda _m, _i, output: found.append(output))
    hidden = model.hubert.feature_extractor(wav, torch.ones_like(masked))
    assert float((hidden - hidden[:, :1]).abs().max()) < 1e-5 and float(found[0].std()) > 0  # nothing is heard of the audio
    targets, lengths = torch.tensor([[2, 3], [3, 0]]), torch.tensor([2, 1])
    model.final_dropout.p = 0.0
    heard = model(wav, targets, lengths, padding, ids).loss
    model.config.specaug_freq_masks = model.config.specaug_time_masks = 0
    assert float(heard) != float(model(wav, targets, lengths, padding, ids).loss)
    for front in ("default", "fastconv"):
        config = RecognizerConfig(letters="|AB", specaug_freq_masks=1)
        config.describe(preset_config("conformer-debug", conv_feature_layers=front))
        with pytest.raises(UserError, match="mask a log-mel spectrogram, and this model's front is"):
            Recognizer(config)
