"""Zipformer: the authors' numbers (golden files), schedules, gradient modifiers, stacks, long input, configurations."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.encoders import zipformer
from hubert_eff.encoders.base import Frames
from hubert_eff.encoders.zipformer import ZipformerBlock, ZipformerConfig, block_skip
from hubert_eff.errors import UserError
from hubert_eff.layers import scaling
from hubert_eff.layers import zipformer as zipformer_layers
from hubert_eff.layers import zipformer_attention as attention_weights
from hubert_eff.layers.activation import swoosh_l, swoosh_r
from hubert_eff.layers.scaling import Balancer, BiasNorm, Schedule, Whitener, limit_parameter, whitening_metric
from hubert_eff.layers.zipformer import (
    Bypass,
    FeedForward,
    NonlinearAttention,
    RateChange,
    SelfAttention,
    compact_positions,
    scaled_linear,
)

from ..helpers.paths import GOLDEN


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Arrays and note of a file of the authors' numbers."""
    path: Path = GOLDEN / f"{name}.npz"
    with np.load(path) as arrays:
        return {k: torch.from_numpy(v) for k, v in arrays.items()}, json.loads(path.with_suffix(".json").read_text())


# -- the authors' numbers ------------------------------------------------------------------------------------------------


def test_swoosh_is_the_authors() -> None:
    numbers, note = golden("zipformer_small_ops")
    for name, function in (("swooshl", swoosh_l), ("swooshr", swoosh_r)):
        for dtype in (torch.float64, torch.float32):
            x = numbers["x_f64"].to(dtype).detach().clone().requires_grad_()
            y = function(x)
            y.sum().backward()
            torch.testing.assert_close(y, numbers[f"{name}_y_f64"].to(dtype), **note["tol"])
            torch.testing.assert_close(x.grad, numbers[f"{name}_dydx_f64"].to(dtype), **note["tol"])
            torch.testing.assert_close(function(x.detach()), y.detach(), rtol=0, atol=0)
        torch.testing.assert_close(function(numbers["x_f64"].float()), numbers[f"{name}_icefall_eval"], rtol=1e-5, atol=2e-5)
        extreme = function(torch.tensor([-3e38, -1e4, 1e4, 3e38]))
        assert torch.isfinite(extreme).all()


def test_bias_norm_is_the_authors() -> None:
    numbers, note = golden("zipformer_small_ops")
    norm = BiasNorm(24).eval()
    norm.load_state_dict({"bias": numbers["bn_bias"], "log_scale": numbers["bn_log_scale"]})
    x = numbers["bn_x"].requires_grad_()
    y = norm(x)
    y.backward(numbers["bn_gy"])
    for ours, theirs in ((y, "bn_y"), (x.grad, "bn_gx"), (norm.bias.grad, "bn_gbias"), (norm.log_scale.grad, "bn_glog_scale")):
        torch.testing.assert_close(ours, numbers[theirs], rtol=1e-5, atol=2e-6)  # sums of 21 frames in another order


def test_limits_are_the_authors() -> None:
    numbers, note = golden("zipformer_small_ops")
    p = numbers["lpv_p"].requires_grad_()
    limit_parameter(p, -1.5, 1.5).backward(numbers["lpv_g"])
    torch.testing.assert_close(p.grad, numbers["lpv_gp"], rtol=0, atol=0)


def test_balancer_is_the_authors() -> None:
    numbers, note = golden("zipformer_balancer")
    for case, bounds in enumerate(note["configs"]):
        balancer = Balancer((bounds["min_positive"], bounds["max_positive"]), (bounds["min_abs"], bounds["max_abs"]), rate=1.0)
        x, grad = numbers[f"c{case}_x"].requires_grad_(), numbers[f"c{case}_gy"]
        y = balancer(x)
        y.backward(grad)
        assert torch.equal(y, x)
        torch.testing.assert_close(x.grad, numbers[f"c{case}_gx"], rtol=1e-4, atol=2e-5)
        assert case == 0 or (x.grad - grad).abs().max() > 1e-3  # the first case is within its bounds
        assert balancer.eval()(x) is x


