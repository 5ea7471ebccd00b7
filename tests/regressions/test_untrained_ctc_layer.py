"""With ctc_weight=0 word error rates and texts came from a CTC layer that had learned nothing: they come from the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from hubert_eff import cli
from hubert_eff.analysis.alignment import ctc_alignment, gradients
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.recognition import load_recognizer, transcribe
from hubert_eff.recognition.label_search import label_search
from hubert_eff.recognition.model import Recognizer, RecognizerConfig
from hubert_eff.recognition.scoring import score

KEYS = dict(letters="|ENOTW", decoder_layers=1, decoder_ffn_embed_dim=32)


def recognizer(weight: float) -> Recognizer:
    config = RecognizerConfig(ctc_weight=weight, **KEYS)  # type: ignore[arg-type]
    config.describe(preset_config("conformer-debug"))
    return Recognizer(config).eval()


def test_nothing_is_told_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wav = recognizer(0.0), 0.1 * torch.randn(1, 16_000)
    output = model(wav, torch.tensor([[3, 2, 4]]), torch.tensor([3]))
    assert not {"log_probs", "loss_ctc", "lengths"} & set(output)
    assert float(output["loss"]) == pytest.approx(float(output["loss_attention"]))
    for search in ("greedy", "beam", "rescore", "joint"):
        with pytest.raises(UserError, match="trained with ctc_weight=0: its CTC layer has learned nothing"):
            transcribe(model, wav, search)
    with pytest.raises(UserError, match="ctc_weight=0"):
        ctc_alignment(model, wav, [3, 2])
    with pytest.raises(UserError, match="ctc_weight=0"):
        gradients(model, wav, [3, 2], "ctc")
    assert set(gradients(model, wav, [3, 2], "attention")) >= {"input", "0"}  # the decoder has learned
    soundfile.write(tmp_path / "a.wav", wav[0].numpy(), 16_000)
    cfg = {"model": {"_name": "hubert_eff_aed", **vars(model.config)}}
    torch.save({"model": model.state_dict(), "cfg": cfg}, tmp_path / "model.pt")
    assert not load_recognizer(tmp_path / "model.pt").learns_ctc
    assert cli.main(["transcribe", str(tmp_path / "model.pt"), str(tmp_path / "a.wav"), "--search", "greedy"]) == 2
    assert "ctc_weight=0" in capsys.readouterr().err
    assert cli.main(["transcribe", str(tmp_path / "model.pt"), str(tmp_path / "a.wav"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["search"] == "attention" and said["recordings"][0]["text"] == transcribe(model, wav, "attention")[0].text
    assert len(transcribe(recognizer(0.3), wav)) == 1


@pytest.mark.parametrize("decoder", ["transformer", "lstm"])
def test_validation_hears_the_decoder(decoder: str, tmp_path: Path) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    from fairseq_plugins.criterions.recognition import SPARE

    from ..helpers.finetuning import TEXTS, make_data, make_task

    data = make_data(tmp_path / "data", {"train": TEXTS, "valid": ["one ten", "two"]})
    keys = (f"task.data={data}", "model.w2v_path=null", "model.preset=conformer-debug", "model.ctc_weight=0", "model.decoder_layers=1")
    task, cfg = make_task("debug_aed", *keys, f"model.decoder_type={decoder}")
    assert cfg.checkpoint.best_checkpoint_metric == "wer"
    model = task.build_model(cfg.model).eval()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    criterion = task.build_criterion(cfg.criterion)
    loss, _, log = criterion(model, dataset.collater([dataset[0], dataset[1]]))
    assert "loss_ctc" not in log and "correct" in log and log["words"] == 3
    heard = []
    for i in range(2):
        encoded = model(dataset[i]["source"][None], torch.tensor([dataset[i]["target"]]), torch.tensor([len(dataset[i]["target"])])).encoded
        heard.append(model.alphabet.text(label_search(model, [encoded[0]], criterion.valid_beam, longest=2 * 7 + SPARE)[0][0][0]))
    assert log["word_errors"] == score(["ONE TEN", "TWO"], heard).words.count
    loss.backward()
    assert model.ctc_proj.weight.grad is None and all(
        weight.grad is not None for name, weight in model.decoder.named_parameters() if weight.requires_grad
    )
