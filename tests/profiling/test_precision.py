"""Bit widths of operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.profiling import count_operations
from hubert_eff.profiling.cost import bit_operations, file_storage, paper_storage
from hubert_eff.profiling.formulas import DEPTHWISE
from hubert_eff.reports.tables import render_text

from ..helpers.functions import Function

B, T, D, H = 2, 7, 12, 3
FASTCONV, FRAMES = 3_295_436_160, 499  # MACs of the extractor on 10 s, frames of 10 s


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
