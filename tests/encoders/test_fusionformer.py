"""FusionFormer, and `fuse`: what folds, what stays, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.layers.linear import Linear
from hubert_eff.layers.norm import MaskedBatchNorm
from hubert_eff.models.hubert import HubertModel
from hubert_eff.optim import noam

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def norms(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, NORMS)]


def trained(preset: str, updates: int = 12, **keys: object) -> HubertModel:
    """A model after some updates on audio whose level changes: statistics, scales and biases of its norms are not trivial."""
    torch.manual_seed(0)
    model = hubert_eff.build(preset, num_classes=(20,), **keys)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for update in range(updates):
        model.set_num_updates(update)
        wav, padding = batch()
        out = model(wav * (1 + update % 3), [torch.randint(0, 20, (2, 50))], padding)
        loss = F.cross_entropy(out["logits_m"][0], out["targets_m"][0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):
            assert module.weight.detach().sub(1).abs().max() > 1e-3 and module.running_var.sub(1).abs().max() > 1e-3
            # twelve updates do not take the running statistics far: as far as a long training would
            module.running_mean += 0.3 * torch.randn_like(module.running_mean)
            module.running_var *= torch.empty_like(module.running_var).uniform_(0.3, 3.0)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    wav = torch.randn(2, 12_000)
    padding = torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    return wav, padding


CASES = [
    ("fusionformer-debug", {}),
    ("fusionformer-debug", {"conv_module_expansion": 2, "conv_module_relu": "pointwise"}),
    ("fusionformer-debug", {"conv_module_relu": "depthwise", "encoder_layers": 12}),
    ("conformer-debug", {}),
    ("conformer-debug", {"block_norm": "batch_norm", "pos_enc_type": "abs", "conv_module_bias": True}),
    ("conformer-debug", {"block_norm": "none"}),
]


@pytest.mark.parametrize(("preset", "keys"), CASES)
def test_a_fused_model_computes_the_same(preset: str, keys: dict) -> None:
    model = trained(preset, **keys)
    before = copy.deepcopy(model.state_dict())
    fused = hubert_eff.fuse(model)
    for padded in (False, True):
        wav, padding = batch()
        arguments = (wav, padding) if padded else (wav,)
        states, folded = model.hidden_states(*arguments)[0], fused.hidden_states(*arguments)[0]
        for a, b in zip(states, folded):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(a.detach().abs().max())))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_no_norm_is_left_in_a_fused_fusionformer() -> None:
    model = trained("fusionformer-debug")
    assert len(norms(model.encoder)) == 2 * 9  # nine layers follow one another in a block; Q, K and V are one product
    assert norms(hubert_eff.fuse(model).encoder) == []
    assert norms(hubert_eff.fuse(model.encoder)) == []  # an encoder alone
    assert not any(name.endswith(("weight_g", "weight_v")) for name in hubert_eff.fuse(model).state_dict())


def test_norms_that_have_no_layer_to_fold_into_stay() -> None:
    fused = hubert_eff.fuse(trained("conformer-debug")).encoder
    assert not any(isinstance(m, nn.BatchNorm1d) for m in fused.modules()) and len(norms(fused)) == 2 * 5 + 1
    fused = hubert_eff.fuse(trained("conformer-debug", block_norm="batch_norm")).encoder
    assert norms(fused) == ["layers.0.final_layer_norm", "layers.1.final_layer_norm"]


@pytest.mark.parametrize(("preset", "keys"), CASES[1:5])
def test_a_fused_model_is_exported_and_read_back(preset: str, keys: dict, tmp_path) -> None:
    fused = hubert_eff.fuse(trained(preset, updates=1, **keys))
    path = tmp_path / "model.safetensors"
    hubert_eff.export(fused, path)
    loaded = hubert_eff.load(path)
    assert loaded.fused and loaded.config == fused.config and norms(loaded) == norms(fused)
    wav, padding = batch()
    for a, b in zip(fused.hidden_states(wav, padding)[0], loaded.hidden_states(wav, padding)[0]):
        assert torch.equal(a, b)


def test_weights_are_laid_out_for_onednn_and_stay_so(tmp_path) -> None:
    fused = hubert_eff.fuse(hubert_eff.build("conformer-debug", block_norm="batch_norm"))
    hubert_eff.export(fused, tmp_path / "model.safetensors")
    for model in (fused, copy.deepcopy(fused), hubert_eff.fuse(fused), hubert_eff.load(tmp_path / "model.safetensors")):
        layers = [m for m in model.modules() if isinstance(m, Linear)]
        assert len(layers) > 10 and all(layer.weight.stride(0) == 1 for layer in layers)
        for block in model.encoder.layers:
            assert block.self_attn.qkv_proj.out_features == 3 * 64 and block.self_attn.q_proj is None


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_fuses_once(encoder: str) -> None:
    model = hubert_eff.build(f"{encoder}-debug").eval()
    fused = hubert_eff.fuse(model)
    again = hubert_eff.fuse(fused)
    wav, padding = batch()
    for a, b, c in zip(*(m.hidden_states(wav, padding)[0] for m in (model, fused, again))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert torch.equal(b, c)
    assert fused.state_dict().keys() == again.state_dict().keys()
    assert fused.fused and again.fused and not model.fused


def test_a_fused_model_is_not_trained() -> None:
    fused = hubert_eff.fuse(hubert_eff.build("fusionformer-debug"))
    assert not fused.training and not nn.Sequential(fused).train()[0].encoder.training
    wav = torch.randn(1, 8_000)
    assert not fused.hidden_states(wav)[0][-1].requires_grad


def test_a_fused_model_compiles_is_profiled_and_runs_in_half_precision() -> None:
    model = trained("fusionformer-debug", updates=2)
    fused = hubert_eff.fuse(model)
    torch.compiler.reset()
    x = torch.randn(2, 30, 64)
    torch.testing.assert_close(torch.compile(fused.encoder, backend="aot_eager")(x), fused.encoder(x), rtol=1e-4, atol=1e-4)
    cost, unfused = hubert_eff.profile(fused, seconds=1.0), hubert_eff.profile(model, seconds=1.0)
    assert cost.macs == unfused.macs
    half = copy.deepcopy(fused).bfloat16().encoder(x.bfloat16()).float()
    assert F.cosine_similarity(half.flatten(), fused.encoder(x).flatten(), 0) > 0.99


def plain_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A FusionFormer block in train mode from torch's own layers, one after the other; Q, K and V each with their own norm."""
    counts = {"Linear": 0}

    def layer(linear: nn.Module, norm: nn.Module, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        counts["Linear"] += 1
        y = F.linear(x, linear.weight[rows])
        return F.batch_norm(y.flatten(0, 1), None, None, norm.weight[rows], norm.bias[rows], training=True).view_as(y)

    def half_step(ff: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + 0.5 * layer(ff.w_2, ff.norm_2, layer(ff.w_1, ff.norm_1, x).relu())

    x = half_step(block.ffn1, x)
    attention, dim = block.self_attn, x.size(-1)
    q, k, v = (layer(attention.qkv_proj, attention.qkv_norm, x, slice(i * dim, (i + 1) * dim)) for i in range(3))
    mixed = []
    for columns in torch.arange(dim).chunk(attention.heads):
        scores = q[..., columns] @ k[..., columns].mT / len(columns) ** 0.5
        mixed.append(scores.softmax(-1) @ v[..., columns])
    x = x + layer(attention.out_proj, attention.out_norm, torch.cat(mixed, -1))
    conv = block.conv_module
    y = layer(conv.pointwise_conv1, conv.norm_1, x).relu()
    channels, _, kernel = conv.depthwise_conv.weight.shape
    y = F.conv1d(y.mT, conv.depthwise_conv.weight, padding=kernel // 2, groups=channels)
    y = F.batch_norm(y, None, None, conv.norm_2.weight, conv.norm_2.bias, training=True).mT.relu()
    x = x + layer(conv.pointwise_conv2, conv.norm_3, y)
    x = half_step(block.ffn2, x)
    assert counts["Linear"] == 10  # and the depthwise convolution: 11 layers
    return x


def test_a_block_equals_its_definition() -> None:
    from hubert_eff.encoders.base import Frames

    model = hubert_eff.build("fusionformer-debug", dropout=0.0, attention_dropout=0.0)
    block = model.encoder.layers[0]
    for parameter in block.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(3, 40, 64)
    torch.testing.assert_close(block(x, Frames()), plain_block(block, x), rtol=1e-4, atol=1e-4)


def test_preset_is_the_papers() -> None:
    config = hubert_eff.registry.preset_config("fusionformer-s")
    sizes = (config.encoder_layers, config.encoder_embed_dim, config.encoder_attention_heads, config.encoder_ffn_embed_dim)
    assert sizes == (12, 256, 4, 2048) and config.depthwise_conv_kernel_size == 15


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"depthwise_conv_kernel_size": 6}, "must be odd"),
        ({"conv_module_expansion": 3}, "conv_module_expansion=3 must be 1 to 2"),
        ({"conv_module_relu": "none"}, "unknown value of conv_module_relu"),
        ({"layer_norm_first": True}, "no LayerNorm"),
        ({"encoder_attention_heads": 7}, "does not divide"),
    ],
)
def test_impossible_configurations_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hubert_eff.build("fusionformer-debug", **keys)


