"""Packed bits: each kernel against plain torch, packed layers and models against simulated ones, and how the kernels are found."""

from __future__ import annotations

import copy
import functools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.kernels import loader
from hubert_eff.profiling import count_operations
from hubert_eff.profiling.cost import file_storage, paper_storage
from hubert_eff.quant import BinaryConv1d, BinaryLinear, Quantizer, pack, quant_report
from hubert_eff.quant.attention import BinaryAttention
from hubert_eff.quant.functional import weight_signs
from hubert_eff.quant.modules import Codes, FrameMask
from hubert_eff.quant.runtime import KERNELS, kernel_in_use, ops
from hubert_eff.quant.runtime.modules import PackedCodes, PackedConv1d, PackedLinear, PackedQuantizer

from ..helpers.packed import debug, differing, in_torch, runs

ENCODERS = hubert_eff.list_encoders()


def shapes(count: int) -> Iterator[tuple[int, int, int]]:
    """Rows, outputs, inputs: some by hand, the rest random."""
    torch.manual_seed(0)
    yield from [(1, 1, 1), (1, 1, 64), (9, 33, 31), (65, 16, 32), (64, 48, 65), (3, 17, 1100)]
    for _ in range(count):
        rows, outputs, inputs = torch.randint(1, 140, (3,)).tolist()
        yield rows, outputs, inputs


# -- operations in plain torch, against their definition -----------------------------------------------------------------------


