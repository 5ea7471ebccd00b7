"""Counts of operations, against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.profiling import count_operations, register_formula
from hubert_eff.profiling.formulas import ATTENTION, CONVOLUTION, DEPTHWISE, ELEMENTWISE, GROUPED, MATRIX, NORM

from ..helpers.functions import Function, macs

B, T, D, H = 2, 7, 12, 3
FASTCONV, FRAMES = 3_295_436_160, 499  # MACs of the extractor on 10 s, frames of 10 s


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(D,), (T, D), (B, T, D)])
def test_linear(shape, bias):
    assert macs(nn.Linear(D, 5, bias=bias), torch.randn(shape)) == torch.Size(shape[:-1]).numel() * D * 5


def test_products():
    a, b = torch.randn(B, T, D), torch.randn(B, D, 5)
    assert macs(Function(torch.matmul), a, b) == B * T * D * 5
    assert macs(Function(torch.baddbmm), torch.randn(B, T, 5), a, b) == B * T * D * 5
    assert macs(Function(lambda x, y: torch.einsum("bij,bjk->bik", x, y)), a, b) == B * T * D * 5
    assert macs(Function(lambda x, y: torch.einsum("bij,jk->bik", x, y)), a, b[0]) == B * T * D * 5
    assert macs(Function(torch.mv), a[0], b[0, :, 0]) == T * D
    assert macs(Function(torch.dot), a[0, 0], b[0, :, 0]) == D


@pytest.mark.parametrize("groups", [1, 3, 12])  # dense, grouped, depthwise
@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 3, 1), (3, 1, 2)])
def test_convolution(groups, stride, padding, dilation):
    kernel, out_channels = 3, 24
    conv = nn.Conv1d(D, out_channels, kernel, stride, padding, dilation, groups)
    frames = (20 + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    with torch.no_grad(), count_operations(conv) as counts:
        conv(torch.randn(B, D, 20))
    expected = B * frames * out_channels * (D // groups) * kernel
    kind = {1: CONVOLUTION, 3: GROUPED, 12: DEPTHWISE}[groups]
    assert counts.total().macs == counts.total(kind=kind).macs == expected
    assert counts.total().macs_by_bits == {(32, 32): expected}


def test_convolution_2d_and_transposed():
    assert macs(nn.Conv2d(4, 8, (1, 5), padding=(0, 2), groups=4), torch.randn(B, 4, 1, 9)) == B * 9 * 8 * 1 * 5
    assert macs(nn.ConvTranspose1d(4, 8, 3, stride=2), torch.randn(B, 4, 9)) == B * 9 * 4 * 8 * 3


MASKS = {
    "none": lambda: None,
    "float": lambda: torch.zeros(B, 1, 1, T),
    "bool": lambda: torch.ones(B, 1, T, T, dtype=torch.bool),
    # a mask that requires a gradient sends torch to the unfused path
    "learned": lambda: torch.zeros(B, H, T, T).requires_grad_(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_counts_do_not_depend_on_the_kernel(mask):
    q = k = v = torch.randn(B, H, T, 4)
    module = Function(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=MASKS[mask]()))
    assert macs(module, q, k, v) == 2 * B * H * T * T * 4
    with torch.inference_mode(), count_operations(module) as counts:
        module(q, k, v)
    assert counts.total().macs == 2 * B * H * T * T * 4
    if mask != "learned":
        assert counts.total(kind=ATTENTION).macs == counts.total().macs


def test_attention_with_other_key_length_and_value_size():
    q, k, v = torch.randn(B, H, 3, 4), torch.randn(B, H, T, 4), torch.randn(B, H, T, 6)
    assert macs(Function(F.scaled_dot_product_attention), q, k, v) == B * H * 3 * T * (4 + 6)


def test_attention_element_operations_agree_between_kernels():
    q = torch.randn(B, H, T, 4)
    counted = []
    for mask in (torch.zeros(B, H, T, T), torch.zeros(B, H, T, T).requires_grad_()):
        with torch.no_grad(), count_operations(nn.Identity()) as counts:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        counted.append(counts.total().element_ops)
    assert counted == [2 * q.numel() + 2 * B * H * T * T] * 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
def test_onednn_linear():
    x, w, b = torch.randn(B, T, D), torch.randn(5, D), torch.randn(5)
    linear = torch.ops.mkldnn._linear_pointwise
    with torch.no_grad(), count_operations(nn.Identity()) as counts:
        linear(x, w, b, "none", [], "")
        linear(x, w, b, "swish", [], "")
    total = counts.total()
    assert (total.macs, total.element_ops) == (2 * B * T * D * 5, B * T * 5)  # the fused activation


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_block_in_every_gradient_mode(context):
    block = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 20), nn.GELU(), nn.Linear(20, D), nn.Softmax(-1)).eval()
    with context(), count_operations(block) as counts:
        block(torch.randn(B, T, D))
    assert counts.total().macs == B * T * D * 20 * 2
    assert counts.total().element_ops == B * T * (D + 20 + D)  # LayerNorm, GELU, softmax
    assert counts.total("2").element_ops == B * T * 20
    assert counts.total(kind=NORM).element_ops == B * T * D and counts.total(kind=ELEMENTWISE).element_ops == B * T * (20 + D)
    assert counts.total(kind=MATRIX).macs == counts.total().macs


def test_free_operations():
    def shuffle(x):
        y = F.pad(x.transpose(1, 2), (1, 2)).contiguous().reshape(-1, 5)
        return torch.cat([y, torch.zeros_like(y)]).unfold(0, 2, 1).clone()[:1].expand(3, 5, 2).squeeze_()

    with torch.no_grad(), count_operations(nn.Identity()) as counts:
        shuffle(torch.randn(B, T, D))
    assert (counts.total().macs, counts.total().element_ops) == (0, 0)


def test_reductions_count_what_they_read():
    with torch.no_grad(), count_operations(nn.Identity()) as counts:
        torch.randn(B, T, D).mean(-1).sum()
    assert counts.total().element_ops == B * T * D + B * T


class Tree(nn.Module):
    """Two blocks that share one linear; one of them is called twice, and the root calls a function on its own."""

    class Block(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) @ x.transpose(-1, -2) @ x

    def __init__(self):
        super().__init__()
        shared = nn.Linear(D, D)
        self.first, self.second = self.Block(shared), self.Block(shared)

    def forward(self, x):
        return F.linear(self.second(self.second(self.first(x))), self.first.linear.weight)


def test_attribution_of_shared_and_repeated_modules():
    model, product = Tree(), B * T * D * D
    with torch.no_grad(), count_operations(model) as counts:
        model(torch.randn(B, T, D))
    assert counts.total("first.linear").macs == product
    assert counts.total("second.linear").macs == 2 * product
    assert counts.total("second").macs == 2 * (product + 2 * B * T * T * D)
    assert counts.own("").macs == counts.tallies["", "aten.mm", MATRIX].macs == product  # the root's own F.linear
    assert counts.total().macs == 4 * product + 6 * B * T * T * D


def test_nothing_is_left_behind():
    model, x = Tree(), torch.randn(B, T, D)
    first = macs(model, x)
    assert macs(model, x) == first
    with pytest.raises(RuntimeError), count_operations(model):
        model(torch.randn(B, T, D + 1))
    assert macs(model, x) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def library():
    # an operation of our own, opaque to torch
    lib = torch.library.Library("hubert_eff_test", "DEF")
    lib.define("outer(Tensor a, Tensor b) -> Tensor")
    lib.impl("outer", lambda a, b: a[:, None] * b[None], "CPU")
    yield torch.ops.hubert_eff_test
    lib._destroy()


def test_unknown_operation_is_refused_by_name_and_module_until_it_has_a_formula(library, monkeypatch):
    from hubert_eff.profiling import formulas

    for table in ("_MACS", "_KIND"):
        monkeypatch.setattr(formulas, table, dict(getattr(formulas, table)))
    model = nn.Sequential(nn.Identity(), Function(lambda x: library.outer(x, x)))
    with pytest.raises(UserError, match=r"hubert_eff_test\.outer in module '1' has no MAC formula"):
        macs(model, torch.randn(3))

    with pytest.raises(UserError, match="kind='outer'"):
        register_formula(library.outer, kind="outer")

    @register_formula(library.outer, kind=DEPTHWISE)
    def outer(a: Tensor, b: Tensor, out: Tensor) -> int:
        return out.numel()

    with count_operations(model) as counts:
        model(torch.randn(3))
    assert counts.total(kind=DEPTHWISE).macs == counts.total().macs == 9
    with pytest.raises(UserError, match="already"):
        register_formula(library.outer)(outer)
    with pytest.raises(UserError, match="already"):
        register_formula(torch.ops.aten.mm)
    with pytest.raises(UserError, match="takes an operation"):
        register_formula(torch.mm)


def test_agrees_with_torch_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.TransformerEncoderLayer(D, H, 20, batch_first=True).eval()
    x = torch.randn(B, T, D, requires_grad=True)
    with count_operations(model) as counts:
        model(x)
    flop = FlopCounterMode(display=False)
    with flop, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x)
    assert 2 * counts.total().macs == flop.get_total_flops() == 2 * B * T * (4 * D * D + 2 * D * 20 + 2 * T * D)


def test_user_defined_encoder_with_an_unknown_operation_is_refused_by_name(library):
    model = hubert_eff.build("transformer-debug")
    model.encoder.layers[1].fc1 = Function(lambda x: library.outer(x[0, :, 0], x[0, :, 1])[None])
    with pytest.raises(UserError, match=r"hubert_eff_test\.outer in module 'encoder\.layers\.1\.fc1' has no MAC formula"):
        hubert_eff.profile(model, seconds=0.5)


def test_a_module_that_is_no_model_is_refused():
    with pytest.raises(UserError, match="a Linear has no hidden_states"):
        hubert_eff.profile(nn.Linear(2, 2))
