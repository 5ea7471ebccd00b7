"""Exports without a fine-tuned model's heads, or that could not be read back, were written without a word; bytes differed each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hubert_eff
from hubert_eff.checkpoints.load import average
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.recognition import load_recognizer

from ..helpers.recognizers import make, save

PRUNED = "its configuration has 2 blocks, its weights have 1"


def small(**keys: object) -> HubertModel:
    return hubert_eff.build("transformer-debug", **keys).eval()


def pruned(model: HubertModel) -> HubertModel:
    model.encoder.layers = model.encoder.layers[:1]
    return model


def with_more(model: HubertModel) -> HubertModel:
    model.encoder.layers[0].adapter = nn.Linear(2, 2)
    return model


def widened(model: HubertModel) -> HubertModel:
    model.post_extract_proj = nn.Linear(32, 80)
    return model


def reparametrized(model: HubertModel) -> HubertModel:
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].fc1)
    return model


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def doubled(model: HubertModel) -> HubertModel:
    model.post_extract_proj.__class__ = Doubled
    return model


@pytest.mark.parametrize(
    "change, reason",
    [
        (doubled, "Doubled, where the configuration has hubert_eff.layers.linear.Linear"),
        (pruned, PRUNED),
        (with_more, "has superfluous tensors, encoder.layers.0.adapter.bias and 1 others"),
        (widened, "post_extract_proj.weight is "),
        (reparametrized, "lacks encoder.layers.0.fc1.weight"),
    ],
)
def test_what_could_not_be_read_back(change: Callable[[HubertModel], HubertModel], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be read back") as raised:
        hubert_eff.export(change(small()), tmp_path / "model.safetensors")
    assert reason in str(raised.value) and "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_is_left_is_what_is_read(tmp_path: Path) -> None:
    """Every form that is written gives the same states."""
    wav, path = torch.randn(1, 4_000), tmp_path / "model.safetensors"
    untied = hubert_eff.build("transformer-debug", (5, 7), untie_final_proj=True).eval()
    for model in (small(), hubert_eff.fuse(small()), untied):
        hubert_eff.export(model, path)
        again = hubert_eff.load(path).hidden_states(wav)[0]
        assert all(torch.equal(a, b) for a, b in zip(again, model.hidden_states(wav)[0], strict=True))


@pytest.mark.parametrize("keys, heads", [({}, "CTC layer: "), ({"decoder_layers": 1}, "CTC layer and attention decoder: ")])
def test_a_fine_tuned_model(keys: dict[str, int], heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = make(**keys), tmp_path / "out" / "model.safetensors"
    checkpoint = save(model, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="cannot export a Recognizer: .* `hubert` of a recognizer"):
        hubert_eff.export(model, path)  # type: ignore[arg-type]
    for encoder in (hubert_eff.load(checkpoint), hubert_eff.fuse(model.hubert), average([checkpoint, checkpoint])):
        with pytest.raises(UserError, match=f"no place for its {heads}keep the checkpoint for .*--encoder-only"):
            hubert_eff.export(encoder, path)
    (tmp_path / "run").mkdir()
    save(model, tmp_path / "run" / "checkpoint_1_3.pt")
    assert main(["export", str(tmp_path / "run"), "--average", "1", "--onnx", str(path.with_suffix(".onnx"))]) == 2
    assert f"no place for its {heads}" in capsys.readouterr().err and not list(path.parent.iterdir())
    assert main(["export", str(checkpoint), "--out", str(path)]) == 0 and load_recognizer(path).hubert.heads == heads[:-2]
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--out", str(path), "--encoder-only", "--json"]) == 0
    assert not hubert_eff.load(path).heads


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, notes = small(), {"license": "CC BY 4.0 – ä \u0001 \"'\\ \n", "trained_on": "𝄞", "z": "", "a": "x" * 99}
    contents = set()
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        hubert_eff.export(model, path, notes=notes if number % 2 else dict(reversed(notes.items())))
        contents.add(path.read_bytes())
        assert {key: hubert_eff.checkpoints.safetensors.read_metadata(path)[key] for key in notes} == notes
    hubert_eff.export(hubert_eff.load(path), path, notes=notes)
    assert contents == {path.read_bytes()}


@pytest.mark.parametrize("text", ["\udcff", 3, None, b"bytes"])
def test_notes_that_are_no_text(text: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the note 'license' is not text: "):
        hubert_eff.export(small(), tmp_path / "model.safetensors", notes={"license": text})  # type: ignore[dict-item]


def test_others_may_read_the_file_where_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        hubert_eff.export(small(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
