"""The operation counter on cases worked out by hand, and the profile of presets."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubert_eff
from hubert_eff.checkpoints.open import open_model
from hubert_eff.checkpoints.torchfile import structure_only
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.profiling import count_operations, list_devices, read_device, register_formula
from hubert_eff.profiling.cost import bit_operations, file_storage, paper_storage
from hubert_eff.profiling.formulas import ATTENTION, CONVOLUTION, COPY, DEPTHWISE, ELEMENTWISE, GROUPED, KINDS, MATRIX, NORM
from hubert_eff.reports import table1
from hubert_eff.reports.tables import render_text

B, T, D, H = 2, 7, 12, 3


class Function(nn.Module):
    """A module without submodules that runs a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def macs(module: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad(), count_operations(module.eval()) as counts:
        module(*inputs)
    return counts.total().macs


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


# -- bit widths ----------------------------------------------------------------------------------------------------------


class SignLinear(nn.Module):
    """A linear of +-1 weights on +-1 inputs, computed in floats; it declares one bit for both."""

    operand_bits = (1, 1)

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs).sign())
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stored_bits = {"weight": (inputs * outputs, 1)}

    def forward(self, x):
        return F.linear(torch.where(x > 0, 1.0, -1.0), self.weight, self.bias)


class SignDepthwise(SignLinear):
    """The same for a depthwise convolution."""

    def __init__(self, channels, kernel):
        super().__init__(channels, 1)
        self.weight = nn.Parameter(torch.randn(channels, 1, kernel).sign())
        self.stored_bits = {"weight": (channels * kernel, 1)}

    def forward(self, x):
        return F.conv1d(torch.where(x > 0, 1.0, -1.0), self.weight, padding="same", groups=len(self.weight))


