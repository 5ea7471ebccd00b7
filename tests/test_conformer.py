"""The Conformer block by block: torchaudio's, fairseq's relative attention, masked BatchNorm."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

import hubert_eff
from hubert_eff.encoders.base import Frames
from hubert_eff.layers.attention import RelativeSelfAttention
from hubert_eff.layers.convolution import DepthwiseConv
from hubert_eff.layers.norm import MaskedBatchNorm
from hubert_eff.layers.position import relative_sinusoids


def test_blocks_equal_torchaudio() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    theirs = torchaudio.models.Conformer(64, 4, 128, 3, 15).eval()
    ours = hubert_eff.build("conformer-debug", encoder_layers=3, pos_enc_type="abs", conv_module_bias=True).eval().encoder.layers
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for layer, block in zip(theirs.conformer_layers, ours):
        conv = layer.conv_module.sequential
        conv[3].running_mean.normal_()
        conv[3].running_var.uniform_(0.5, 2)
        state = {}
        for name, ff in (("ffn1", layer.ffn1), ("ffn2", layer.ffn2)):
            for ours_name, index in (("layer_norm", 0), ("w_1", 1), ("w_2", 4)):
                state.update({f"{name}.{ours_name}.{k}": v for k, v in ff.sequential[index].state_dict().items()})
        for name, part in zip("qkv", layer.self_attn.in_proj_weight.chunk(3)):
            state[f"self_attn.{name}_proj.weight"] = part
        for name, part in zip("qkv", layer.self_attn.in_proj_bias.chunk(3)):
            state[f"self_attn.{name}_proj.bias"] = part
        for ours_name, module in (
            ("self_attn.out_proj", layer.self_attn.out_proj),
            ("self_attn_layer_norm", layer.self_attn_layer_norm),
            ("final_layer_norm", layer.final_layer_norm),
            ("conv_module.layer_norm", layer.conv_module.layer_norm),
            ("conv_module.depthwise_conv", conv[2]),
            ("conv_module.batch_norm", conv[3]),
        ):
            state.update({f"{ours_name}.{k}": v for k, v in module.state_dict().items()})
        for ours_name, module in (("conv_module.pointwise_conv1", conv[0]), ("conv_module.pointwise_conv2", conv[5])):
            state[f"{ours_name}.weight"], state[f"{ours_name}.bias"] = module.weight.squeeze(-1), module.bias
        block.load_state_dict(state)
    x = torch.randn(2, 50, 64)
    y = x
    for block in ours:
        y = block(y, Frames())
    torch.testing.assert_close(y, theirs(x, torch.tensor([50, 50]))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 127, 128, 129, 300])
def test_relative_attention_equals_its_definition(frames: int) -> None:
    """score[i, j] = ((q_i + u) k_j + (q_i + v) p_{i-j}) / sqrt(d), written out with one product per pair; outputs and gradients."""
    attention = RelativeSelfAttention(32, 4)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(2, frames, 32, requires_grad=True)
    attend = torch.ones(2, 1, 1, frames, dtype=torch.bool)
    attend[1, ..., frames // 2 + 1 :] = False
    table = relative_sinusoids(frames, 32, x)
    y = attention(x, table, attend)
    q, k, v = attention.heads_of(x)
    p = attention.linear_pos(table).view(-1, 4, 8)
    offset = torch.arange(frames)[:, None] - torch.arange(frames)  # i - j; row of offset o is T - 1 - o
    pairs = p[frames - 1 - offset]  # (T, T, H, d)
    score = (q + attention.pos_bias_u[:, None]) @ k.transpose(-1, -2)
    score = score + torch.einsum("bhid,ijhd->bhij", q + attention.pos_bias_v[:, None], pairs)
    probs = (score / 8**0.5).masked_fill(~attend, float("-inf")).softmax(-1)
    expected = attention.out_proj((probs @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    wanted = [x, *attention.parameters()]
    for a, b in zip(torch.autograd.grad(y, wanted, weight), torch.autograd.grad(expected, wanted, weight)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_relative_attention_equals_fairseq() -> None:
    pytest.importorskip("fairseq")
    from fairseq.modules.espnet_multihead_attention import RelPositionMultiHeadedAttention
    from fairseq.modules.positional_encoding import RelPositionalEncoding

    theirs, ours = RelPositionMultiHeadedAttention(32, 4, 0.0, zero_triu=False).eval(), RelativeSelfAttention(32, 4).eval()
    state = {"pos_bias_u": theirs.pos_bias_u, "pos_bias_v": theirs.pos_bias_v, "linear_pos.weight": theirs.linear_pos.weight}
    for name, key in (("q_proj", "linear_q"), ("k_proj", "linear_k"), ("v_proj", "linear_v"), ("out_proj", "linear_out")):
        state.update({f"{name}.{k}": v for k, v in getattr(theirs, key).state_dict().items()})
    ours.load_state_dict(state)
    x = torch.randn(150, 2, 32)  # (T, B, D), as fairseq wants it
    table = RelPositionalEncoding(200, 32)(x)
    torch.testing.assert_close(table.squeeze(1), relative_sinusoids(150, 32, x), rtol=1e-4, atol=1e-4)
    expected, _ = theirs(x, x, x, table)
    torch.testing.assert_close(ours(x.transpose(0, 1), table.squeeze(1)), expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_depthwise_convolution_equals_conv1d() -> None:
    ours, theirs = DepthwiseConv(6, 5, bias=True), torch.nn.Conv1d(6, 6, 5, padding=2, groups=6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 6)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


def packed_reference(x: torch.Tensor, valid: torch.Tensor, state: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Output, input gradient and state of nn.BatchNorm1d on the packed valid frames."""
    norm = torch.nn.BatchNorm1d(x.size(-1))
    norm.load_state_dict(state)
    x = x.clone().requires_grad_()
    y = norm(x[valid])
    (y**3).sum().backward()
    return y.detach(), x.grad, norm.state_dict()


