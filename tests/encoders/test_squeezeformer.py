"""The Squeezeformer against its specification written out: one utterance at a time, without padding, in plain operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hubert_eff
from hubert_eff.encoders.registry import encoder_of, preset_config
from hubert_eff.encoders.squeezeformer import ScaleBias, SqueezeformerEncoder
from hubert_eff.errors import UserError
from hubert_eff.layers.convolution import DepthwiseConv

HEADS, DIM, KERNEL, REDUCE, RECOVER, LAYERS = 4, 64, 15, 1, 3, 4
Weights = dict[str, Tensor]


def make_encoder(**keys) -> SqueezeformerEncoder:
    """`squeezeformer-debug` whose every parameter and statistic is far from its start, so that nothing is hidden by a zero or a one."""
    encoder = hubert_eff.build("squeezeformer-debug", dropout=0.0, attention_dropout=0.0, **keys).encoder
    for name, parameter in encoder.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "scale" in name else 0.05))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return encoder.eval()


# -- the specification, for a list of utterances (T_i, D) ------------------------------------------------------------------


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"])


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def sinusoids(offset: int) -> Tensor:
    angles = [offset / 10_000 ** (2 * i / DIM) for i in range(DIM // 2)]
    return torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)])


def attend(x: Tensor, w: Weights, name: str) -> Tensor:
    frames, width = len(x), DIM // HEADS
    q, k, v = (linear(x, w, f"{name}.{part}_proj") for part in "qkv")
    relative = f"{name}.linear_pos.weight" in w
    if relative:
        p = torch.stack([torch.stack([sinusoids(i - j) for j in range(frames)]) for i in range(frames)]) @ w[f"{name}.linear_pos.weight"].T
    mixed = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        if relative:
            scores = (q[:, part] + w[f"{name}.pos_bias_u"][head]) @ k[:, part].T
            scores = scores + ((q[:, None, part] + w[f"{name}.pos_bias_v"][head]) * p[..., part]).sum(-1)
        else:
            scores = q[:, part] @ k[:, part].T
        mixed.append(torch.softmax(scores / math.sqrt(width), -1) @ v[:, part])
    return linear(torch.cat(mixed, -1), w, f"{name}.out_proj")


def feed_forward(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(swish(linear(x, w, f"{name}.w_1")), w, f"{name}.w_2")


def convolve(rows: list[Tensor], w: Weights, name: str, training: bool) -> list[Tensor]:
    taps, filtered = w[f"{name}.depthwise_conv.weight"][:, 0], []
    for x in rows:
        x = swish(linear(x, w, f"{name}.pointwise_conv1"))
        x = torch.cat((x.new_zeros(KERNEL // 2, 2 * DIM), x, x.new_zeros(KERNEL // 2, 2 * DIM)))
        filtered.append(sum(x[t : t + len(x) - KERNEL + 1] * taps[:, t] for t in range(KERNEL)))
    packed = torch.cat(filtered)
    mean, variance = w[f"{name}.batch_norm.running_mean"], w[f"{name}.batch_norm.running_var"]
    if training:
        mean, variance = packed.mean(0), packed.var(0, unbiased=False)
    packed = (packed - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.batch_norm.weight"] + w[f"{name}.batch_norm.bias"]
    return list(linear(swish(packed), w, f"{name}.pointwise_conv2").split([len(x) for x in rows]))


def block(rows: list[Tensor], w: Weights, name: str, training: bool) -> list[Tensor]:
    def scaled(x: Tensor, module: str) -> Tensor:
        return w[f"{name}.{module}_scale.weight"] * x + w[f"{name}.{module}_scale.bias"]

    rows = [layer_norm(x + attend(scaled(x, "self_attn"), w, f"{name}.self_attn"), w, f"{name}.self_attn_layer_norm") for x in rows]
    rows = [layer_norm(x + feed_forward(scaled(x, "ffn1"), w, f"{name}.ffn1"), w, f"{name}.ffn1_layer_norm") for x in rows]
    moved = convolve([scaled(x, "conv") for x in rows], w, f"{name}.conv_module", training)
    rows = [layer_norm(x + y, w, f"{name}.conv_layer_norm") for x, y in zip(rows, moved)]
    return [layer_norm(x + feed_forward(scaled(x, "ffn2"), w, f"{name}.ffn2"), w, f"{name}.ffn2_layer_norm") for x in rows]


def reduce_rate(x: Tensor, w: Weights) -> Tensor:
    taps, frames = w["time_reduction.depthwise_conv.weight"][:, 0], []
    for first in range(0, len(x), 2):
        frames.append(sum(x[first + t] * taps[:, t] for t in range(5) if first + t < len(x)))
    return linear(torch.stack(frames), w, "time_reduction.pointwise_conv")


def twice(x: Tensor, length: int) -> Tensor:
    return torch.stack([x[t // 2] for t in range(length)])


def specification(rows: list[Tensor], w: Weights, training: bool) -> list[list[Tensor]]:
    """All hidden states of each utterance."""
    norm = w["pos_conv.0.weight_v"].square().sum((0, 1), keepdim=True).sqrt()
    kernel = w["pos_conv.0.weight_v"] * w["pos_conv.0.weight_g"] / norm
    entered = []
    for x in rows:
        context = F.conv1d(x.T[None], kernel, w["pos_conv.0.bias"], padding=16, groups=4)[0, :, : len(x)].T
        entered.append(layer_norm((x + F.gelu(context)) * math.sqrt(DIM), w, "layer_norm"))
    rows, states, lengths = entered, [[x] for x in entered], [len(x) for x in entered]
    for index in range(LAYERS):
        if index == REDUCE:
            saved, rows = rows, [reduce_rate(x, w) for x in rows]
        if index == RECOVER:
            rows = [linear(twice(x, n), w, "time_recovery") + y for x, y, n in zip(rows, saved, lengths)]
        rows = block(rows, w, f"layers.{index}", training)
        for state, x, n in zip(states, rows, lengths):
            state.append(twice(x, n) if REDUCE <= index < RECOVER else x)
    return states


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pos_enc_type", ["rel_pos", "abs"])
@pytest.mark.parametrize("lengths", [[26], [27], [27, 12, 27, 13, 1], [20, 7, 2]])
def test_encoder_equals_the_specification(lengths: list[int], pos_enc_type: str, training: bool) -> None:
    """Outputs of every layer and gradients; what lies in the padding is garbage."""
    encoder = make_encoder(pos_enc_type=pos_enc_type).train(training)
    batch, longest = len(lengths), max(lengths)
    x = torch.randn(batch, longest, DIM, requires_grad=True)
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    garbage = torch.where(padding[..., None], torch.full_like(x, 1e4), x)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    states = encoder.hidden_states(garbage, padding if batch > 1 else None)
    named = dict(encoder.named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    y = x.detach().clone().requires_grad_()
    expected = specification([y[i, :n] for i, n in enumerate(lengths)], {**state, **leaves}, training)
    assert len(states) == LAYERS + 1
    loss, wanted = torch.zeros(()), torch.zeros(())
    for depth, ours in enumerate(states):
        direction = torch.randn_like(ours)
        loss = loss + (ours * direction).sum()
        for i, n in enumerate(lengths):
            torch.testing.assert_close(ours[i, :n], expected[i][depth], rtol=1e-4, atol=2e-5)
            assert not ours[i, n:].any()
            wanted = wanted + (expected[i][depth] * direction[i, :n]).sum()
    loss.backward()
    wanted.backward()
    for ours, theirs in ((x.grad, y.grad), *((named[name].grad, leaf.grad) for name, leaf in leaves.items())):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-4)


def test_middle_blocks_run_at_half_the_rate_and_their_states_at_the_full_one() -> None:
    encoder, rates = make_encoder(), []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _module, inputs, output: rates.append((inputs[0].size(1), output.size(1))))
    states = encoder.hidden_states(torch.randn(1, 27, DIM))
    assert rates == [(27, 27), (14, 14), (14, 14), (27, 27)]
    for depth, state in enumerate(states):
        pairs = torch.equal(state[:, 0:26:2], state[:, 1:27:2])
        assert state.shape == (1, 27, DIM) and pairs == (depth in (2, 3))
    for depth in range(1, LAYERS + 1):  # an intermediate layer, asked for alone
        del rates[:]
        x = torch.randn(1, 27, DIM)
        assert torch.equal(encoder(x, layer=depth), encoder.hidden_states(x)[depth])
        assert len(rates) == depth + LAYERS


def test_constants_and_initialization_are_the_authors() -> None:
    encoder = hubert_eff.build("squeezeformer-debug").encoder
    quiet = 1e-3 * torch.randn(2, 5, DIM)
    torch.testing.assert_close(encoder.layer_norm(quiet), F.layer_norm(math.sqrt(DIM) * quiet, (DIM,)), rtol=1e-4, atol=1e-5)
    assert {m.momentum for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)} == {0.015}
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, DepthwiseConv)):
            fan_in = module.weight[0].numel()
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    bound, spread = fan_in**-0.5, parameter.abs().max()
                    assert 0.9 * bound < spread <= bound
                    assert abs(parameter.mean()) < 0.3 * bound
        elif isinstance(module, ScaleBias):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_layerdrop_keeps_both_changes_of_rate() -> None:
    """A skipped block passes its input on, at its own rate."""
    encoder = make_encoder(encoder_layerdrop=0.999).train()
    x = torch.randn(1, 27, DIM)
    entered = encoder.hidden_states(x)[0]
    recovered = encoder.time_recovery(encoder.time_reduction(entered, None))
    torch.testing.assert_close(encoder(x), entered + recovered.repeat_interleave(2, 1)[:, :27], rtol=1e-4, atol=1e-5)


def test_fused_model_equals_the_plain_one() -> None:
    model = hubert_eff.build("squeezeformer-debug")
    model.encoder.load_state_dict(make_encoder().state_dict())
    model.eval()
    fused = hubert_eff.fuse(model)
    wav = torch.randn(3, 16_000)
    padding = torch.arange(16_000) >= torch.tensor([16_000, 9_123, 400])[:, None]
    for a, b in zip(model.hidden_states(wav, padding)[0], fused.hidden_states(wav, padding)[0]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    kinds = (ScaleBias, nn.BatchNorm1d)
    assert not [m for m in fused.modules() if isinstance(m, kinds)]
    assert len([m for m in model.encoder.modules() if isinstance(m, kinds)]) == 5 * LAYERS
    again = hubert_eff.fuse(fused)
    assert torch.equal(again.hidden_states(wav)[0][-1], fused.hidden_states(wav)[0][-1])


PUBLISHED = {"xs": 9.0, "s": 18.6, "sm": 28.2, "m": 55.6, "ml": 125.1, "l": 236.3}  # Squeezeformer, table 2: million parameters


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_have_the_published_sizes(size: str) -> None:
    """The published count less what HuBERT does not have: subsampling (about 21 D^2) and the projection on 128 word pieces."""
    config = preset_config(f"squeezeformer-{size}")
    with torch.device("meta"):
        encoder = encoder_of(config).module(config)
    dim = config.encoder_embed_dim
    parameters = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("pos_conv"))
    assert parameters + 21 * dim**2 + 129 * dim == pytest.approx(PUBLISHED[size] * 1e6, rel=0.004)


def test_table1_variant_is_conformers_and_a_u_net() -> None:
    """Reduction and recovery are all that it has more than a Conformer."""
    squeezeformer, conformer = (
        {name: p.numel() for name, p in hubert_eff.build(f"{preset}-table1").named_parameters()}
        for preset in ("squeezeformer-xs", "conformer-s")
    )
    assert sum(squeezeformer.values()) == 33_010_096 and sum(conformer.values()) == 32_967_760
    assert {name: n for name, n in squeezeformer.items() if name not in conformer} == {
        "encoder.time_reduction.depthwise_conv.weight": 720,
        "encoder.time_reduction.pointwise_conv.weight": 20_736,
        "encoder.time_recovery.weight": 20_736,
        "encoder.time_recovery.bias": 144,
    }
    # of which 8 layers at 40 ms, the reduction and the recovery: the clean count of the paper's Table 1 at 10 s
    assert round(2 * hubert_eff.profile("squeezeformer-xs-table1", seconds=10.0).macs / 1e9, 2) == 31.33


def test_conformer_blocks_run_in_the_u_net() -> None:
    encoder = hubert_eff.build("squeezeformer-debug", layer_type="conformer", pos_enc_type="abs").encoder.eval()
    x = torch.randn(2, 27, DIM)
    padding = torch.arange(27) >= torch.tensor([27, 13])[:, None]
    states = encoder.hidden_states(x, padding)
    for together, alone in zip(states, encoder.hidden_states(x[1:, :13])):
        torch.testing.assert_close(together[1, :13], alone[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(states[2][0, 0:26:2], states[2][0, 1:27:2]) and not torch.equal(states[4][0, 0:26:2], states[4][0, 1:27:2])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"time_reduce_idx": 3}, "time_reduce_idx=3, time_recover_idx=3, encoder_layers=4: .*0 <= time_reduce_idx < time_recover_idx"),
        ({"time_reduce_idx": -1}, "time_reduce_idx=-1"),
        ({"time_recover_idx": 4}, "time_recover_idx=4, encoder_layers=4"),
        ({"encoder_layers": 3}, "time_recover_idx=3, encoder_layers=3"),
        ({"depthwise_conv_kernel_size": 16}, "depthwise_conv_kernel_size=16 must be odd"),
        ({"encoder_attention_heads": 5}, "does not divide encoder_embed_dim=64"),
        ({"pos_enc_type": "rope"}, "unknown value of pos_enc_type"),
        ({"layer_type": "transformer"}, "unknown value of layer_type"),
        ({"layer_norm_first": True}, "layer_norm_first=True: .*set it to false"),
        ({"reduce_idx": 1}, "did you mean 'time_reduce_idx'"),
    ],
)
def test_impossible_configurations_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        hubert_eff.build("squeezeformer-debug", **keys)
    assert "\n" not in str(error.value)