class PackedLinear(nn.Module):
    """`SignLinear` on packed weights: eight in a byte."""

    operand_bits = (1, 1)

    def __init__(self, inputs, outputs):
        super().__init__()
        self.outputs = outputs
        self.register_buffer("weight", torch.zeros(-(-inputs * outputs // 8), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stored_bits = {"weight": (inputs * outputs, 1)}

    def forward(self, x):
        bits = self.weight[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        rows = bits.flatten()[: self.outputs * x.shape[-1]].view(self.outputs, -1)
        return F.linear(torch.where(x > 0, 1.0, -1.0), 2.0 * rows - 1.0, self.bias)


def test_declared_bits():
    model = nn.Sequential(nn.Linear(D, 20), SignLinear(20, 6), Function(lambda x: x.transpose(1, 2)), SignDepthwise(6, 3))
    with torch.no_grad(), count_operations(model) as counts:
        model(torch.randn(B, T, D))
    floats, linear, depthwise = B * T * D * 20, B * T * 20 * 6, B * T * 6 * 3
    assert counts.total().macs_by_bits == {(32, 32): floats, (1, 1): linear + depthwise}
    assert counts.total(kind=DEPTHWISE).macs_by_bits == {(1, 1): depthwise}
    assert counts.total("1").macs_by_bits == {(1, 1): linear}
    assert bit_operations(counts.total().macs_by_bits, "paper") == (32 * floats / 2**30, (linear + depthwise) / 2**30)
    assert bit_operations(counts.total().macs_by_bits, "product") == (1024 * floats / 2**30, (linear + depthwise) / 2**30)
    # the declared weights take one bit each, biases are floats
    floats = D * 20 + 20 + 6 + 1
    assert paper_storage(model) == 4 * floats + (20 * 6 + 6 * 3) / 8
    assert paper_storage(model, float_bytes=2) == 2 * floats + (20 * 6 + 6 * 3) / 8
    assert file_storage(model) == 4 * floats + 15 + 3


def test_simulated_and_packed_forms_cost_the_same():
    model = hubert_eff.build("transformer-debug")
    profiles = []
    for form in (SignLinear, PackedLinear):
        for block in model.encoder.layers:
            block.fc1, block.fc2 = form(64, 128), form(128, 64)
        profiles.append(hubert_eff.profile(model, seconds=1.0))
    simulated, packed = profiles
    for name in ("params", "storage_mb", "macs_by_bits", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_s"):
        assert getattr(simulated, name) == getattr(packed, name), name
    weights = 2 * 2 * 64 * 128
    assert simulated.macs_by_bits[1, 1] == weights * simulated.frames
    assert simulated.bop_bq_g == weights * simulated.frames / 2**30
    # 1 bit instead of 32 per weight, and no mask embedding
    full = hubert_eff.profile("transformer-debug", seconds=1.0)
    assert simulated.storage_mb["paper"] == pytest.approx(full.storage_mb["paper"] - (weights * (4 - 1 / 8) + 4 * 64) / 1e6)
    assert simulated.storage_mb["file"] == pytest.approx(full.storage_mb["file"] - weights * (4 - 1 / 8) / 1e6)
    assert "1x1" in render_text(simulated) and "1x1" not in render_text(full)


def test_widths_of_other_dtypes():
    linear = nn.Linear(D, 5)
    x = torch.randn(B, T, D)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), count_operations(linear) as counts:
        linear(x)
    assert counts.total().macs_by_bits == {(16, 16): B * T * D * 5}
    with torch.no_grad(), count_operations(linear.double()) as counts:
        linear(x.double())
    assert counts.total().macs_by_bits == {(64, 64): B * T * D * 5}


@pytest.mark.skipif(not {"x86", "fbgemm", "qnnpack"} & set(torch.backends.quantized.supported_engines), reason="no int8 kernels")
def test_int8_linear():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(D, 5)), {nn.Linear}, torch.qint8)
    with torch.no_grad(), count_operations(model) as counts:
        model(torch.randn(B, T, D))
    assert counts.total().macs_by_bits == {(8, 8): B * T * D * 5}


def test_wrong_declarations_are_refused():
    model = SignLinear(4, 4)
    model.operand_bits = 1
    with pytest.raises(UserError, match="SignLinear.operand_bits=1 must be a pair"), count_operations(model):
        pass
    model.stored_bits = {"wait": (16, 1)}
    with pytest.raises(UserError, match="names 'wait'"):
        paper_storage(model)


# -- devices -------------------------------------------------------------------------------------------------------------


def test_devices():
    assert {"a100", "h100", "h200"} <= set(list_devices())
    for name in list_devices():
        device = read_device(name)
        assert device.rate(16) > device.rate(32) > 0 and device.rate(1) >= device.rate(8)
    a100 = read_device("a100")
    assert (a100.rate(16), a100.rate(1), a100.rate(2)) == (312, 4992, 1248)
    assert a100.paper_time(312 * 1024, 4992 * 1024) == 2.0
    assert a100.roofline_time({(16, 16): 312 * 10**12, (1, 1): 4992 * 10**12}, 0) == 4.0
    assert a100.roofline_time({(1, 1): 1}, 2039e9) == 1.0  # reading the weights takes longer
    with pytest.raises(UserError, match="64 bits"):
        a100.roofline_time({(64, 64): 1}, 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x", "must have the keys"),
        ("[", "is no YAML file"),
        ("{name: x, source: y, tops: {16: fast}, bandwidth_gb_s: 1}", "tops must map"),
        ("{name: x, source: y, tops: {16: 312}, bandwidth_gb_s: 0}", "bandwidth_gb_s=0"),
    ],
)
def test_bad_device_files(text, message, tmp_path):
    (tmp_path / "device.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_device(tmp_path / "device.yaml")
    with pytest.raises(UserError, match="unknown device"):
        read_device("a1000")


# -- presets -------------------------------------------------------------------------------------------------------------

FASTCONV, FRAMES = 3_295_436_160, 499  # MACs of the extractor on 10 s, frames of 10 s


def expected_macs(dim: int, layers: int, per_frame: int, frames: int) -> int:
    """Extractor, projection, positional convolution (k 128, 16 groups), then per layer the weights and two products of attention."""
    projection = 0 if dim == 512 else 512 * dim * FRAMES
    return FASTCONV + projection + 8 * dim**2 * FRAMES + layers * (per_frame * frames + 2 * frames**2 * dim)


def test_transformer_base():
    result = hubert_eff.profile("transformer-base", seconds=10.0)
    assert result.params == result.params_without_labels == result.modules.params == 92_212_096
    assert result.storage_mb == {"paper": 368.848384, "file": 368.848384}
    assert paper_storage(open_model("transformer-base", structure=True), float_bytes=2) / 1e6 == 184.424192  # the paper's figure
    assert (result.samples, result.frames) == (160_000, FRAMES)
    assert result.macs == expected_macs(768, 12, 12 * 768**2, 500)  # the encoder works on a multiple of two frames
    assert result.gflop == pytest.approx(105.85, abs=0.01)
    assert result.bop_nonq_g == 32 * result.macs / 2**30 and result.bop_bq_g == 0.0
    assert result.est_time_s["paper"] == result.bop_nonq_g / (312 * 1024)
    assert result.est_time_s["roofline"] == 2 * result.macs / 19.5e12  # float32 of an A100
    attention = 12 * 2 * 500**2 * 768
    assert result.kinds[ATTENTION].macs == attention
    assert result.kinds[GROUPED].macs == 8 * 768**2 * FRAMES
    assert result.kinds[MATRIX].macs + result.kinds[CONVOLUTION].macs == result.macs - attention - result.kinds[GROUPED].macs
    modules = {module.name: module for module in result.modules.walk()}
    assert modules["feature_extractor"].macs == FASTCONV
    assert modules["final_proj"].macs == 0 < modules["final_proj"].params
    assert modules["encoder.layers.3"].macs == 12 * 768**2 * 500 + 2 * 500**2 * 768
    assert modules["encoder.layers.3.fc1"].macs == 500 * 768 * 3072


def test_conformer_s():
    with structure_only():
        absolute = hubert_eff.profile(hubert_eff.build("conformer-s", pos_enc_type="abs"))
    weights = 7 * 144**2 + 4 * 144 * 576 + 31 * 144
    assert absolute.params == 9_884_752
    assert absolute.macs == expected_macs(144, 16, weights, FRAMES)
    relative = hubert_eff.profile("conformer-s")
    assert relative.params == absolute.params + 16 * (144**2 + 2 * 144)  # linear_pos, u, v
    # linear_pos on 2T - 1 offsets, and at least T offsets per query
    least = 16 * ((2 * FRAMES - 1) * 144**2 + FRAMES**2 * 144)
    assert absolute.macs + least < relative.macs < absolute.macs + 1.5 * least


def test_profiling_leaves_the_model_as_it_was_and_repeats():
    model = hubert_eff.build("conformer-debug", num_classes=(7,))
    model.encoder.pos_conv.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = hubert_eff.profile(model, seconds=1.0)
    assert hubert_eff.profile(model, seconds=1.0) == first
    assert model.training and model.encoder.layers.training and not model.encoder.pos_conv.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert first.params - first.params_without_labels == 7 * 64
    assert hubert_eff.profile("conformer-debug", seconds=1.0).macs == first.macs


def test_counts_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    model = hubert_eff.build("conformer-debug", pos_enc_type="rel_pos")
    counted = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            counted.append(hubert_eff.profile(model, seconds=11.0))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_is_counted_and_twice_the_same(encoder):
    model = hubert_eff.build(f"{encoder}-debug")
    first = hubert_eff.profile(model, seconds=1.0)
    assert hubert_eff.profile(model, seconds=1.0) == first
    assert hubert_eff.profile(f"{encoder}-debug", seconds=1.0).macs_by_bits == first.macs_by_bits
    assert first.frames == 49 and set(first.kinds) <= set(KINDS) and COPY in first.kinds
    assert first.macs == sum(kind.macs for kind in first.kinds.values()) == first.macs_by_bits[32, 32]
    narrow = hubert_eff.profile(model.bfloat16(), seconds=1.0)
    assert narrow.macs_by_bits.get((16, 16), 0) > 0.99 * narrow.macs  # a table of positions may stay wider


LARGE = ("-m", "-ml", "-l")  # these add seconds, and differ from the small ones in their sizes only


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.long) if p.endswith(LARGE) else p for p in hubert_eff.list_presets()])
def test_every_preset_is_counted(preset):
    model = open_model(preset, structure=True)
    result = hubert_eff.profile(model, seconds=0.5)
    assert result.macs > 0 and result.frames == 24 and result.bops == "paper"
    assert sum(t.macs for t in result.operations.values()) == result.macs
    assert sum(c.params for c in result.modules.children) + model.mask_emb.numel() == result.params


