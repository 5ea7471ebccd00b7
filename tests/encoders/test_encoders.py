"""What holds for every registered encoder, at debug size."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import hubert_eff
from hubert_eff.encoders.registry import get_encoder, register_encoder
from hubert_eff.errors import UserError

ENCODERS = hubert_eff.list_encoders()


@pytest.fixture(params=ENCODERS)
def model(request: pytest.FixtureRequest) -> hubert_eff.models.hubert.HubertModel:
    torch.manual_seed(0)
    # without dropout, so that train mode is reproducible too
    built = hubert_eff.build(f"{request.param}-debug", num_classes=(20,), dropout=0.0, attention_dropout=0.0)
    for module in built.modules():  # statistics that are not those of a fresh BatchNorm
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return built.eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    wav = torch.randn(3, 16_000)
    padding = torch.zeros(3, 16_000, dtype=torch.bool)
    padding[1, 9_123:] = True
    padding[2, 400:] = True  # one valid frame
    return wav, padding


def test_states_have_one_grid(model) -> None:
    states, padding = model.hidden_states(torch.randn(2, 16_000))
    assert len(states) == model.config.encoder_layers + 1
    assert {tuple(s.shape) for s in states} == {(2, 49, 64)}
    assert padding.shape == (2, 49) and not padding.any()


@pytest.mark.parametrize("samples, frames", [(400, 1), (719, 1), (720, 2), (16_000, 49), (160_000, 499)])
def test_frames(model, samples: int, frames: int) -> None:
    assert model.num_frames(samples) == frames
    assert model.hidden_states(torch.randn(1, samples))[0][-1].shape == (1, frames, 64)


def test_batch_row_equals_alone(model) -> None:
    wav, padding = padded_batch()
    states, frames = model.hidden_states(wav, padding)
    for row in range(3):
        length = int((~padding[row]).sum())
        alone, _ = model.hidden_states(wav[row : row + 1, :length])
        valid = int((~frames[row]).sum())
        assert valid == model.num_frames(length)
        for state, single in zip(states, alone):
            torch.testing.assert_close(state[row, :valid], single[0], rtol=1e-4, atol=1e-5)
            assert not state[row, valid:].any()


@pytest.mark.parametrize("training", [False, True])
def test_padding_is_sealed(model, training: bool) -> None:
    """What lies in the padding changes no valid frame, nor the statistics of a norm."""
    model.train(training)
    wav, padding = padded_batch()
    other = copy.deepcopy(model)
    noisy = torch.where(padding, torch.randn_like(wav) * 100, wav)
    torch.manual_seed(1)  # what an encoder draws in training must not differ
    first, _ = model.hidden_states(wav, padding)
    torch.manual_seed(1)
    second, _ = other.hidden_states(noisy, padding)
    longer, _ = other.eval().hidden_states(*(torch.nn.functional.pad(t, (0, 3_200), value=v) for t, v in ((wav, 5.0), (padding, True))))
    for a, b, c in zip(first, second, longer):
        assert torch.equal(a, b)
        if not training:
            torch.testing.assert_close(a, c[:, :49], rtol=1e-4, atol=1e-5)
    for a, b in zip(model.buffers(), other.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seconds", [0.025, 300])
def test_very_short_and_very_long_audio(model, seconds: float) -> None:
    samples = int(seconds * 16_000)
    with torch.no_grad():
        states, padding = model.hidden_states(torch.randn(1, samples))
    assert len(states) == model.config.encoder_layers + 1
    assert {tuple(s.shape) for s in states} == {(1, model.num_frames(samples), 64)}
    assert all(torch.isfinite(s).all() for s in states) and not padding.any()


def test_every_parameter_learns(model) -> None:
    model.train()
    wav, padding = padded_batch()
    out = model(wav, [torch.randint(0, 20, (3, 50))], padding)
    loss = torch.nn.functional.cross_entropy(out["logits_m"][0], out["targets_m"][0]) + out["features_pen"]
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # softmax does not see a bias on the keys
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []


def test_hidden_states_keep_mode_and_gradients(model) -> None:
    model.train()
    wav = torch.randn(1, 8_000, requires_grad=True)
    states, _ = model.hidden_states(wav)
    states[-1].sum().backward()
    assert model.training and wav.grad is not None


def test_encoder_alone(model) -> None:
    x = torch.randn(2, 30, model.config.input_dim)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 20:] = True
    y = model.encoder(x, padding)
    assert y.shape == (2, 30, 64) and not y[1, 20:].any()
    assert torch.equal(y, model.encoder.hidden_states(x, padding)[-1])
    assert torch.equal(model.encoder(x, padding, layer=1), model.encoder.hidden_states(x, padding)[1])
    assert model.encoder(x).shape == (2, 30, 64)


def test_utterance_without_a_valid_frame(model) -> None:
    wav = torch.randn(2, 4_000)
    padding = torch.zeros(2, 4_000, dtype=torch.bool)
    padding[1, 100:] = True
    states, frames = model.hidden_states(wav, padding)
    assert frames[1].all() and all(torch.isfinite(s).all() for s in states)


def test_bfloat16(model) -> None:
    wav = torch.randn(1, 8_000)
    exact, _ = model.hidden_states(wav)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.hidden_states(wav)
    half, _ = copy.deepcopy(model).bfloat16().hidden_states(wav.bfloat16())
    assert half[-1].dtype == torch.bfloat16
    for other in (rough, half):
        assert torch.nn.functional.cosine_similarity(exact[-1].flatten(), other[-1].float().flatten(), 0) > 0.99


def test_compiles(model) -> None:
    torch.compiler.reset()
    wav, padding = padded_batch()
    direction = torch.randn(3, 49, 64)
    compiled = torch.compile(model.encoder, backend="aot_eager")
    x = torch.randn(3, 49, model.config.input_dim)
    mask = model.hidden_states(wav, padding)[1]
    gradients = []
    for encoder in (model.encoder, compiled):
        leaf = x.clone().requires_grad_()
        y = encoder(leaf, mask)
        (y * direction).sum().backward()
        gradients.append((y.detach(), leaf.grad))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_required_multiple_changes_nothing(model) -> None:
    wav, padding = padded_batch()
    exact, _ = model.hidden_states(wav, padding)
    model.encoder.multiple = 8
    for a, b in zip(exact, model.hidden_states(wav, padding)[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointed_activations(model) -> None:
    model.train()
    wav, padding = padded_batch()
    direction = torch.randn(3, 49, 64)
    runs = []
    for recompute in (False, True):
        for batch in ((wav[:1], None), (wav, padding)):
            twin = copy.deepcopy(model)
            twin.encoder.checkpoint_activations = recompute
            torch.manual_seed(1)
            x = twin(batch[0], padding_mask=batch[1], features_only=True)["x"]
            (x * direction[: len(x)]).sum().backward()
            runs.append(([p.grad for p in twin.encoder.parameters()], list(twin.buffers())))
    for (grads, buffers), (again, buffers_again) in zip(runs[:2], runs[2:]):
        assert max(float(g.abs().max()) for g in grads) > 1
        for a, b in zip(grads + buffers, again + buffers_again):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export_reads_back_the_same(model, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    hubert_eff.export(model, path)
    loaded = hubert_eff.load(path)
    wav, padding = padded_batch()
    for a, b in zip(model.hidden_states(wav, padding)[0], loaded.hidden_states(wav, padding)[0]):
        assert torch.equal(a, b)
    assert loaded.config == model.config and not hasattr(loaded, "label_embs_concat")


def test_deepcopy_and_state_dict(model) -> None:
    twin = copy.deepcopy(model)
    fresh = type(model)(model.config, model.num_classes).eval()
    fresh.load_state_dict(model.state_dict())
    wav = torch.randn(1, 8_000)
    reference = model.hidden_states(wav)[0][-1]
    assert torch.equal(reference, twin.hidden_states(wav)[0][-1])
    assert torch.equal(reference, fresh.hidden_states(wav)[0][-1])


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'conformer-s'"):
        hubert_eff.build("conformers")
    with pytest.raises(UserError, match="did you mean 'encoder_layers'"):
        hubert_eff.build("conformer-debug", encoder_layer=3)
    with pytest.raises(UserError, match="did you mean 'conformer'"):
        hubert_eff.registry.get_encoder("conformr")
    with pytest.raises(UserError, match="registered already"):
        register_encoder("conformer", hubert_eff.config.HubertConfig, {})(object)
    with pytest.raises(UserError, match="preset 'conformer-s'"):
        register_encoder("other", hubert_eff.config.HubertConfig, {"conformer-s": {}})(object)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"encoder_attention_heads": 5}, "does not divide encoder_embed_dim=64"),
        ({"depthwise_conv_kernel_size": 4}, "must be odd"),
        ({"pos_enc_type": "rope"}, "unknown value of pos_enc_type"),
        ({"conv_feature_layers": "[(32,10,5)]"}, "total stride of 5"),
        ({"conv_feature_layers": "__import__('os').system('true')"}, "cannot be read"),
        ({"conv_feature_layers": "[(32,10,5)] * 10**9"}, "cannot be read"),
        ({"label_rate": 60}, "not a multiple of the frame rate"),
        ({"mask_channel_prob": 0.01}, "less than one span"),
        ({"encoder_layers": 0}, "must be 1 to 100"),
        ({"dropout": 3.0}, "must be 0 to 1"),
        ({"mask_selection": "uniform", "mask_other": 30.0}, "shortest uniform span"),
        ({"mask_other": -1.0}, "must be at least 0"),
        ({"seed": -1}, "must be at least 0"),
        ({"logit_temp": 0.0}, "must be above 0"),
        ({"label_rate": 0}, "must be above 0"),
    ],
)
def test_impossible_configurations_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hubert_eff.build("conformer-debug", **keys)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_key_refuses_what_is_not_of_its_type(encoder: str) -> None:
    wrong = {
        "bool": ("yes", None, 1), "int": ("3", None, 2.5, True), "float": ("0.1", None, True, math.nan, math.inf), "str": (None, 3, ["a"])
    }  # fmt: skip
    for field in dataclasses.fields(get_encoder(encoder).config):
        for value in wrong[field.type]:
            with pytest.raises(UserError, match=f"{field.name}=.*must be|unknown value of {field.name}"):
                hubert_eff.build(f"{encoder}-debug", **{field.name: value})


def test_a_layer_that_is_not_there_is_refused(model) -> None:
    depth = model.config.encoder_layers
    for layer in (-1, depth + 1):
        with pytest.raises(UserError, match=f"layer={layer}.*1 to {depth}"):
            model(torch.randn(1, 8_000), features_only=True, output_layer=layer)