def test_words_and_panels_return_what_was_put_in() -> None:
    for rows, _, inputs in shapes(5):
        bits = torch.rand(2, rows, inputs) > 0.5
        words = ops.words_from(bits)
        assert words.dtype == torch.int32 and words.shape == (2, rows, -(-inputs // 32))
        assert torch.equal(ops.bits_from(words, inputs), bits)
        assert torch.equal(ops.rows_from(ops.panels_from(words), rows), words)
    assert ops.words_from(torch.tensor([True, False, True] + [False] * 28 + [True])).item() == 5 - 2**31


def test_product_in_torch_is_the_product_of_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "torch")
    for rows, outputs, inputs in shapes(5):
        x, w, limit = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.tensor([0.3])
        panels, signs = ops.panels_from(ops.pack(w)), torch.where(w > 0, 1.0, -1.0)
        assert torch.equal(ops.product(ops.pack(x), panels, outputs, inputs, True), torch.where(x > 0, 1.0, -1.0) @ signs.T)
        unsigned = ops.pack(x, None, None, limit)
        assert torch.equal(ops.product(unsigned, panels, outputs, inputs, False), (x > limit).float() @ signs.T)


# -- kernels, against plain torch ----------------------------------------------------------------------------------------------


def test_packing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, channels, _ in shapes(20):
        x, move = torch.randn(2, 3, rows, channels).round(decimals=1), torch.randn(3, 1, channels).round(decimals=1)
        x[..., :1] = torch.nan
        factor, limit = torch.rand(2, 1, rows, 1) + 0.5, torch.tensor([0.2])
        calls: list[Callable[[], Tensor]] = [
            lambda: ops.pack(x),  # noqa: B023
            lambda: ops.pack(x, move, factor, limit),  # noqa: B023
            lambda: ops.pack(x.bfloat16(), move),  # noqa: B023
            lambda: ops.pack(x.transpose(1, 2).mT, None, None, limit),  # noqa: B023
            lambda: ops.pack_columns(x, move, limit),  # noqa: B023
            lambda: ops.pack_columns(x[0, 0].bfloat16()),  # noqa: B023
            lambda: ops.pack_columns(x, move, limit, 15, rows),  # noqa: B023
            lambda: ops.pack_columns(x.bfloat16(), None, None, 40),  # noqa: B023
            lambda: ops.pack_columns(x.unsqueeze(2).expand(-1, -1, 2, -1, -1), move.unsqueeze(1)),  # noqa: B023
        ]
        for call in calls:
            assert torch.equal(call(), in_torch(monkeypatch, call))


def test_products(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, outputs, inputs in shapes(25):
        a, shared = ops.pack(torch.randn(2, 3, rows, inputs)), ops.panels_from(ops.pack(torch.randn(outputs, inputs)))
        own = ops.panels_from(ops.pack(torch.randn(2, 3, outputs, inputs)))
        scale, size, bias, limit = torch.rand(1), torch.rand(outputs), torch.randn(outputs), torch.randint(0, inputs + 1, (outputs,))
        for b in (shared, own):
            for signed in (True, False):
                for rest in ((), (scale,), (None, size[:1], bias), (scale, size, bias), (scale, size, bias, True)):
                    call = lambda: ops.product(a, b, outputs, inputs, signed, *rest)  # noqa: B023, E731
                    assert torch.equal(call(), in_torch(monkeypatch, call))
            call = lambda: ops.product_bits(a, b, outputs, inputs, limit.int())  # noqa: B023, E731
            assert torch.equal(call(), in_torch(monkeypatch, call))


def test_depthwise(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for frames, channels, _ in shapes(15):
        width, stride = int(torch.randint(1, 70, ())), int(torch.randint(1, 4, ()))
        x, valid = ops.pack_columns(torch.randn(2, frames, channels)), ops.words_from(torch.rand(2, frames) > 0.02)
        filters = ops.panels_from(ops.words_from(torch.rand(channels, width) > 0.5))
        scale, size, bias = torch.rand(1), torch.rand(channels), torch.randn(channels)
        for signed in (True, False):
            for rest in ((), (scale, size, bias), (scale, size[:1], None, True)):
                out = -(-frames // stride)
                call = lambda: ops.depthwise(x, valid, filters, channels, width, stride, out, signed, *rest)  # noqa: B023, E731
                assert torch.equal(call(), in_torch(monkeypatch, call))
                begin, end = frames // 3, frames - frames // 4
                operands = (x, None, filters, channels, width, stride, out, signed)
                call = functools.partial(ops.depthwise, *operands, *rest, begin=begin, end=end)
                assert torch.equal(call(), in_torch(monkeypatch, call))


def test_threads_change_nothing(kernel: str) -> None:
    x, w = torch.randn(700, 768), torch.randn(512, 768)
    panels, threads = ops.panels_from(ops.pack(w)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            rows = ops.pack(x)
            results.append((rows, ops.pack_columns(x), ops.product(rows, panels, 512, 768, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_four_threads_of_python_give_the_bits_of_one() -> None:
    torch.manual_seed(0)
    packed = pack(hubert_eff.build("conformer-debug+w1a1").eval())
    waves = [torch.randn(1, 16000 + 320 * i) for i in range(4)]

    def states(wav: Tensor) -> Tensor:
        with torch.inference_mode():
            return packed.hidden_states(wav)[0][-1]

    alone = [states(wav) for wav in waves]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(alone, threads.map(states, waves)))


def test_operands_of_the_wrong_shape_are_refused(kernel: str) -> None:
    a, b = ops.pack(torch.randn(4, 64)), ops.panels_from(ops.pack(torch.randn(20, 64)))
    wrong: list[Callable[[], Tensor]] = [
        lambda: ops.product(a, b, 48, 64, True),
        lambda: ops.product(a, b, 20, 128, True),
        lambda: ops.product(a[:, :1], b, 20, 32, True),
        lambda: ops.product(a, b, 20, 64, True, None, torch.rand(19)),
        lambda: ops.product(a, b, 20, 64, True, None, None, torch.rand(21)),
        lambda: ops.product_bits(a, b, 20, 64, torch.zeros(19, dtype=torch.int32)),
        lambda: ops.depthwise(b[None], a[:1, :1], b[:, :1], 20, 3, 1, 4, True),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


def test_shapes_are_known_without_running() -> None:
    a, b, limit = ops.pack(torch.randn(2, 5, 40)), ops.panels_from(ops.pack(torch.randn(2, 20, 40))), torch.zeros(20, dtype=torch.int32)
    x, valid, filters = ops.pack_columns(torch.randn(2, 33, 20)), torch.zeros(2, 2, dtype=torch.int32), b[0][:, :1]
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.pack, (torch.randn(2, 5, 40),)), (ops.pack_columns, (torch.randn(2, 5, 40),)), (ops.product, (a, b, 20, 40, True)),
        (ops.product_bits, (a, b, 20, 40, limit)), (ops.depthwise, (x, valid, filters, 20, 3, 1, 33, False)),
        (ops.pack_columns, (torch.randn(2, 5, 40), None, None, 15, 15)),
        (ops.depthwise, (x, None, filters, 20, 3, 1, 33, False, None, None, None, False, 0, 33)),
    ):  # fmt: skip
        torch.library.opcheck(op, args, test_utils=checks)


# -- layers, against simulated ones --------------------------------------------------------------------------------------------


def started(module: nn.Module, valid: Tensor | None = None, zero: bool = False) -> nn.Module:
    """With scales, moves and biases as training leaves them, or at zero, where sums of integers tie; padding as given."""
    frames = FrameMask()
    frames.valid = valid
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Quantizer):
                part.frames = frames
                part.scale.uniform_(0.3, 1.5)
                part.initialized.fill_(True)
                if part.move is not None and not zero:
                    part.move.normal_(std=0.3)
            bias = getattr(part, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias) if zero else nn.init.normal_(bias, std=0.3)
    return module.eval()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@torch.no_grad()
def test_linear(zero: bool, per_channel: bool) -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((256, 64), (37, 50), (1, 1)):
        for signed in (True, False):
            layer = started(BinaryLinear(inputs, outputs, signed=signed, per_channel=per_channel), zero=zero)
            packed, x = PackedLinear.from_binary(layer), torch.randn(2, 30, inputs)
            assert torch.equal(packed(x), layer(x))
            assert torch.equal(packed(x[0, 0]), layer(x[0, 0]))
            half = packed(x.bfloat16())
            assert half.dtype == torch.bfloat16 and torch.equal(half, layer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "groups"),
    [(40, 40, 5, 1, 40), (9, 9, 31, 1, 9), (17, 17, 70, 2, 17), (12, 6, 3, 1, 3), (80, 64, 3, 2, 2), (33, 20, 1, 1, 1), (8, 16, 3, 1, 8)],
)
@torch.no_grad()
def test_convolution(channels: int, out: int, kernel: int, stride: int, groups: int) -> None:
    torch.manual_seed(0)
    x, valid = torch.randn(2, 50, channels), torch.ones(2, 50, dtype=torch.bool)
    valid[1, 33:] = False
    for signed in (True, False):
        for per_channel in (True, False):
            for mask in (None, valid):
                layer = BinaryConv1d(channels, out, kernel, stride=stride, groups=groups, signed=signed, per_channel=per_channel)
                started(layer, mask)
                assert torch.equal(PackedConv1d.from_binary(layer)(x), layer(x))


@torch.no_grad()
def test_two_bits_are_refused() -> None:
    with pytest.raises(UserError, match="activations of 2 bits"):
        pack(BinaryLinear(8, 8, bits=2))
    with pytest.raises(UserError, match="no one-bit layers"):
        pack(nn.Linear(8, 8))


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_a_packed_model_equals_the_simulated_one(encoder: str) -> None:
    wav, padding = torch.randn(2, 12_000), torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    for policy, zero in (("default", False), ("default", True), ("paper", False)):
        model = debug(encoder, policy, zero)
        for mask in (None, padding):
            expected, _ = model.hidden_states(wav, mask) if mask is not None else (model.hidden_states(wav)[0], None)
            for fused in (False, True):
                packed = pack(model, fused)
                assert not [m for m in packed.modules() if isinstance(m, (BinaryLinear, BinaryConv1d, BinaryAttention, Quantizer))]
                states, _ = packed.hidden_states(wav, mask)
                assert differing(states, expected) == 0, (policy, zero, fused)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_every_layer_has_the_same_bits_and_sums(encoder: str, zero: bool) -> None:
    """Each packed layer is given what the simulated one of the same name was given."""
    model = debug(encoder, "paper", zero)
    layers, seen = dict(pack(model, fused=False).named_modules()), {"bits": 0, "sums": 0, "results": 0}

    def compare(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        packed, x = layers[name], args[0]
        if isinstance(module, BinaryLinear):
            assert isinstance(packed, PackedLinear)
            values = x.values if isinstance(x, Codes) else module.input(x).values  # type: ignore[misc]
            signed = bool((values < 0).any())
            bits = ops.pack(values) if isinstance(x, Codes) else packed.input(x).bits  # type: ignore[misc]
            assert torch.equal(ops.bits_from(bits, module.in_features), values > 0), name
            signs, _ = weight_signs(module.weight, module.per_channel)
            sums = ops.product(bits, packed.bits, module.out_features, module.in_features, signed)
            assert torch.equal(sums, values @ signs.T) and torch.equal(sums, sums.round()), name
            seen["bits"], seen["sums"] = seen["bits"] + values.numel(), seen["sums"] + sums.numel()
            args = (PackedCodes(bits, x.scale, module.in_features, signed, False),) if isinstance(x, Codes) else args
        if isinstance(output, Tensor):
            assert torch.equal(packed(*args), output), name
            seen["results"] += 1

    for name, module in model.named_modules():
        if isinstance(module, (BinaryLinear, BinaryConv1d, BinaryAttention)):
            module.register_forward_hook(lambda *call, name=name: compare(name, *call))
    model.hidden_states(torch.randn(2, 12_000))
    assert seen["bits"] > 10_000 and seen["sums"] > 10_000 and seen["results"] > 5


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("encoder", ["transformer", "sparseformer"])
@torch.no_grad()
def test_projections_hand_over_bits_of_whole_heads(encoder: str, zero: bool) -> None:
    wav, padding = torch.randn(2, 12_000), torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    model = debug(encoder, zero=zero, encoder_attention_heads=2)
    packed = pack(model)
    assert len([m for m in packed.modules() if isinstance(m, PackedLinear) and m._reader]) == 6  # q, k and fc1 of two blocks
    for mask in (None, padding):
        assert differing(packed.hidden_states(wav, mask)[0], model.hidden_states(wav, mask)[0]) == 0
    states = pack(model, rest=torch.bfloat16).hidden_states(wav)[0]
    apart = pack(model, fused=False, rest=torch.bfloat16).hidden_states(wav)[0]
    assert torch.cosine_similarity(states[1].float().flatten(), apart[1].float().flatten(), 0) > 0.99
    compiled = torch.compile(packed.encoder.layers[0].self_attn.q_proj, backend="aot_eager")
    codes = packed.encoder.layers[0].self_attn.qkv_input(torch.randn(1, 9, 64))
    assert torch.equal(compiled(codes).bits, packed.encoder.layers[0].self_attn.q_proj(codes).bits)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_rest_computes_in_the_dtype_asked_for(encoder: str) -> None:
    model, wav = debug(encoder), torch.randn(2, 12_000)
    expected = model.hidden_states(wav)[0]
    packed = pack(model, rest=torch.bfloat16)
    bits = {id(p) for m in packed.modules() if isinstance(m, (PackedLinear, PackedConv1d, PackedQuantizer)) for p in m.parameters()}
    dtypes = {p.dtype for p in packed.parameters() if id(p) not in bits}
    assert dtypes == {torch.bfloat16} and bits
    assert {p.dtype for p in packed.parameters() if id(p) in bits} == {torch.float32, torch.int32}
    states, _ = packed.hidden_states(wav)  # audio as it comes, in float32
    assert {state.dtype for state in states} == {torch.bfloat16}
    assert torch.cosine_similarity(states[0].float().flatten(), expected[0].flatten(), 0) > 0.999
    assert torch.cosine_similarity(states[1].float().flatten(), expected[1].flatten(), 0) > 0.97  # bits near their threshold may flip
    whole = pack(copy.deepcopy(model).bfloat16())
    assert {p.dtype for p in whole.parameters()} == {torch.float32, torch.int32}
    with pytest.raises(UserError, match="rest=torch.float16: .*torch.float32, torch.bfloat16"):
        pack(model, rest=torch.float16)


@torch.no_grad()
def test_feed_forward_layers_are_joined() -> None:
    for encoder, pairs in (("transformer", 2), ("conformer", 4)):
        joined = [m for m in pack(debug(encoder)).modules() if isinstance(m, PackedLinear) and m._reader]
        assert len(joined) == pairs
        assert not [m for m in pack(debug(encoder), fused=False).modules() if isinstance(m, PackedLinear) and m._reader]


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "zipformer"])
@torch.no_grad()
def test_a_packed_model_costs_the_same(encoder: str) -> None:
    model, wav = debug(encoder, "paper"), torch.randn(1, 8_000)
    packed, counted = pack(model), []
    with torch.no_grad():
        model.encoder.pos_conv[0].fold()  # as packing does
    for which in (model, packed):
        with count_operations(which) as counts:
            which.hidden_states(wav)
        by_kind = {kind: tally.macs_by_bits for kind, tally in counts.by_kind().items() if tally.macs}
        counted.append((by_kind, paper_storage(which), file_storage(which), quant_report(which)))
    assert counted[0] == counted[1]


@torch.no_grad()
def test_copies_and_states_are_the_same_model() -> None:
    model, wav = debug("conformer"), torch.randn(1, 8_000)
    packed = pack(model)
    expected, _ = packed.hidden_states(wav)
    assert not any(p.requires_grad for p in packed.parameters())
    other = pack(hubert_eff.binarize(hubert_eff.build("conformer-debug")))
    other.hidden_states(wav)  # whatever it keeps between calls is its own
    other.load_state_dict(packed.state_dict())
    for same in (copy.deepcopy(packed), other):
        assert differing(same.hidden_states(wav)[0], expected) == 0
    assert differing(model.hidden_states(wav)[0], expected) == 0
    compiled = torch.compile(packed.encoder.layers[0].ffn1, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 9, 64)
    assert torch.equal(compiled(x), packed.encoder.layers[0].ffn1(x))
    assert packed.bfloat16().hidden_states(wav.bfloat16())[0][-1].isfinite().all()


# -- finding the kernels -------------------------------------------------------------------------------------------------------


def test_kernels_that_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "avx3")
    with pytest.raises(UserError, match="unknown kernel in HUBERT_EFF_KERNEL 'avx3'.*Known: amx, avx2, avx512bw"):
        kernel_in_use()
    absent = [kernel for kernel in KERNELS if kernel != "torch" and not runs(kernel)]
    assert absent  # no processor has all of them
    monkeypatch.setenv(loader.VARIABLE, absent[0])
    with pytest.raises(UserError, match=f"HUBERT_EFF_KERNEL={absent[0]}: .*unset it"):
        ops.pack(torch.randn(2, 2))


@pytest.fixture
def forget() -> Iterator[None]:
    """Nothing of what was loaded is remembered, before and after."""
    caches = (loader._library, loader._load, loader._best)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("compiler", ["", "false"])
def test_without_a_compiler_it_runs_in_torch_and_says_so_once(
    forget: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="run in plain torch, slower than float ones: .*compiler|false") as said:
        assert kernel_in_use() == "torch"
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.pack(torch.tensor([[1.0, -1.0, 2.0]])), torch.tensor([[5]], dtype=torch.int32))


@pytest.mark.long
def test_processes_that_compile_at_the_same_time(tmp_path: Path) -> None:
    script = "from hubert_eff.quant.runtime import kernel_in_use; print(kernel_in_use())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), loader.VARIABLE: ""}
    started = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {process.communicate(timeout=300)[0].strip() for process in started}
    assert names == {kernel_in_use()}
    (kept,) = (tmp_path / "hubert-eff").iterdir()
    assert kept.suffix == ".so"
    kept.write_bytes(b"")  # as a crash of the machine may leave it: made anew
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == kernel_in_use(), done.stderr


DRIVER = Path(__file__).with_name("kernels_driver.cpp")


PLAIN = ["-std=c++17", "-ffp-contract=off", "-pthread", f"-I{loader.SOURCE.parent}", str(DRIVER)]
TILES = f'-DHUBERT_EFF_TILES="{Path(__file__).parents[1] / "helpers" / "tiles.h"}"'


@pytest.mark.long
@pytest.mark.parametrize(
    "sanitizers", [["-O1", "-fsanitize=address,undefined"], ["-O3", "-fsanitize=undefined"]], ids=["address", "undefined"]
)
def test_nothing_is_read_or_written_out_of_bounds(sanitizers: list[str], tmp_path: Path) -> None:
    """Random shapes under AddressSanitizer and UndefinedBehaviorSanitizer, each operand in an allocation of exactly its size.

    The second build, as optimized as the library, once gave other bits: the compiler widened a mask of 16 lanes without clearing the rest.
    """
    compiler = loader._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "driver"
    flags = [*sanitizers, "-g", "-fno-sanitize-recover=all", "-o", str(driver)]
    stand_in = [TILES] if runs("avx2") else []  # products on AMX, with scalar code in the place of its instructions
    subprocess.run([*compiler, *flags, *stand_in, *PLAIN], check=True)
    done = subprocess.run([str(driver), "400"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [kernel for kernel in KERNELS if kernel != "torch" and runs(kernel)] + [loader.AMX for _ in stand_in]
    assert all(f"{kernel}: 400 shapes" in done.stdout for kernel in kernels)


@pytest.mark.long
def test_neon_under_an_emulator(tmp_path: Path) -> None:
    """The same shapes through the kernel for ARM. Debian: apt-get install g++-aarch64-linux-gnu qemu-user."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if platform.machine() == "aarch64" or compiler is None or emulator is None:
        pytest.skip("needs a cross compiler and an emulator (or nothing, on aarch64)")
    driver = tmp_path / "driver"
    subprocess.run([compiler, "-O3", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(driver), *PLAIN], check=True)
    done = subprocess.run([emulator, str(driver), "200"], capture_output=True, text=True)
    assert done.stdout == "neon: 200 shapes\n" and done.returncode == 0, done.stdout + done.stderr