def test_masked_prediction_learns() -> None:
    """Frames of one of four tones: a model that sees the neighbors can tell a masked frame's tone."""
    torch.manual_seed(0)
    model = hubert_eff.build("fusionformer-debug", num_classes=(4,), conv_pos=16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    time = torch.arange(8_000) / 16_000

    def step(update: int) -> tuple[torch.Tensor, float]:
        tones = torch.randint(0, 4, (4,))
        wav = torch.sin(2 * torch.pi * (300 * 2.0**tones)[:, None] * time) + 0.1 * torch.randn(4, 8_000)
        model.set_num_updates(update)
        out = model(wav, [tones[:, None].expand(4, 25)])
        logits, targets = out["logits_m"][0], out["targets_m"][0]
        return F.cross_entropy(logits, targets), float((logits.argmax(-1) == targets).float().mean())

    for update in range(40):
        loss, _ = step(update)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert step(40)[1] > 0.9


def test_noam_peaks_at_the_end_of_the_warm_up() -> None:
    rates = [noam(update, 0.002, 100) for update in range(1, 1001)]
    assert max(rates) == rates[99] == pytest.approx(0.002)
    assert rates[0] == pytest.approx(0.002 / 100) and rates[49] == pytest.approx(0.001) and rates[399] == pytest.approx(0.001)
    assert rates == [pytest.approx(0.002 * 100**0.5 * min(t**-0.5, t * 100**-1.5)) for t in range(1, 1001)]


def test_noam_is_a_schedule_of_fairseq() -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.optim import build_optimizer
    from fairseq.optim.lr_scheduler import build_lr_scheduler
    from omegaconf import OmegaConf

    import fairseq_plugins  # noqa: F401

    def schedule(lr: tuple[float, ...] = (0.002,), warmup_updates: int = 100) -> tuple:
        config = OmegaConf.structured(FairseqConfig)
        OmegaConf.set_struct(config, False)
        schedule = {"_name": "noam", "warmup_updates": warmup_updates}
        config = OmegaConf.merge(config, {"optimizer": {"_name": "adam"}, "lr_scheduler": schedule, "optimization": {"lr": list(lr)}})
        optimizer = build_optimizer(config.optimizer, [nn.Parameter(torch.ones(2))])
        return optimizer, build_lr_scheduler(config.lr_scheduler, optimizer)

    optimizer, built = schedule()
    assert optimizer.get_lr() == noam(1, 0.002, 100)
    for done in (1, 99, 1000):
        assert built.step_update(done) == optimizer.get_lr() == noam(done + 1, 0.002, 100)
    with pytest.raises(UserError, match="warmup_updates=0"):
        schedule(warmup_updates=0)
    with pytest.raises(UserError, match="one peak rate"):
        schedule(lr=(0.1, 0.2))
