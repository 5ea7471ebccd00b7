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
from hubert_eff.encoders.base import Frames
from hubert_eff.encoders.zipformer import ZipformerBlock, ZipformerConfig, block_skip
from hubert_eff.errors import UserError
from hubert_eff.layers import weights as attention_weights
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

from .conftest import ROOT

GOLDEN = ROOT.parent / "shared" / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Arrays and note of a golden file; the test is skipped where it is absent."""
    path: Path = GOLDEN / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"the authors' numbers are not at {GOLDEN}")
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
            twin.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: stages.update({name: out}))
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