def norm_case() -> tuple[torch.Tensor, torch.Tensor, dict]:
    torch.manual_seed(0)
    norm = MaskedBatchNorm(5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(4, 30, 5) * 2 + 1
    valid = torch.arange(30) < torch.tensor([[30], [11], [1], [25]])
    return x, valid, norm.state_dict()


def test_masked_batch_norm_equals_packed_frames() -> None:
    x, valid, state = norm_case()
    norm = MaskedBatchNorm(5)
    norm.load_state_dict(state)
    y, grad, after = packed_reference(x, valid, state)
    x = x.clone().requires_grad_()
    out = norm(x, valid)[valid]
    (out**3).sum().backward()
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, grad, rtol=1e-3, atol=1e-4)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-4, atol=1e-5)


def _half_of_the_batch(rank: int, port_file: str, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    x, valid, state = norm_case()
    norm = MaskedBatchNorm(5)
    norm.load_state_dict(state)
    rows = slice(0, 3) if rank == 0 else slice(3, 4)
    x = x[rows].clone().requires_grad_()
    out = norm(x, valid[rows])
    (out[valid[rows]] ** 3).sum().backward()
    results[rank] = (x.grad, {k: v.clone() for k, v in norm.state_dict().items()})
    dist.destroy_process_group()


def test_batch_norm_joins_statistics_of_two_processes(tmp_path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_half_of_the_batch, (str(tmp_path / "port"), results), nprocs=2)
        halves = [results[rank] for rank in range(2)]
    _, grad, after = packed_reference(*norm_case())
    torch.testing.assert_close(torch.cat([g for g, _ in halves]), grad, rtol=1e-3, atol=1e-4)
    for _, state in halves:
        for name, value in state.items():
            torch.testing.assert_close(value, after[name], rtol=1e-4, atol=1e-5)