# -- the paper's Table 1 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return {row["preset"]: row for row in table1.table1()}


def test_table1_is_kept_as_it_is_counted(rows):
    assert list(rows.values()) == table1.table1(counts=table1.COUNTS)


def test_table1_time_follows_from_the_papers_own_bit_operations():
    assert len(table1.PAPER_TABLE) == 10
    for row in table1.PAPER_TABLE:
        assert row.recomputed_time(read_device("a100")) == pytest.approx(row.est_time_e4_s, rel=1e-3), row.title


def test_table1_float_rows(rows):
    expected = {  # parameters, GFLOP of a clean count
        "transformer-base": (92_212_096, 105.85),
        "conformer-s-table1": (32_967_760, 39.84),
        "squeezeformer-xs-table1": (33_010_096, 31.33),
    }
    for preset, (params, gflop) in expected.items():
        row = rows[preset]
        assert row["params"] == params
        assert f"{row['storage_mb']:.2f}" == f"{row['paper']['storage_mb']:.2f}"
        assert row["gflop"] == pytest.approx(gflop, abs=0.012)  # ours embeds positions on 499 frames, not on 500
        assert row["bop_nonq_g"] == pytest.approx(16 * row["gflop"] * 1e9 / 2**30) and row["bop_bq_g"] == 0.0
        assert row["est_time_e4_s"] == 1e4 * row["bop_nonq_g"] / (312 * 1024)
        assert row["difference_percent"]["gflop"] == 100 * (row["gflop"] / row["paper"]["gflop"] - 1)
    assert "368.85 MB" in rows["transformer-base"]["note"]