def test_whitener_is_the_authors() -> None:
    numbers, note = golden("zipformer_whiten")
    for case, keys in enumerate(note["configs"]):
        whitener = Whitener(keys["limit"], keys["grad_scale"], keys["num_groups"])
        whitener.rate = 1.0
        x, grad = numbers[f"c{case}_x"].requires_grad_(), numbers[f"c{case}_gy"]
        y = whitener(x)
        y.backward(grad)
        assert torch.equal(y, x)
        torch.testing.assert_close(x.grad, numbers[f"c{case}_gx"], rtol=1e-4, atol=2e-5)
        metric = whitening_metric(x, groups=keys["num_groups"])
        torch.testing.assert_close(metric, numbers[f"c{case}_metric"], rtol=1e-4, atol=2e-5)
        assert whitener.rate == Whitener.RATES[keys["metric"] >= keys["limit"]]
        assert whitener.eval()(x) is x


STAGES = ("feed_forward1", "nonlin_attention", "self_attn1", "conv_module1", "feed_forward2", "bypass_mid", "self_attn2",
          "conv_module2", "feed_forward3", "norm", "bypass")  # fmt: skip


def test_block_is_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of a block, its output and its gradients, with padding; in blocks of five queries and in one."""
    numbers, note = golden("zipformer_layer")
    keys = note["config"]
    config = ZipformerConfig(
        encoder_layers=1, encoder_embed_dim=24, encoder_ffn_embed_dim=32, encoder_attention_heads=4, conv_pos_groups=4,
        zipformer_layers="1", zipformer_dims="24", zipformer_ffn_dims="32", zipformer_heads="4", zipformer_kernels="7", zipformer_rates="1",
        zipformer_query_dim=keys["query_head_dim"], zipformer_value_dim=keys["value_head_dim"],
        zipformer_position_dim=keys["pos_head_dim"], zipformer_table_dim=keys["pos_dim"],
    )  # fmt: skip
    block = ZipformerBlock(config, config.stacks[0], block_skip(config, 0)).eval()
    theirs = {k.removeprefix("param."): v for k, v in numbers.items() if k.startswith("param.") and k != "param.bypass_scale"}
    block.load_state_dict(theirs)  # the names are the authors' too; `bypass_scale` of the layer itself is used nowhere
    torch.testing.assert_close(compact_positions(17, keys["pos_dim"], torch.empty(())), numbers["pos_emb"][0], rtol=1e-5, atol=1e-6)

    valid = ~numbers["pad_mask"]
    frames = Frames(valid, valid[:, None, None], numbers["pos_emb"][0])
    for size in (5, 256):
        monkeypatch.setattr(attention_weights, "BLOCK", size)
        twin = copy.deepcopy(block)
        stages: dict[str, Tensor] = {}
        for name in (*STAGES, "self_attn_weights"):
            twin.get_submodule(name).register_forward_hook(lambda m, i, out, name=name, into=stages: into.update({name: out}))
        x = numbers["x"].transpose(0, 1).requires_grad_()  # (B, T, C)
        y = twin(x, frames)
        y.backward(numbers["gy"].transpose(0, 1))
        heads = torch.cat([part.view(-1, 2, 17, 17) for part in stages.pop("self_attn_weights").parts])
        torch.testing.assert_close(heads, numbers["stage.self_attn_weights"], **note["tol"])
        for name, stage in stages.items():
            torch.testing.assert_close(stage.transpose(0, 1), numbers[f"stage.{name}"], **note["tol"])
        torch.testing.assert_close(y.transpose(0, 1), numbers["y"], **note["tol"])
        torch.testing.assert_close(x.grad.transpose(0, 1), numbers["gx"], **note["tol"])
        given = {k.removeprefix("grad."): v for k, v in numbers.items() if k.startswith("grad.")}
        assert len(given) > 30
        for name, grad in given.items():
            torch.testing.assert_close(twin.get_parameter(name).grad, grad, **note["tol"])


def test_penalty_on_scores_is_the_authors() -> None:
    numbers, note = golden("zipformer_small_ops")
    scores = torch.cat((numbers["pen_x"], torch.zeros(1, 5))).unsqueeze(0).requires_grad_()  # as queries, with unit vectors as keys
    nothing = torch.zeros(1, 5, 2), torch.zeros(1, 9, 2)
    weights = attention_weights._Weights.apply(scores, torch.eye(5).unsqueeze(0), *nothing, None, True)
    weights.backward(torch.zeros_like(weights))
    torch.testing.assert_close(scores.grad[0, :4], numbers["pen_gx"] - numbers["pen_g"], rtol=1e-3, atol=1e-7)


# -- gradient modifiers and schedules ------------------------------------------------------------------------------------


def padded(*shape: int) -> tuple[Tensor, Tensor]:
    """Frames (2, 12, ...), the second row of which has five valid ones and noise behind them."""
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 5:] = False
    return torch.randn(2, 12, *shape), valid


@pytest.mark.parametrize("modifier", [Balancer((0.45, 0.55), (0.2, 0.5), rate=1.0), Whitener(1.2, 0.01, groups=2)])
def test_gradient_modifiers_leave_padding_out(modifier: Balancer | Whitener) -> None:
    x, valid = padded(8)
    x = x * torch.linspace(0.1, 3, 8) + 1
    grad = torch.randn_like(x).masked_fill(~valid.unsqueeze(-1), 0.0)
    grads = []
    for noise in (0.0, 100.0):
        leaf = torch.where(valid.unsqueeze(-1), x, noise).requires_grad_()
        modifier.rate = 1.0
        modifier(leaf, valid).backward(grad)
        grads.append(leaf.grad)
    packed = x[valid].requires_grad_()
    modifier.rate = 1.0
    modifier(packed).backward(grad[valid])
    assert torch.equal(*grads) and not grads[0][~valid].any()
    assert not torch.allclose(grads[0], grad)
    torch.testing.assert_close(grads[0][valid], packed.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 12])
@pytest.mark.parametrize("level", [0.0, 1e-12, 3.0])
def test_gradient_modifiers_stand_constant_channels(frames: int, level: float) -> None:
    for modifier in (Balancer((0.45, 0.55), (0.2, 4.0), rate=1.0), Balancer((0.3, 0.7), (0.0, 2.0), rate=1.0), Whitener(1.0, 0.01)):
        modifier.rate = 1.0
        x = torch.full((2, frames, 8), level).requires_grad_()
        modifier(x).backward(torch.randn(2, frames, 8))
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 10


def test_schedules() -> None:
    schedule = Schedule(((100, 0.5), (200, 0.1), (1_000, 0.0)))
    assert [schedule.at(n) for n in (0, 100, 150, 200, 600, 5_000)] == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.05, 0.0])
    assert schedule.at(None) == 0.0 and Schedule(((0, 1.0), (10, 0.25)), unset=0.0).at(None) == 0.0
    config = hubert_eff.registry.preset_config("zipformer-s")
    first, last = block_skip(config, 0), block_skip(config, 11)
    seventh = 4_000 / 7
    assert [first.at(n) for n in (0, seventh, 1.5 * seventh, 4_000)] == pytest.approx([0.5, 0.5, 0.035, 0.035])
    assert [last.at(n) for n in (6.5 * seventh, 6.75 * seventh, 4_000)] == pytest.approx([0.5, (0.5 + 0.035 * 2**0.5) / 2, 0.035 * 2**0.5])
    assert first.at(None) == 0.0
    model = hubert_eff.build("zipformer-debug")
    block = model.encoder.layers[1]
    assert block.feed_forward2.update is None
    model.set_num_updates(2_000)
    assert block.feed_forward2.update == block.bypass.update == model.encoder.rate_changes[2].bypass.update == 2_000
    low, high = block.nonlin_attention.balancer.positive
    assert (low.at(10_000), high.at(10_000)) == pytest.approx((0.15, 0.85))
    assert block.bypass.now(block.bypass.MINIMUM) == pytest.approx(0.83)


@pytest.mark.parametrize(
    ("update", "attention", "feed_forward", "bypass", "uniform", "positions", "balancers"),
    [
        (0, 0.2, 0.1, 0.5, 0.25, 0.5, 0.5),
        (4_000, 0.05, 0.01, 0.035 * 2**0.5, 0.025, 0.0, 0.3125),
        (10_000, 0.025, 0.01 * 40 / 46, 0.035 * 2**0.5, 0.025, 0.0, 0.125),
        (50_000, 0.0, 0.0, 0.035 * 2**0.5, 0.025, 0.0, 0.125),
        (None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.125),
    ],
)
def test_what_a_block_draws_follows_the_updates(
    update: int | None, attention: float, feed_forward: float, bypass: float, uniform: float, positions: float, balancers: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every share of sequences and of batches that a block asks for, in the order it does."""
    shares: list[float] = []
    batches: dict[str, list[float]] = {"block": [], "modules": [], "limits": []}

    def skipped(x: Tensor, rate: float) -> Tensor:
        shares.append(rate)
        return x

    for module in (zipformer, zipformer_layers):
        monkeypatch.setattr(module, "skipped", skipped)
    for name, module in (("block", zipformer), ("modules", zipformer_layers), ("limits", scaling)):
        monkeypatch.setattr(module, "chance", lambda rate, name=name: batches[name].append(rate))
    encoder = hubert_eff.build("zipformer-debug").encoder
    if update is not None:
        encoder.set_num_updates(update)
    x = torch.randn(1, 5, 64, requires_grad=True)
    encoder.layers[1](x, Frames(positions=compact_positions(5, 24, x)))
    expected = [attention, attention, feed_forward, 0.0, attention, feed_forward, bypass]  # the fourth: the bypass in the middle
    assert shares == pytest.approx(expected)
    assert batches["block"] == pytest.approx([uniform])
    # positions, scores beyond their limit, scales of the two bypasses
    assert batches["modules"] == pytest.approx([positions, 0.1, 0.6, 0.6])
    # four balancers are rare, ten have the usual schedule; then the whiteners, and the scale of the norm
    limits = [0.025, *3 * [0.05], *10 * [balancers], *11 * [0.25], 0.6]
    assert sorted(batches["limits"]) == pytest.approx(sorted(limits))


