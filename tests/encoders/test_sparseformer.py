"""Sparse attention against dense attention under the mask it stands for, its memory, and the encoder's configuration."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.layers import sparse, sparse_pattern
from hubert_eff.layers.dropout import Dropout
from hubert_eff.layers.flex import sparse_flex, takes_flex, tiles
from hubert_eff.layers.sparse import SparsePattern, SparseSelfAttention, sparse_attention

PATTERNS = [SparsePattern(kind, l, c, w) for kind in ("fixed", "fairseq", "local") for l, c, w in ((8, 3, 5), (8, 7, 1), (5, 1, 200))]
LENGTHS = {l: sorted({1, 2, l - 1, l, l + 1, 2 * l, 2 * l + 1, 3 * l + 5, 161}) for l in (5, 8)}


def name(pattern: SparsePattern) -> str:
    return f"{pattern.kind}-{pattern.stride}-{pattern.expressivity}-{pattern.window}"


def definition(pattern: SparsePattern, frames: int) -> torch.Tensor:
    """(T, T) bool, True = seen: the pattern as it is written down, one pair at a time."""
    l, c = pattern.stride, pattern.expressivity

    def seen(i: int, j: int) -> bool:
        if pattern.kind == "local":
            return abs(i - j) <= pattern.window
        if pattern.kind == "fixed":
            return i // l == j // l or j % l >= l - c
        block = [max(0, -(-x // l) - 1) for x in (i, j)]  # frames 0 ... l, then l + 1 ... 2 l, and so on
        return block[0] == block[1] or (j > 0 and (j - 1) % l >= l - c - 1) or (j > 0 and j == block[0] * l)

    return torch.tensor([[seen(i, j) for j in range(frames)] for i in range(frames)])


def inputs(frames: int, dtype: torch.dtype = torch.float32, padded: bool = False) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """q, k, v (2, 2, T, 16) as the attention makes them, and which frames are valid (2, T)."""
    heads = torch.randn(2, frames, 3, 2, 16, dtype=dtype).permute(2, 0, 3, 1, 4).requires_grad_()
    valid = torch.ones(2, frames, dtype=torch.bool)
    if padded:
        valid[1, frames // 2 :] = False  # of one frame, none
    return heads.unbind(0), valid


def attend_of(valid: torch.Tensor) -> torch.Tensor:
    attend = valid.clone()
    attend[:, 0] |= ~valid.any(1)
    return attend[:, None, None]


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":  # as with a torch that lacks the private operation
        monkeypatch.setattr(sparse, "_FLASH", None)
        monkeypatch.setattr(sparse_pattern, "ROWS", 16)
    return request.param


@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_equals_dense_attention_under_the_mask(pattern: SparsePattern, path: str) -> None:
    torch.manual_seed(0)
    for frames in LENGTHS[pattern.stride]:
        seen = definition(pattern, frames)
        for padded in (False, True):
            (q, k, v), valid = inputs(frames, padded=padded)
            attend = attend_of(valid) if padded else None
            ours = sparse_attention(q, k, v, pattern, attend)
            mask = seen & attend_of(valid)
            mask |= ~mask.any(-1, keepdim=True)  # padded queries that see nothing: anything finite
            dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            rows = valid[:, None, :, None].float()
            torch.testing.assert_close(ours * rows, dense * rows, rtol=0, atol=1e-5)
            direction = torch.randn_like(dense) * rows
            gradients = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (ours, dense)]
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)
            assert ours.isfinite().all()


def test_fairseq_pattern_is_the_mask_that_fairseq_makes() -> None:
    module = pytest.importorskip("fairseq.modules.sparse_multihead_attention")
    for l, c in ((8, 3), (8, 7), (5, 1), (32, 8)):
        theirs = module.SparseMultiheadAttention(16, 2, stride=l, expressivity=c, self_attention=True)
        for frames in (l + 1, l + 2, 2 * l, 2 * l + 1, 3 * l + 3):  # fairseq refuses a length up to the stride
            mask = theirs.buffered_sparse_mask(torch.zeros(1), frames, frames) == 0
            flat = torch.zeros(1, 1, frames, frames)
            ours = sparse_attention(flat, flat, torch.eye(frames)[None, None], SparsePattern("fairseq", l, c, 1))[0, 0]
            assert torch.equal(ours > 0, mask), (l, c, frames)
            torch.testing.assert_close(ours.sum(1), torch.ones(frames))


def test_double_precision_gradients() -> None:
    for kind in ("fixed", "fairseq"):
        heads, _ = inputs(11, torch.float64)
        leaves = tuple(x[:1, :1, :, :3].detach().requires_grad_() for x in heads)
        assert torch.autograd.gradcheck(lambda *x, kind=kind: sparse_attention(*x, SparsePattern(kind, 4, 1, 1)), leaves)


class Recorded(Dropout):
    """Dropout that keeps the factors it drew."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.factors: list[torch.Tensor] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = super().forward(input)
        self.factors.append((y / input).detach())
        return y