def test_table1_sparse_rows_are_what_is_computed(rows):
    for preset, params, gflop in (("sparseformer-dn-s", 15_203_712, 23.92), ("sparseformer-sw-s", 29_294_720, 37.95)):
        row = rows[preset]
        assert row["params"] == params
        assert f"{row['storage_mb']:.2f}" == f"{row['paper']['storage_mb']:.2f}"
        assert row["gflop"] < gflop and f"{gflop} GFLOP" in row["note"]  # the dense figure


def test_table1_binarised_row(monkeypatch):
    paper = table1.Row("BQ", "transformer-debug+w1a1", 0.5, 2.0, 3.0, 4.0, 5.0, "a reason", float_bytes=2)
    monkeypatch.setattr(table1, "PAPER_TABLE", (paper,))
    (row,) = table1.table1()
    full = hubert_eff.profile("transformer-debug")
    weights, attention = 2 * (4 * 64 * 64 + 2 * 64 * 128), 2 * 2 * 499 * 499 * 64
    moves = 2 * 3 * 64
    assert row["storage_mb"] == pytest.approx((2 * (full.params - weights - 64 + moves) + weights / 8) / 1e6, rel=1e-3)  # and scales
    assert row["bop_bq_g"] == (weights * 499 + attention) / 2**30
    assert row["gflop"] == pytest.approx(full.gflop - 2 * (weights * 499 + attention) / 1e9)
    assert row["note"].startswith("a reason; at 4 B per float")
    (product,) = table1.table1("product")
    assert product["bop_nonq_g"] == 32 * row["bop_nonq_g"] and product["bop_bq_g"] == row["bop_bq_g"]
    assert product["est_time_e4_s"] == row["est_time_e4_s"] and product["paper"]["bop_nonq_g"] == 96.0


def test_table1_command(rows, monkeypatch, capsys):
    monkeypatch.setattr(table1, "table1", lambda bops: list(rows.values()))
    assert main(["profile", "--table1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["rows"]
    assert len(values) == 10
    assert {"preset", "storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s", "params"} <= set(values[0])
    assert main(["profile", "--table1"]) == 0
    text = capsys.readouterr().out
    assert all(row["row"] in text and row["note"] in text for row in values) and "estimated" in text


def test_file_storage_is_what_export_writes(tmp_path):
    model = hubert_eff.build("conformer-debug", num_classes=(7,))
    hubert_eff.export(model, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert file_storage(model) == len(content) - header


def test_command(capsys):
    assert main(["profile", "transformer-debug", "--seconds", "1", "--json", "--depth", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gflop"] == 2 * values["macs"] / 1e9 and values["seconds"] == 1.0
    children = {child["name"]: child for child in values["modules"]["children"]}
    assert children["encoder"]["macs"] > 0 and children["encoder"]["children"] == []
    assert main(["profile", "transformer-debug", "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{values['macs']:,} MACs" in text and "0-1 (2, each)" in text
    text += render_text(hubert_eff.profile("conformer-debug+w1a1", seconds=1.0))  # with long reasons
    assert not any(mark in text for mark in ("\x1b", "\u2026"))  # neither colours nor cut-off cells


def test_command_compares(capsys):
    models = ["transformer-debug", "conformer-debug"]
    assert main(["profile", *models, "--seconds", "1", "--json", "--depth", "0", "--bops", "product"]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert [p["name"] for p in profiles] == models
    assert all(p["bop_nonq_g"] == 1024 * p["macs"] / 2**30 for p in profiles)
    assert main(["profile", *models, "--seconds", "1", "--device", "h200"]) == 0
    text = capsys.readouterr().out
    assert all(f"{p['gflop']:,.2f}" in text and p["name"] in text for p in profiles) and "NVIDIA H200" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conformr-s"], "did you mean 'conformer-s'?"),
        (["conformer-s", "--seconds", "0.02"], "seconds=0.02"),
        (["conformer-s", "--seconds", "nan"], "seconds=nan"),
        (["conformer-s", "--seconds", "ten"], "argument --seconds: invalid float value: 'ten'"),
        (["conformer-s", "--second-s", "1"], "unrecognized arguments: --second-s"),
        (["conformer-s", "--depth", "-1"], "--depth -1"),
        (["conformer-s", "--device", "a1000"], "unknown device"),
        (["conformer-s", "--table1"], "--table1 has its own models"),
        ([], "name a preset"),
        (["{file}"], "is no checkpoint"),
        (["{file}.missing"], "no checkpoint at"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "notes.pt").write_text("no checkpoint")
    assert main(["profile", *(a.format(file=tmp_path / "notes.pt") for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