def test_dropout_of_feed_forward_modules_falls_and_is_shared_over_time() -> None:
    module = FeedForward(256, 4_096, dropout=0.1, activation_dropout=0.0)
    seen: dict[str, Tensor] = {}
    module.out_proj.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    x = torch.randn(2, 3, 256)
    for update, rate in ((0, 0.3), (10_000, 0.2), (20_000, 0.1), (None, 0.1)):
        module.update = update
        module(x)
        dropped = seen["x"] == 0
        assert torch.equal(dropped[:, :1].expand_as(dropped), dropped)
        assert not torch.equal(dropped[0], dropped[1])
        assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.02)
    assert FeedForward(8, 8, 0.0, 0.0).dropout.at(0) == 0.0 and FeedForward(8, 8, 0.5, 0.0).dropout.at(0) == 0.9


def test_every_parameter_has_a_gradient_whatever_is_skipped() -> None:
    """Data-parallel processes may draw differently: none may leave a parameter out. Draws repeat with the seed, and when recomputed."""
    x, valid = padded(48)

    def gradients(seed: int, recompute: bool = False) -> Tensor:
        torch.manual_seed(0)
        encoder = hubert_eff.build("zipformer-debug", dropout=0.1, attention_dropout=0.1, checkpoint_activations=recompute).encoder
        encoder.set_num_updates(0)
        torch.manual_seed(seed)
        encoder(x, ~valid).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    runs = [gradients(seed) for seed in range(6)]
    for seed, run in enumerate(runs):
        torch.testing.assert_close(gradients(seed, recompute=True), run, rtol=1e-4, atol=1e-5)
        assert seed == 0 or not torch.allclose(run, runs[0])
    assert torch.equal(gradients(0), runs[0])