@pytest.mark.parametrize("kind", ["fixed", "fairseq"])
def test_dropout_is_dense_dropout_of_the_same_draws(kind: str) -> None:
    """The factors drawn for (own keys, summaries) of each query, laid out on (T, T), give dense attention's outputs and gradients."""
    torch.manual_seed(0)
    frames = 22
    pattern = SparsePattern(kind, 6, 2, 1)
    (q, k, v), _ = inputs(frames)
    dropout = Recorded(0.4)
    ours = sparse_attention(q, k, v, pattern, None, dropout)
    drawn = list(dropout.factors)
    mask = definition(pattern, frames)
    shared = mask.all(0)
    factors = torch.zeros(2, 2, frames, frames)
    rows = [part[:, :, i] for part in drawn for i in range(part.size(2))]
    assert len(rows) == frames
    for i, row in enumerate(rows):
        factors[:, :, i, torch.cat([(mask[i] & ~shared).nonzero(), shared.nonzero()]).flatten()] = row
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    dense = (scores.softmax(-1) * factors) @ v
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    direction = torch.randn_like(dense)
    gradients = [torch.autograd.grad((y * direction).sum(), (q, k, v)) for y in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)
    again = dropout.factors[len(drawn) :]  # the backward pass computes the scores again
    assert len(again) == len(drawn) and all(torch.equal(a, b) for a, b in zip(again, drawn))


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_dropout_drops_its_share_and_keeps_the_mean(kind: str) -> None:
    torch.manual_seed(0)
    frames, p = 300, 0.3
    pattern = SparsePattern(kind, 16, 4, 20)
    flat = torch.zeros(1, 1, frames, frames)
    probs = sparse_attention(flat, flat, torch.eye(frames)[None, None], pattern, None, Dropout(p))[0, 0]
    seen = definition(pattern, frames)
    expected = (seen / seen.sum(1, keepdim=True)) / (1 - p)
    assert not probs[~seen].any()
    kept = probs > 0
    torch.testing.assert_close(probs[kept], expected[kept], rtol=1e-3, atol=0)
    assert abs(float(kept[seen].float().mean()) - (1 - p)) < 0.01
    torch.manual_seed(5)
    first = sparse_attention(flat, flat, torch.eye(frames)[None, None], pattern, None, Dropout(p))
    torch.manual_seed(5)
    assert torch.equal(first, sparse_attention(flat, flat, torch.eye(frames)[None, None], pattern, None, Dropout(p)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements of its storage."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_memory_is_linear_in_time(kind: str, dropout: float) -> None:
    """What is kept for the backward pass doubles with T, and no operation of either pass makes anything near T x T."""
    figures = []
    for frames in (1_000, 2_000):
        module = SparseSelfAttention(32, 2, dropout, SparsePattern(kind, 64, 4, 32))
        x = torch.randn(1, frames, 32, requires_grad=True)
        attend = torch.ones(1, 1, 1, frames, dtype=torch.bool)
        kept: dict[int, int] = {}

        def keep(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = module(x, attend)
            bytes_kept = sum(kept.values())
            y.sum().backward()
        assert largest.elements < frames * 600 < 2 * frames**2  # both heads' scores of all queries would be 2 T^2
        figures.append((bytes_kept, largest.elements))
    (kept_once, large_once), (kept_twice, large_twice) = figures
    assert kept_twice < 2.1 * kept_once and large_twice < 2.2 * large_once


@pytest.mark.parametrize("pattern", PATTERNS[::3], ids=name)
def test_a_row_without_valid_frames_is_finite(pattern: SparsePattern, path: str) -> None:
    (q, k, v), _ = inputs(40)
    attend = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    attend[..., 0] = True
    y = sparse_attention(q, k, v, pattern, attend)
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_flex_attention_sees_the_same(kind: str) -> None:
    """FlexAttention's own eager form, which is correct and slow; and its block mask holds every tile in which something is seen."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    torch.manual_seed(0)
    for frames in (1, 9, 128, 300):
        pattern = SparsePattern(kind, 16, 3, 40)
        (q, k, v), valid = inputs(frames, padded=frames > 1)
        attend = attend_of(valid) if frames > 1 else None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "called without torch.compile"
            ours = sparse_flex(q, k, v, attend, pattern, flex)
            plain = sparse_attention(q, k, v, pattern, attend)
        rows = valid[:, None, :, None]
        torch.testing.assert_close(ours * rows, plain * rows, rtol=0, atol=1e-5)

        order, mask = tiles(pattern, frames, q.device)
        i, j = torch.arange(frames)[:, None], torch.arange(frames)
        assert torch.equal(mask.mask_mod(0, 0, i, j), definition(pattern, frames)[:, order])
        held = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert held[:frames, :frames][mask.mask_mod(0, 0, i, j)].all()
    assert not tiles(SparsePattern(kind, 128, 8, 64), 4_096, q.device)[1].to_dense().all()  # some are left out
    assert not takes_flex(q)  # a CPU tensor


# -- the encoder ----------------------------------------------------------------------------------------------------------


def small(**keys) -> hubert_eff.models.hubert.HubertModel:
    """A debug model whose second of audio has several blocks with summaries."""
    torch.manual_seed(0)
    return hubert_eff.build("sparseformer-debug", **{"sparse_stride": 8, "sparse_expressivity": 2, "sparse_window": 5, **keys})


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_batch_row_equals_alone_and_padding_is_sealed(kind: str) -> None:
    model = small(sparse_pattern=kind).eval()
    wav, padding = torch.randn(2, 16_000), torch.zeros(2, 16_000, dtype=torch.bool)
    padding[1, 9_123:] = True
    states, frames = model.hidden_states(wav, padding)
    alone, _ = model.hidden_states(wav[1:, :9_123])
    noisy, _ = model.hidden_states(torch.where(padding, torch.randn_like(wav) * 100, wav), padding)
    valid = int((~frames[1]).sum())
    for state, single, other in zip(states, alone, noisy):
        torch.testing.assert_close(state[1, :valid], single[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(state, other)


def padded_features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padding = torch.zeros(2, 50, dtype=torch.bool)
    padding[1, 30:] = True
    return torch.randn(2, 50, 64), padding, torch.randn(2, 50, 64)


def outputs_and_gradient(encoder, x: torch.Tensor, padding: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = encoder(leaf, padding)
    (y * direction).sum().backward()
    return y.detach(), leaf.grad


def test_compiled_equals_eager() -> None:
    encoder = small(encoder_layers=1).eval().encoder
    batch = padded_features()
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs_and_gradient(compiled, *batch), outputs_and_gradient(encoder, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_the_module_drops_in_training_only(kind: str) -> None:
    module, x = SparseSelfAttention(64, 4, 0.5, SparsePattern(kind, 8, 2, 5)), torch.randn(1, 40, 64)
    assert not torch.allclose(module(x), module(x), atol=1e-3)
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
@pytest.mark.parametrize("frames", [41, 200])
def test_compiled_training_with_dropout(kind: str, frames: int) -> None:
    encoder = small(sparse_pattern=kind, encoder_layers=1, attention_dropout=0.1).train().encoder
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="aot_eager")
    x, direction = torch.randn(2, frames, 64), torch.randn(2, frames, 64)
    y, gradient = outputs_and_gradient(compiled, x, torch.arange(frames).expand(2, -1) >= 30, direction)
    assert torch.isfinite(y).all() and not y[:, 30:].any() and gradient[:, :30].abs().amin((0, 2)).min() > 0


@pytest.mark.parametrize("kind", ["fixed", "fairseq", "local"])
def test_other_precisions(kind: str, path: str) -> None:
    encoder = small(sparse_pattern=kind).eval().encoder
    x, padding, direction = padded_features()
    exact = outputs_and_gradient(encoder, x, padding, direction)
    double = outputs_and_gradient(copy.deepcopy(encoder).double(), x.double(), padding, direction)
    for a, b in zip(exact, double):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = outputs_and_gradient(encoder, x, padding, direction)
    half = outputs_and_gradient(copy.deepcopy(encoder).bfloat16(), x.bfloat16(), padding, direction)
    for a, b, c in zip(exact, rough, half):
        assert F.cosine_similarity(a.flatten(), b.float().flatten(), 0) > 0.99
        assert F.cosine_similarity(a.flatten(), c.float().flatten(), 0) > 0.99


@pytest.mark.parametrize("kind", ["fixed", "local"])
def test_recomputed_blocks_drop_the_same(kind: str) -> None:
    model = small(sparse_pattern=kind, attention_dropout=0.3, dropout=0.1, encoder_layerdrop=0.0).train()
    x, direction = torch.randn(1, 50, 64), torch.randn(1, 50, 64)
    runs = []
    for recompute in (False, True):
        twin = copy.deepcopy(model)
        twin.encoder.checkpoint_activations = recompute
        torch.manual_seed(1)
        y = twin.encoder(x)
        (y * direction).sum().backward()
        runs.append([y.detach(), *(p.grad for p in twin.encoder.parameters())])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset, params", [("sparseformer-dn-s", 15_203_712), ("sparseformer-sw-s", 29_294_720)])
def test_size_and_cost_of_the_papers_models(preset: str, params: int) -> None:
    """Table 1's parameters; counted is what is computed, below the dense count 2 T^2 D per layer."""
    profile = hubert_eff.profile(preset)
    assert profile.params == params
    config = hubert_eff.build(preset).config
    frames, dim = 500, config.encoder_embed_dim  # 499 frames, padded to a multiple of 2 behind the positional convolution
    pairs = int(definition(SparsePattern("fixed", 32, 8, 1), frames).sum())
    project = 512 * dim * 499 if dim != 512 else 0
    layers = config.encoder_layers * (12 * dim**2 * frames + 2 * pairs * dim)
    assert profile.macs == 3_295_436_160 + project + 499 * 8 * dim**2 + layers
    assert 3 * pairs < 2 * frames**2


def test_automatic_stride_is_fixed_when_the_model_is_built(tmp_path) -> None:
    model = small(sparse_stride=0, sparse_expressivity=8, sparse_max_frames=1_500)
    assert model.config.sparse_stride == 110  # sqrt(8 * 1500) = 109.5
    assert {block.self_attn.pattern.stride for block in model.encoder.layers} == {110}
    hubert_eff.export(model, tmp_path / "model.safetensors")
    assert hubert_eff.load(tmp_path / "model.safetensors").config.sparse_stride == 110
    assert dataclasses.replace(model.config, sparse_max_frames=9).sparse_stride == 110


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sparse_stride": 8, "sparse_expressivity": 8}, "sparse_stride=8 must be more than sparse_expressivity=8"),
        ({"sparse_stride": -1}, "sparse_stride=-1 must be at least 0"),
        ({"sparse_expressivity": 0}, "sparse_expressivity=0 must be at least 1"),
        ({"sparse_stride": 0, "sparse_expressivity": 8, "sparse_max_frames": 8}, "sparse_max_frames=8 is too short"),
        ({"sparse_window": 0}, "sparse_window=0 must be at least 1"),
        ({"sparse_pattern": "strided"}, "unknown value of sparse_pattern"),
        ({"sparse_strides": 8}, "did you mean 'sparse_stride'"),
    ],
)
def test_impossible_patterns_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**keys)
