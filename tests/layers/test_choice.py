"""Which form of a float layer runs: by processor and shape, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hubert_eff.kernels import cpu as cpus
from hubert_eff.kernels.cpu import Cpu
from hubert_eff.layers import attention, choice, linear

INTEL = "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512bw amx_int8 amx_bf16 avx_vnni\n"
ZEN4 = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512bw avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    "text, otherwise, expected",
    [
        (INTEL, "x86_64", Cpu("Intel", "Intel(R) Xeon(R)", ("avx2", "avx512bw", "avx_vnni", "amx_int8", "amx_bf16"))),
        (ZEN4 + ZEN4, "x86_64", Cpu("AMD", "AMD EPYC", ("avx2", "avx512bw", "avx512_bf16"))),
        (ARM, "aarch64", Cpu("Arm", "aarch64", ("asimd", "sve"))),
        ("", "arm arm64", Cpu("Arm", "arm arm64", ())),
        ("", "Family 6, GenuineIntel AMD64", Cpu("Intel", "Family 6, GenuineIntel AMD64", ())),
        ("vendor_id\t: Other\nno colon here\n", "riscv64", Cpu("unknown", "riscv64", ())),
    ],
)  # fmt: skip
def test_a_processor_is_read_from_what_the_system_says(text: str, otherwise: str, expected: Cpu) -> None:
    assert cpus._described(text, otherwise) == expected


def test_this_processor_is_known() -> None:
    assert cpus.cpu().name and set(cpus.cpu().sets) <= set(cpus.SETS)


@pytest.mark.parametrize(
    "processor, expected",
    [
        (Cpu("Intel", "", ("avx2", "avx512bw", "avx_vnni", "amx_bf16")), choice.STOCK),
        (Cpu("Intel", "", ()), choice.STOCK),
        (Cpu("AMD", "", ("avx2",)), choice.HALF_WIDTH),
        (Cpu("AMD", "", ("avx2", "avx512bw", "avx512_vpopcntdq")), choice.HALF_WIDTH),
        (Cpu("AMD", "", ("avx2", "avx512bw", "avx_vnni")), choice.FULL_WIDTH),
        (Cpu("Arm", "", ("asimd",)), choice.STOCK),
        (Cpu("unknown", "", ()), choice.STOCK),
    ],
)
def test_rule(processor: Cpu, expected: choice.Choice) -> None:
    assert choice.rule_for(processor).choice == expected


def use(monkeypatch: pytest.MonkeyPatch, chosen: choice.Choice) -> None:
    monkeypatch.setattr(choice, "FIXED", chosen)


@pytest.mark.parametrize(
    "rows, inputs, outputs, folded, taken",
    [
        (16, 256, 1024, False, False), (499, 256, 1024, False, True), (499, 256, 256, False, False), (383, 768, 3072, False, False),
        (16, 256, 768, True, True), (15, 768, 3072, True, False), (128, 144, 576, True, True), (127, 144, 576, True, False),
        (1535, 128, 128, False, False), (1536, 128, 128, False, True),
    ],
)  # fmt: skip
def test_shape_and_layout_choose_the_product(
    rows: int, inputs: int, outputs: int, folded: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, choice.HALF_WIDTH)
    x, weight = torch.empty(1, rows, inputs), torch.empty(inputs, outputs).t() if folded else torch.empty(outputs, inputs)
    assert choice.takes_product(x, weight) is taken
    use(monkeypatch, choice.STOCK)
    assert not choice.takes_product(x, weight)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chosen", [choice.STOCK, choice.FULL_WIDTH], ids=["stock", "ours"])
def test_a_choice_changes_no_number(chosen: choice.Choice, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    exact = linear._PRODUCT
    if exact is None:
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(linear, "_PRODUCT", lambda *args: called.append(args) or exact(*args))
    use(monkeypatch, chosen)
    x, layer = torch.randn(2, 200, 24), linear.Linear(24, 2**10)
    with torch.set_grad_enabled(gradient):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert bool(called) is (chosen is choice.FULL_WIDTH)


@torch.no_grad()
def test_attention_by_blocks_or_not_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 12).unbind(0)
    module = attention.RelativeSelfAttention(24, 2).eval()
    x, positions = torch.randn(1, 200, 24), torch.randn(399, 24)
    blocks, found = attention._blockwise, []
    for chosen in (choice.STOCK, choice.FULL_WIDTH):
        use(monkeypatch, chosen)
        called: list[int] = []
        monkeypatch.setattr(attention, "_blockwise", lambda *args, called=called: called.append(1) or blocks(*args))
        found.append((attention.attention(q, k, v, None, 0.0), module(x, positions)))
        assert len(called) == (2 if chosen is choice.FULL_WIDTH and linear._PRODUCT is not None else 0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
