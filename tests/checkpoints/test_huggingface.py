"""Folders of Hugging Face: every hidden state is theirs; what cannot be held is named in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError

from ..helpers.foreign import KINDS, apart, audio, theirs

pytest.importorskip("transformers")


def states_of(model: Any, wav: Tensor, padding: Tensor | None = None) -> Any:
    with torch.no_grad():
        mask = None if padding is None else (~padding).long()
        return model(wav, attention_mask=mask, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    "name, kind", [*(("HubertModel", kind) for kind in KINDS), *(("Wav2Vec2Model", kind) for kind in ("base", "large"))]
)
def test_hidden_states_are_theirs(tmp_path: Path, name: str, kind: str) -> None:
    model = theirs(name, kind)
    model.save_pretrained(tmp_path)
    ours, (wav, padding) = hubert_eff.load(tmp_path), audio()
    assert not ours.training and not ours.heads
    for mask in (None, padding):
        states, frames = ours.hidden_states(wav, mask)
        assert apart(states, frames, states_of(model, wav, mask)) < 1e-5


def _old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm as versions of torch before 2.1 name it."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {re.sub(r"parametrizations\.weight\.original[01]", lambda m: old[m[0]], name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["parts", "old names", "bin", "bin in parts", "half", "one file of it"])
def test_forms_of_the_weights(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    model, source = theirs(kind="large"), tmp_path
    if form in ("parts", "bin in parts"):
        model.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=form == "parts")
        assert len(list(tmp_path.glob("*.index.json"))) == 1 and len(list(tmp_path.iterdir())) > 4
    elif form == "half":
        model.half().save_pretrained(tmp_path)
        model.float()
    else:
        model.save_pretrained(tmp_path, safe_serialization=form != "bin")
    if form == "old names":
        save_file(_old_names(model.state_dict()), tmp_path / "model.safetensors")
    if form == "one file of it":
        source = tmp_path / "model.safetensors"
    ours, (wav, _) = hubert_eff.open_model(source), audio()
    states, frames = ours.hidden_states(wav)
    assert apart(states, frames, states_of(model, wav)) < 1e-5
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name, head",
    [
        ("HubertForCTC", "CTC layer"),
        ("Wav2Vec2ForCTC", "CTC layer"),
        ("HubertForSequenceClassification", "classifier"),
        ("Wav2Vec2ForPreTraining", ""),
        ("Wav2Vec2ForXVector", "classifier"),
    ],
)
def test_encoders_of_models_with_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, head: str) -> None:
    model = theirs(name, tdnn_dim=(8,) * 5, xvector_output_dim=8) if "XVector" in name else theirs(name)
    model.save_pretrained(tmp_path)
    ours, (wav, padding) = hubert_eff.load(tmp_path), audio()
    states, frames = ours.hidden_states(wav, padding)
    assert apart(states, frames, states_of(getattr(model, model.base_model_prefix), wav, padding)) < 1e-5
    assert ours.heads == head
    if head:
        assert main(["export", str(tmp_path), "--out", str(tmp_path / "own.safetensors")]) == 2
        assert f"no place for its {head}" in capsys.readouterr().err


def test_audio_is_normalized_as_the_preprocessor_says(tmp_path: Path) -> None:
    """Quiet audio, where what is added to the variance is seen."""
    from transformers import Wav2Vec2FeatureExtractor

    model, (wav, padding) = theirs(kind="large"), audio()
    wav = 0.02 * wav
    model.save_pretrained(tmp_path)
    assert not hubert_eff.load(tmp_path).config.normalize
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    extractor.save_pretrained(tmp_path)
    recordings = [row[~mask].numpy() for row, mask in zip(wav, padding, strict=True)]
    batch = extractor(recordings, sampling_rate=16_000, padding=True, return_tensors="pt")
    states, frames = hubert_eff.load(tmp_path).hidden_states(wav, padding)
    assert apart(states, frames, states_of(model, batch.input_values, padding)) < 1e-5


def test_a_width_that_needs_no_projection(tmp_path: Path) -> None:
    model = theirs(hidden_size=16)
    model.save_pretrained(tmp_path / "any")
    with pytest.raises(UserError, match="any: it projects 16 channels to as many"):
        hubert_eff.load(tmp_path / "any")
    with torch.no_grad():
        model.feature_projection.projection.weight.copy_(torch.eye(16))
        model.feature_projection.projection.bias.zero_()
    model.save_pretrained(tmp_path / "none")
    (wav, padding) = audio()
    states, frames = hubert_eff.load(tmp_path / "none").hidden_states(wav, padding)
    assert apart(states, frames, states_of(model, wav, padding)) < 1e-5


def test_the_same_weights_twice(tmp_path: Path) -> None:
    """What a folder lacks starts at random, and the global random state stays as it is."""
    theirs(mask_time_prob=0.0).save_pretrained(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = hubert_eff.load(tmp_path).state_dict(), hubert_eff.load(tmp_path).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert float(one["mask_emb"].abs().min()) > 0 and float(one["final_proj.weight"].std()) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "wavlm"}, "model_type is 'wavlm' (gated relative positions), which the Transformer here cannot hold"),
        ({"model_type": "bert"}, "model_type is 'bert', which"),
        ({"model_type": ["hubert"]}, "model_type is ['hubert'], which"),
        ({"add_adapter": True}, "it has an adapter, add_adapter=True"),
        ({"adapter_attn_dim": 16}, "it has an adapter, adapter_attn_dim=16"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True, which the Transformer here cannot hold (only False)"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12"),
        ({"quantization_config": {"load_in_8bit": True}}, "its weights are quantized (quantization_config)"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "a total stride of 160 samples"),
        ({"conv_dim": [16] * 6}, "must be of one length, not 6, 7, 7"),
        ({"conv_dim": "16"}, "must be lists of whole numbers"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm='batch' must be one of group, layer"),
        ({"num_hidden_layers": 3}, "its weights lack encoder.layers.2."),
        ({"num_hidden_layers": 1}, "it holds encoder.layers.1."),
        ({"num_hidden_layers": "2"}, "encoder_layers='2' must be a whole number"),
        ({"intermediate_size": 65}, "(64, 32), its configuration asks for (65, 32)"),
    ],
)
def test_what_cannot_be_held_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    theirs().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError) as caught:
        hubert_eff.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    assert main(["profile", str(tmp_path)]) == 2
    assert f"{tmp_path}: it holds no config.json" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it holds an adapter .adapter_config.json. and no model"):
        hubert_eff.load(tmp_path)
    model = theirs()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it holds config.json, but no weights: expected model.safetensors"):
        hubert_eff.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for parts, message in (
        ({"a": "../x.safetensors"}, "names no .safetensors files of this folder"),
        ({"a": "x.safetensors"}, "it lacks x."),
    ):
        index.write_text(json.dumps({"weight_map": parts}))
        with pytest.raises(UserError, match=message):
            hubert_eff.load(tmp_path)
    index.unlink()
    state = model.state_dict()
    save_file({**state, "encoder.layers.0.fc1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"it holds encoder.layers.0.fc1.weight \(1,\), for which the architecture of this package"):
        hubert_eff.load(tmp_path)
    name = "encoder.layers.0.attention.k_proj.weight"
    save_file({**state, name: torch.zeros(32, 32, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is torch.int8: quantized weights are not read"):
        hubert_eff.load(tmp_path)
    save_file({**state, name: torch.full((32, 32), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        hubert_eff.load(tmp_path)
    wide = {key: tensor.double() for key, tensor in state.items()}
    save_file(wide, tmp_path / "model.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in hubert_eff.load(tmp_path).parameters())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or damaged"):
        hubert_eff.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**state, name: state[name.replace("k_proj", "q_proj")]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="tensors share their bytes"):
        hubert_eff.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="its config.json is not a JSON object"):
        hubert_eff.load(tmp_path)


def test_a_folder_is_told_from_another_by_its_content(tmp_path: Path) -> None:
    """What labels, SUPERB results and trainings keep of a model."""
    from hubert_eff.checkpoints.open import digest_of
    from hubert_eff.labels.features import FeatureSource

    for name in ("one", "same", "other"):
        theirs(kind="base" if name != "other" else "pre-norm-group").save_pretrained(tmp_path / name)
    one, same, other = (FeatureSource(str(tmp_path / name), 1).open().identity()["checkpoint_sha256"] for name in ("one", "same", "other"))
    assert one == same != other  # the weights of the last are the others': config.json alone differs
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]
    assert digest_of(tmp_path / "one" / "model.safetensors") == one and digest_of("conformer-debug") is None
    (tmp_path / "one" / "README.md").write_text("no part of it")
    assert digest_of(tmp_path / "one") == one