def test_skips_early_in_training() -> None:
    """At update 0 half of the sequences do without a block; once the schedules are over, and in eval mode, none."""
    encoder = hubert_eff.build("zipformer-debug", dropout=0.0).encoder
    block, x = encoder.layers[0], torch.randn(400, 2, 48)
    frames = Frames(positions=compact_positions(2, 24, x))
    encoder.set_num_updates(0)
    with torch.no_grad():
        assert 0.4 < float((block(x, frames) == x).all(-1).all(-1).float().mean()) < 0.6
        encoder.set_num_updates(100_000)
        assert 0.0 < float((block(x, frames) == x).all(-1).all(-1).float().mean()) < 0.1
        assert not (block.eval()(x, frames) == x).all(-1).any()


# -- modules -------------------------------------------------------------------------------------------------------------


def test_shared_weights_are_softmax_of_content_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, mixtures and gradients against the definition, kept or computed anew, whole or in blocks of queries."""
    batch, heads, frames = 2, 3, 7
    q, k, p = (torch.randn(batch, heads, frames, d, requires_grad=True) for d in (5, 5, 2))
    offsets = torch.randn(heads, 2 * frames - 1, 2, requires_grad=True)
    values = torch.randn(batch, heads, frames, 4, requires_grad=True)
    seen = torch.ones(batch, frames, dtype=torch.bool)
    seen[1, 4:] = False
    place = torch.arange(frames)[None] - torch.arange(frames)[:, None] + frames - 1  # j - i + T - 1
    scores = q @ k.mT + torch.einsum("bhie,hije->bhij", p, offsets[:, place])
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    direction = torch.randn(batch, heads, frames, 4)
    leaves = (q, k, p, offsets, values)
    off = hubert_eff.layers.dropout.Dropout(0.0)
    expected = torch.autograd.grad(((weights @ values * direction).sum() + (weights[:, :1] @ values[:, 1:2]).sum()), leaves)
    for block in (3, 256):
        monkeypatch.setattr(attention_weights, "BLOCK", block)
        ours = attention_weights.RelativeWeights(q, k, p, offsets, seen[:, None], off)
        mixed, first = ours.mix(values), ours.mix(values[:, 1:2])
        torch.testing.assert_close(mixed, weights @ values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first, weights[:, :1] @ values[:, 1:2], rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad((mixed * direction).sum() + first.sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(attention_weights, "KEPT", 0)
        with torch.no_grad():
            anew = attention_weights.RelativeWeights(q, k, p, offsets, seen[:, None], off)
            assert not anew.parts
            torch.testing.assert_close(anew.mix(values), mixed, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(anew.mix(values[:, 1:2]), first, rtol=1e-5, atol=1e-6)
        monkeypatch.setattr(attention_weights, "KEPT", 1 << 26)


def test_penalty_leaves_padding_out() -> None:
    q, k = (10 * torch.randn(1, 6, 5) for _ in range(2))
    seen = torch.tensor([[True] * 4 + [False] * 2])
    q.requires_grad_()
    k.requires_grad_()
    weights = attention_weights._Weights.apply(q, k, torch.zeros(1, 6, 2), torch.zeros(1, 11, 2), seen[:, None], True)
    weights.backward(torch.zeros_like(weights))
    assert q.grad[0, :4].any() and k.grad[0, :4].any() and not q.grad[0, 4:].any() and not k.grad[0, 4:].any()


def test_uniform_attention_is_the_mean_of_what_may_be_seen() -> None:
    module = NonlinearAttention(16).eval()
    x, real = padded(16)
    equal = torch.zeros(2, 1, 12, 3)
    for valid, seen in ((None, None), (real, real[:, None])):
        weights = attention_weights.RelativeWeights(
            equal, equal, equal, torch.zeros(1, 23, 3), seen, hubert_eff.layers.dropout.Dropout(0.0)
        )
        torch.testing.assert_close(module(x, weights, valid, seen, uniform=True), module(x, weights, valid, seen), rtol=1e-5, atol=1e-6)


def test_change_of_rate() -> None:
    change = RateChange(3, 4).eval()
    torch.nn.init.normal_(change.log_shares)
    shares = change.log_shares.softmax(0)
    x = torch.randn(1, 6, 3)
    held = torch.cat((x, x[:, -1:], x[:, -1:]), dim=1)  # the last frame fills the last group
    expected = torch.stack([sum(share * held[:, 4 * i + j] for j, share in enumerate(shares)) for i in range(2)], dim=1)
    torch.testing.assert_close(change.down(x), expected)
    valid = torch.tensor([[True] * 6 + [False] * 5])
    longer = torch.cat((x, torch.full((1, 5, 3), 1e3)), dim=1)
    torch.testing.assert_close(change.down(longer, valid)[:, :2], expected)
    torch.testing.assert_close(change.up(expected, x), 0.5 * x + 0.5 * expected.repeat_interleave(4, 1)[:, :6])
    same = RateChange(3, 1)
    assert same.down(x) is x and same.up(x, x) is x and not list(same.parameters())


def test_initial_scales() -> None:
    torch.manual_seed(0)
    layer = scaled_linear(400, 300, 0.05)
    assert float(layer.weight.detach().abs().max()) == pytest.approx(0.05 * 400**-0.5, rel=1e-2)
    assert 0.0045 < float(layer.bias.detach().abs().max()) <= 0.005
    block = hubert_eff.build("zipformer-s").encoder.layers[4]
    for name, bound in (
        ("self_attn1.out_proj", 0.05 * 48**-0.5), ("feed_forward3.out_proj", 0.1 * 960**-0.5), ("conv_module2.out_proj", 0.05 / 16),
        ("nonlin_attention.out_proj", 0.05 * 192**-0.5), ("self_attn_weights.linear_pos", 0.05 * 48**-0.5),
        ("self_attn_weights.in_proj", 32**-0.25 / 16), ("feed_forward1.in_proj", 1 / 16),
    ):  # fmt: skip
        assert float(block.get_submodule(name).weight.detach().abs().max()) == pytest.approx(bound, rel=1e-2), name
    assert (block.norm.log_scale.item(), block.bypass.bypass_scale.mean().item()) == (1.0, 0.5)
    assert 1e-5 < float(block.norm.bias.abs().mean()) < 1e-3
    assert isinstance(block.self_attn2, SelfAttention) and isinstance(block.bypass_mid, Bypass)


# -- encoder -------------------------------------------------------------------------------------------------------------


def test_states_have_the_channels_of_the_most_recent_wider_stack() -> None:
    encoder = hubert_eff.build(
        "zipformer-debug", encoder_layers=4, zipformer_layers="1,2,1", zipformer_dims="48,64,32", conv_pos_groups=4,
    ).eval().encoder  # fmt: skip
    x = torch.randn(1, 13, 48)
    with torch.no_grad():
        states = encoder.hidden_states(x)
        first = encoder.layers[0](states[0][..., :48], Frames(positions=compact_positions(13, 24, x)))
        change, frames = encoder.rate_changes[1], Frames(positions=compact_positions(7, 24, x))
        before = torch.nn.functional.pad(first, (0, 16))
        half = encoder.layers[1](change.down(before), frames)
        second = change.up(encoder.layers[2](half, frames), before)
        change = encoder.rate_changes[2]
        last = encoder.layers[3](change.down(second[..., :32]), Frames(positions=compact_positions(4, 24, x)))
        last = change.up(last, second[..., :32])
    expected = [before, half.repeat_interleave(2, 1)[:, :13], second, torch.cat((last, second[..., 32:]), -1)]
    assert not states[0][..., 48:].any()
    for state, right in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(state, right, rtol=1e-5, atol=1e-6)
    for layer in range(1, 5):
        assert torch.equal(encoder(x, layer=layer), states[layer])
    wide = torch.cat((x, torch.randn(1, 13, 16)), dim=-1)
    assert torch.equal(encoder(wide), states[-1])  # surplus channels are cut


def test_sizes_are_the_papers() -> None:
    """Encoder without the positional convolution; the authors' S has 21.4 million parameters without their subsampling, M 63.4."""
    for preset, millions in (("zipformer-s", 21.4), ("zipformer-m", 63.4), ("zipformer-l", 146.0)):
        with torch.device("meta"):
            encoder = hubert_eff.build(preset).encoder
        count = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("pos_conv"))
        assert count / 1e6 == pytest.approx(millions, abs=0.1), preset


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"zipformer_dims": "48,64"}, "zipformer_dims='48,64' has 2 numbers, but zipformer_layers has 3"),
        ({"zipformer_dims": "48,64,a"}, "zipformer_dims='48,64,a' must be whole numbers"),
        ({"zipformer_rates": "1,2,-4"}, "must be whole numbers"),
        ({"zipformer_rates": "1,2,4.0"}, "must be whole numbers"),
        ({"zipformer_rates": "1,2,"}, "must be whole numbers"),
        ({"zipformer_rates": "1,0,4"}, "every number must be at least 1"),
        ({"zipformer_layers": "1,2,1"}, "encoder_layers=3 must be 4, the sum of zipformer_layers='1,2,1'"),
        ({"zipformer_dims": "48,96,48"}, "encoder_embed_dim=64 must be 96, the maximum of"),
        ({"encoder_ffn_embed_dim": 256}, "encoder_ffn_embed_dim=256 must be 128"),
        ({"encoder_attention_heads": 8}, "encoder_attention_heads=8 must be 4"),
        ({"zipformer_kernels": "15,14,7"}, "14 must be odd"),
        ({"zipformer_dims": "48,64,46"}, "46 must be a multiple of 4"),
        ({"zipformer_ffn_dims": "96,128,90"}, "90 must be a multiple of 4"),
        ({"zipformer_table_dim": 25}, "must be even"),
        ({"zipformer_value_dim": 0}, "must be at least 1"),
        ({"conv_pos_groups": 5}, "does not divide the encoder's input width=48"),
    ],
)
def test_impossible_stacks_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hubert_eff.build("zipformer-debug", **keys)
    assert "\n" not in str(caught.value)
