"""State dicts of torchaudio, and checkpoints that S3PRL converts: every hidden state is theirs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.errors import UserError

from ..helpers.foreign import apart, audio, shaken

SIZES = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4, "conv_pos": 16,
         "conv_pos_groups": 4, "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2", "final_dim": 8}  # fmt: skip
ARGUMENTS = {
    "extractor_conv_layer_config": [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2], "extractor_conv_bias": False,
    "encoder_embed_dim": 32, "encoder_projection_dropout": 0.1, "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2, "encoder_num_heads": 4, "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.1, "encoder_layer_drop": 0.0, "aux_num_out": None,
}  # fmt: skip


def theirs(**keys: Any) -> Any:
    torchaudio = pytest.importorskip("torchaudio")
    torch.manual_seed(0)
    model = torchaudio.models.wav2vec2_model(
        **{"extractor_mode": "group_norm", "encoder_layer_norm_first": False, **ARGUMENTS, **keys}
    ).eval()
    shaken(model)
    return model


def test_the_base_size_needs_no_arguments(tmp_path: Path) -> None:
    """Heads and strides are those of the width; at one block, so that it is small."""
    model = theirs(
        extractor_conv_layer_config=None, encoder_embed_dim=768, encoder_num_heads=12, encoder_num_layers=1, encoder_ff_interm_features=64,
        encoder_pos_conv_kernel=4, encoder_pos_conv_groups=16,
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "model.pth")
    ours, (wav, padding) = hubert_eff.open_model(tmp_path / "model.pth"), audio()
    assert ours.config.encoder_attention_heads == 12 and not ours.config.normalize
    with torch.no_grad():
        expected, _ = model.extract_features(wav, (~padding).sum(1))
    states, frames = ours.hidden_states(wav, padding)
    assert apart(states[1:], frames, expected) < 2e-5  # values of up to 5; sums of 768 round more than those of the small models below


@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("first", [False, True])
def test_other_sizes_with_their_arguments(tmp_path: Path, mode: str, first: bool) -> None:
    keys = {"extractor_mode": mode, "encoder_layer_norm_first": first, "extractor_conv_bias": first, "aux_num_out": 5 if first else None}
    model = theirs(**keys)
    torch.save({"arguments": {**ARGUMENTS, **keys}, "state_dict": model.state_dict()}, tmp_path / "model.pt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = hubert_eff.load(tmp_path / "model.pt")
    assert any("does not say whether its audio is normalized" in str(warning.message) for warning in said) == (mode == "layer_norm")
    assert ours.heads == ("CTC layer" if first else "")
    wav, padding = audio()
    for lengths, mask in ((None, None), ((~padding).sum(1), padding)):
        with torch.no_grad():
            features, counts = model.feature_extractor(wav, lengths)
            expected = model.encoder.extract_features(features, counts)
            expected[-1] = model.encoder(features, counts)  # `extract_features` leaves out the last LayerNorm
        states, frames = ours.hidden_states(wav, mask)
        assert apart(states[1:], frames, expected) < 1e-5


def test_models_of_pipelines_and_of_pretraining(tmp_path: Path) -> None:
    model, (wav, _) = theirs(extractor_mode="layer_norm", encoder_layer_norm_first=True), audio()
    wrapped = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"arguments": ARGUMENTS, "state_dict": wrapped}, tmp_path / "pipeline.pt")
    ours = hubert_eff.load(tmp_path / "pipeline.pt")
    with torch.no_grad():
        expected, _ = model.extract_features(torch.nn.functional.layer_norm(wav[:1], wav[:1].shape))
    assert apart(ours.hidden_states(wav[:1])[0][1:-1], torch.zeros(1, 12, dtype=torch.bool), expected[:-1]) < 1e-5
    mask = torch.randn(32)
    wrapped = {f"wav2vec2.{name}": tensor for name, tensor in theirs().state_dict().items()}
    more = {"mask_generator.mask_embedding": mask, "logit_generator.label_embeddings": torch.zeros(5, 8)}
    torch.save({"arguments": ARGUMENTS, "state_dict": {**wrapped, **more}}, tmp_path / "pretraining.pt")
    assert torch.equal(hubert_eff.load(tmp_path / "pretraining.pt").mask_emb.detach(), mask)


def test_what_a_state_dict_does_not_say(tmp_path: Path) -> None:
    model, path = theirs(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(
        UserError,
        match="model.pt: its number of attention heads is unknown: no model of torchaudio has 32 channels.*{'encoder_num_heads'",
    ):
        hubert_eff.load(path)
    state = {**model.state_dict(), "encoder.transformer.layers.0.attention.gru_rel_pos_linear.weight": torch.zeros(1)}
    torch.save({"arguments": ARGUMENTS, "state_dict": state}, path)
    with pytest.raises(UserError, match="it is a WavLM, whose gated relative positions"):
        hubert_eff.load(path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.attention.q_proj" not in name}
    torch.save({"arguments": ARGUMENTS, "state_dict": state}, path)
    with pytest.raises(UserError, match="its weights lack encoder.transformer.layers.1.attention.q_proj"):
        hubert_eff.load(path)
    torch.save({"arguments": {**ARGUMENTS, "encoder_num_heads": "4"}, "state_dict": model.state_dict()}, path)
    with pytest.raises(UserError, match="encoder_attention_heads='4' must be a whole number"):
        hubert_eff.load(path)
    torch.save({"arguments": {**ARGUMENTS, "extractor_conv_layer_config": 3}, "state_dict": model.state_dict()}, path)
    with pytest.raises(UserError, match="model.pt: conv_feature_layers='3' cannot be read"):
        hubert_eff.load(path)


def _converted(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model of S3PRL's copy of fairseq, and what S3PRL's converter writes of it."""
    from dataclasses import asdict

    torch.manual_seed(0)
    if kind == "hubert":
        module = pytest.importorskip("s3prl.upstream.hubert.hubert_model")
        cfg, task = module.HubertConfig(label_rate=50.0, **SIZES), module.HubertPretrainingConfig(sample_rate=16_000)
        model = module.HubertModel(cfg, task, [["a", "b", "c"]])
    else:
        module = pytest.importorskip("s3prl.upstream.wav2vec2.wav2vec2_model")
        cfg, task = module.Wav2Vec2Config(quantize_targets=True, latent_vars=4, **SIZES), module.AudioPretrainingConfig()
        model = module.Wav2Vec2Model(cfg)
    shaken(model.eval())
    values = {key: value.value if hasattr(value, "value") else value for key, value in asdict(cfg).items()}
    rest = {"dictionaries_symbols": [["a", "b", "c"]]} if kind == "hubert" else {}
    tasks = {"sample_rate": 16_000, "normalize": False}
    return model, {"task_cfg": tasks, "model_cfg": values, "model_weight": model.state_dict(), **rest}


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_what_s3prl_converts(tmp_path: Path, kind: str) -> None:
    model, content = _converted(kind)
    torch.save(content, tmp_path / "converted.pt")
    ours, (wav, padding) = hubert_eff.load(tmp_path / "converted.pt"), audio()
    assert ours.num_classes == ((3,) if kind == "hubert" else ())
    for mask in (None, padding):
        states, frames = ours.hidden_states(wav, mask)
        expected = []
        with torch.no_grad():
            for layer in (1, 2):
                if kind == "hubert":
                    expected.append(model.extract_features(wav, mask, mask=False, output_layer=layer)[0])
                else:
                    expected.append(model.extract_features(wav, mask, mask=False, layer=layer - 1)["x"])
        assert apart(states[1:], frames, expected) < 1e-5
    if kind == "wav2vec2":
        content["model_cfg"]["quantize_input"] = True
        torch.save(content, tmp_path / "converted.pt")
        with pytest.raises(UserError, match="converted.pt: stock wav2vec 2.0 with quantize_input=True cannot be rebuilt here"):
            hubert_eff.load(tmp_path / "converted.pt")
