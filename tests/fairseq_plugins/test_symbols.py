"""Fine-tuning on pieces of sentencepiece, with <unk>, on transcripts of bounded length, with SpecAugment."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from hubert_eff.errors import UserError
from hubert_eff.recognition import Recognizer, RecognizerConfig

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'hubert-eff[text]'")

from ..helpers.finetuning import TEXTS, make_data, make_task  # noqa: E402

PRESET = ("model.w2v_path=null", "model.preset=conformer-debug")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_data(tmp_path / "data", {"train": TEXTS, "valid": ["one ten"]})
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.upper() for text in TEXTS), model_writer=written, model_type="bpe", vocab_size=14, minloglevel=2
    )
    (folder / "bpe.model").write_bytes(written.getvalue())
    return folder


def test_pieces_are_the_symbols_and_are_saved(data: Path) -> None:
    task, cfg = make_task("debug_aed", f"task.data={data}", f"task.sentencepiece={data / 'bpe.model'}", *PRESET)
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    target = task.dataset("train")[0]["target"]
    assert len(target) < len("ONE TWO") and task.alphabet.text(target) == "ONE TWO"
    assert cfg.model.sentencepiece and " " in cfg.model.letters and "bpe.model" not in str(cfg.model)
    again = Recognizer(RecognizerConfig.from_dict({key: cfg.model[key] for key in vars(model.config)}))
    assert again.alphabet.spell("ONE TWO") == target
    (data / "train.bpe").write_text("\n".join(" ".join(task.alphabet.pieces.split(text.upper())) for text in TEXTS) + "\n")
    more, _ = make_task("debug_aed", f"task.data={data}", f"task.sentencepiece={data / 'bpe.model'}", "task.labels=bpe", *PRESET)
    more.build_model(cfg.model)
    more.load_dataset("train")
    assert more.dataset("train")[0]["target"] == target


def test_a_model_that_does_not_fit_its_dictionary_is_refused(data: Path) -> None:
    keys = (f"task.data={data}", f"task.sentencepiece={data / 'bpe.model'}")
    (data / "dict.ltr.txt").write_text("| 9\nO 5\nN 4\n")
    with pytest.raises(UserError, match="does not fit .*dict.ltr.txt: its '|' is not one of the model's"):
        make_task("debug", *keys)
    (data / "dict.ltr.txt").write_text("\u2581ONE 9\n\u2581TWO 5\n")
    with pytest.raises(UserError, match="dict.ltr.txt: the dictionary has symbols of several characters"):
        make_task("debug", keys[0])
    (data / "bpe.model").write_text("no model")
    with pytest.raises(UserError, match="bpe.model is not a sentencepiece model"):
        make_task("debug", *keys)


def test_unknown_characters_and_long_transcripts(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "dict.ltr.txt").write_text("| 9\nO 5\nN 4\nE 3\n")
    keys = (f"task.data={data}", *PRESET)
    task, cfg = make_task("debug", *keys, "task.unknown_symbol=true", "task.max_target_size=6")
    task.build_model(cfg.model)
    with caplog.at_level(logging.WARNING):
        task.load_dataset("train")
    assert "2 of 5 transcripts have more than task.max_target_size=6 symbols; the first is that of 'train0.wav' with 7" in caplog.text
    assert [task.alphabet.text(task.dataset("train")[i]["target"]) for i in range(3)] == ["<unk><unk>O", "NO ONE", "<unk>EN"]
    assert task.alphabet.letters == "| O N E <unk>" == cfg.model.letters
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 1  # seven symbols: the limit is for training
    task, cfg = make_task("debug", *keys)
    task.build_model(cfg.model)
    with pytest.raises(UserError, match="which is not in the dictionary of 4 letters"):
        task.load_dataset("train")
    task, cfg = make_task("debug", *keys, "task.unknown_symbol=true", "task.max_target_size=1")
    task.build_model(cfg.model)
    with pytest.raises(UserError, match="5 of 5 transcripts have more than .*: raise task.max_target_size"):
        task.load_dataset("train")
    with pytest.raises(UserError, match="task.max_target_size=0 must be at least 1"):
        make_task("debug", *keys, "task.max_target_size=0")


def test_without_ctc_a_transcript_may_be_longer_than_its_audio(data: Path) -> None:
    table = data / "parts.tsv"
    table.write_text(table.read_text().replace("valid0.wav\tone", "valid0.wav\t" + "one" * 40))
    keys = (f"task.data={data}", *PRESET)
    task, cfg = make_task("debug_aed", *keys, "model.ctc_weight=0")
    task.build_model(cfg.model)
    task.load_dataset("valid")
    task, cfg = make_task("debug_aed", *keys)
    task.build_model(cfg.model)
    with pytest.raises(UserError, match="letters need .* frames"):
        task.load_dataset("valid")


def test_specaugment_is_refused_without_a_spectrogram(data: Path) -> None:
    task, cfg = make_task("debug", f"task.data={data}", *PRESET, "model.specaug_time_masks=2")
    with pytest.raises(UserError, match="mask a log-mel spectrogram"):
        task.build_model(cfg.model)
