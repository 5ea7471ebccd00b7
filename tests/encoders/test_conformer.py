"""The Conformer block by block: torchaudio's, fairseq's relative attention, masked BatchNorm."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.utils.checkpoint import checkpoint

import hubert_eff
from hubert_eff.encoders.base import Frames
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.layers.attention import RelativeSelfAttention
from hubert_eff.layers.convolution import DepthwiseConv
from hubert_eff.layers.norm import MaskedBatchNorm, NoNorm, once_tracked
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


@pytest.mark.parametrize("frames", [49, 300])
def test_blocks_equal_transformers_relative_conformer(frames: int) -> None:
    """Copied weights, all frames valid: transformers' convolution has no mask."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as hf

    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, conv_depthwise_kernel_size=15, hidden_act="swish",
        position_embeddings_type="relative", max_source_positions=500,
    )  # fmt: skip
    theirs = torch.nn.ModuleList([hf.Wav2Vec2ConformerEncoderLayer(config) for _ in range(3)]).eval()
    model = hubert_eff.build("conformer-debug", encoder_layers=3).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for buffer in theirs.buffers():
        buffer.data = buffer.uniform_(0.5, 2) if buffer.is_floating_point() else buffer
    names = {
        "ffn1_layer_norm": "ffn1.layer_norm", "ffn2_layer_norm": "ffn2.layer_norm", "intermediate_dense": "w_1", "output_dense": "w_2",
        "linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_out": "out_proj",
    }  # fmt: skip
    shapes = model.encoder.layers.state_dict()
    state = {}
    for name, value in theirs.state_dict().items():
        for other, ours in names.items():
            name = name.replace(other, ours)
        state[name] = value.view(shapes[name].shape)  # pointwise convolutions are linear layers here
    model.encoder.layers.load_state_dict(state)
    x = torch.randn(2, frames, 64, requires_grad=True)
    positions = hf.Wav2Vec2ConformerRelPositionalEmbedding(config)(x)
    expected = y = x
    for layer, block in zip(theirs, model.encoder.layers):
        expected, _ = layer(expected, relative_position_embeddings=positions)
        y = block(y, model.encoder.frames(x))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for block in model.encoder.layers:
            x = block(x, model.encoder.frames(x))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("conformer-s", (16, 144, 4, 576, "rel_pos")),
        ("conformer-m", (16, 256, 4, 1024, "rel_pos")),
        ("conformer-l", (17, 512, 8, 2048, "rel_pos")),
        ("conformer-s-table1", (16, 144, 4, 3072, "abs")),
        ("conformer-s-ffn1024", (16, 144, 4, 1024, "abs")),
    ],
)
def test_presets_are_the_papers(preset: str, sizes: tuple) -> None:
    c = preset_config(preset)
    assert (c.encoder_layers, c.encoder_embed_dim, c.encoder_attention_heads, c.encoder_ffn_embed_dim, c.pos_enc_type) == sizes


def test_table1_has_the_papers_number_of_parameters() -> None:
    assert sum(p.numel() for p in hubert_eff.build("conformer-s-table1").parameters()) == 32_967_760


@pytest.mark.parametrize(("norm", "kind"), [("none", None), ("batch_norm", MaskedBatchNorm)])
def test_layer_norms_are_replaced_or_removed(norm: str, kind: type | None) -> None:
    with_layer_norms, model = hubert_eff.build("conformer-debug"), hubert_eff.build("conformer-debug", block_norm=norm)
    replaced = [name for name, m in with_layer_norms.encoder.layers.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(replaced) == 2 * 5
    for name in replaced:
        assert type(model.encoder.layers.get_submodule(name)) is (kind or NoNorm)
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in model.encoder.modules())


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_is_sealed_without_layer_norm(norm: str, training: bool) -> None:
    model = hubert_eff.build("conformer-debug", block_norm=norm, dropout=0.0, attention_dropout=0.0).train(training)
    other = copy.deepcopy(model)
    wav, padding = torch.randn(2, 16_000), torch.zeros(2, 16_000, dtype=torch.bool)
    padding[1, 9_000:] = True
    noisy = torch.where(padding, 100.0, wav)
    for a, b in zip(model.hidden_states(wav, padding)[0], other.hidden_states(noisy, padding)[0]):
        assert torch.equal(a, b)
    for a, b in zip(model.buffers(), other.buffers()):
        assert torch.equal(a, b)
    model.hidden_states(wav, padding)[0][-1].square().sum().backward()
    assert all(p.grad is not None for name, p in model.encoder.named_parameters())


def test_layer_norm_first_needs_a_layer_norm() -> None:
    with pytest.raises(UserError, match="layer_norm_first=True: with block_norm=none"):
        hubert_eff.build("conformer-debug", block_norm="none", layer_norm_first=True)


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


@pytest.mark.parametrize("valid", [None, torch.tensor([[True]]), torch.tensor([[False]])])
def test_masked_batch_norm_of_one_frame_and_of_none(valid: torch.Tensor | None) -> None:
    norm = MaskedBatchNorm(5)
    x = torch.randn(1, 1, 5, requires_grad=True)
    norm(x, valid).sum().backward()
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(b).all() for b in norm.buffers())


@pytest.mark.parametrize("frames", [1, 7])  # one frame has no variance, and takes another path
def test_recomputed_statistics_are_tracked_once(frames: int) -> None:
    norm, x = MaskedBatchNorm(5), torch.randn(1, frames, 5, requires_grad=True)
    checkpoint(norm, x, None, use_reentrant=False, context_fn=partial(once_tracked, norm)).square().sum().backward()
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean((0, 1)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_masked_batch_norm_compiles_in_training(dtype: torch.dtype, tolerance: float) -> None:
    x, valid, state = norm_case()
    x = x.to(dtype)
    torch.compiler.reset()
    outputs = []
    for compiled in (False, True):
        norm = MaskedBatchNorm(5).to(dtype)
        norm.load_state_dict(state)
        function = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
        outputs.append((function(x, valid)[valid], *norm.state_dict().values()))
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


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
