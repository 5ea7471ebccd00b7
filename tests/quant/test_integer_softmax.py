"""One-bit attention by integers: its arithmetic, every kernel against plain torch, packed forms against simulated ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hubert_eff.layers.sparse_pattern import SparsePattern
from hubert_eff.quant import Quantizer, pack
from hubert_eff.quant.attention import BinaryAttention, BinaryMix, BinaryRelativeAttention, BinarySparseAttention, BinaryWeights
from hubert_eff.quant.integer_softmax import HIDDEN, attended_, cost_of_bit, weights_
from hubert_eff.quant.modules import FrameMask
from hubert_eff.quant.runtime import attention as packed_forms
from hubert_eff.quant.runtime import ops

from ..helpers.packed import in_torch

PATTERNS = (SparsePattern("fixed", 32, 8, 64), SparsePattern("fairseq", 16, 3, 1), SparsePattern("local", 1, 1, 20))


# -- the arithmetic --------------------------------------------------------------------------------------------------------


def test_weights_fall_and_are_powers_of_two() -> None:
    gaps = torch.arange(32 << 16, dtype=torch.int32)
    weights = weights_(gaps.clone())
    assert bool((weights[1:] <= weights[:-1]).all()) and weights[0] < 1 << 24 and weights[-1] == 0
    exact = weights[0] * torch.exp2(-gaps.double() / (1 << 16))
    assert float(((weights - exact).abs() / (exact + 1)).max()) < 1
    assert float(((weights - exact).abs() / exact)[: 8 << 16].max()) < 3e-4
    assert weights_(torch.tensor([HIDDEN], dtype=torch.int32)).item() == 0


def integer_weight(gap: int) -> int:
    """The weight of a gap, in Python's integers."""
    x = gap >> 1 & 0x7FFF
    y = 65535 - ((45286 - ((15069 - (2551 * x >> 15)) * x >> 15)) * x >> 15)
    return y << 8 >> min(gap >> 16, 31)


def test_bits_are_those_of_python_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBERT_EFF_KERNEL", "torch")
    q, k, scale, threshold = torch.randn(1, 1, 9, 40), torch.randn(1, 1, 21, 40), torch.tensor([0.13]), torch.tensor([0.7])
    seen = torch.rand(1, 21) < 0.7
    bits = ops.attention(ops.pack(q), ops.panels_from(ops.pack(k)), 21, 40, cost_of_bit(scale, 40), threshold, ops.pack(seen.float()))
    bits = ops.bits_from(bits, 21)[0, 0].tolist()
    cost = round(2 * float(scale) / math.log(2) * 65536)
    keys = [j for j in range(21) if seen[0, j]]
    for i in range(9):
        costs = [int(((q[0, 0, i] > 0) != (k[0, 0, j] > 0)).sum()) * cost for j in range(21)]
        weights = {j: integer_weight(costs[j] - min(costs[key] for key in keys)) for j in keys}
        least = math.floor(sum(weights.values()) * float(threshold) / len(keys))
        assert bits[i] == [j in weights and weights[j] > least for j in range(21)]
    assert 0 < sum(map(sum, bits)) < 9 * len(keys)


def test_bits_are_those_of_softmax_but_at_the_threshold() -> None:
    sums = 64 - 2 * torch.randint(10, 55, (40, 500)).float()
    for scale in (0.02, 0.11, 0.7, 5.0):
        cost = cost_of_bit(torch.tensor([scale]), 64)
        bits = attended_(torch.rsub(sums, 32, alpha=0.5).int() * cost, 500, torch.tensor([0.8])).bool()
        x = torch.softmax(sums.double() * scale, -1) * 500
        near = (x / 0.8 - 1).abs() < 3e-4
        assert torch.equal(bits[~near], (x > 0.8)[~near]) and near.double().mean() < 0.1 and bits.any()


def test_the_sum_depends_on_neither_order_nor_padding_nor_cut(kernel: str) -> None:
    q, k, cost, threshold = torch.randn(2, 3, 70, 36), torch.randn(2, 3, 70, 36), cost_of_bit(torch.tensor([0.1]), 36), torch.tensor([0.9])

    def bits(q: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
        words = None if seen is None else ops.pack(seen.float())
        found = ops.attention(ops.pack(q), ops.panels_from(ops.pack(k)), k.size(2), 36, cost, threshold, words)
        return ops.bits_from(found, k.size(2))

    whole = bits(q, k)
    order = torch.randperm(70)
    assert torch.equal(bits(q, k[:, :, order]), whole[..., order])
    assert torch.equal(torch.cat([bits(part, k) for part in q.split((1, 30, 39), 2)], 2), whole)
    padded = torch.cat((k, torch.randn(2, 3, 45, 36)), 2)
    seen = (torch.arange(115) < 70).expand(2, -1)
    assert torch.equal(bits(q, padded, seen), torch.cat((whole, torch.zeros(2, 3, 70, 45, dtype=torch.bool)), -1))


# -- kernels, against plain torch ------------------------------------------------------------------------------------------


def shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """Batch, heads, queries, keys, channels: one frame, channels that fill no word, as many as kernels take and one more, long input."""
    yield from [(1, 1, 1, 1, 1), (2, 3, 40, 40, 64), (1, 2, 130, 130, 36), (1, 1, 16, 200, 64), (1, 2, 2, 3000, 100)]
    yield from [(1, 1, 5, 70, 239), (1, 1, 5, 70, 240)]


def masks(batch: int, *keys: int) -> Iterator[Tensor | None]:
    """All keys, some, none."""
    yield None
    for share in (0.6, 0.0):
        yield ops.pack((torch.rand(batch, *keys) < share).float())


def test_kernels(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = 0
    for batch, heads, n, keys, width in shapes():
        places = width // 2 + 1
        q, p = ops.pack(torch.randn(batch, heads, n, width)), ops.pack(torch.randn(batch, heads, n, places))
        k = ops.panels_from(ops.pack(torch.randn(batch, heads, keys, width)))
        offsets = ops.panels_from(ops.pack(torch.randn(heads, 2 * keys - 1, places)))
        for scale in (0.05, 3.0):
            cost, of_place = (cost_of_bit(torch.tensor([s]), width) for s in (scale, scale * 1.3))
            threshold, both = torch.tensor([0.7]), torch.cat((cost, of_place))
            for seen in masks(batch, keys):
                calls: list[Callable[[], Tensor]] = [
                    partial(ops.attention, q, k, keys, width, cost, threshold, seen),
                    partial(ops.attention, q, k, keys, width, cost, threshold, seen, keys - n, 9),
                    partial(ops.attention, q, k, keys, width, cost, threshold, seen, 0, 0),
                    partial(ops.relative_attention, q, p, k, offsets, keys, width, places, both, threshold, seen, keys - n),
                    partial(ops.relative_attention, q, p, k, offsets, keys, width, places, both, threshold, seen, 0),
                ]
                for call in calls:
                    bits = call()
                    assert torch.equal(bits, in_torch(monkeypatch, call)), (call.func, n, keys, width, scale)  # type: ignore[attr-defined]
                    found += int((bits != 0).sum())
    assert found


def test_kernels_of_blocks(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for blocks, n, keys, shared, width in ((1, 1, 1, 0, 1), (3, 16, 12, 40, 64), (2, 70, 33, 1, 36), (4, 5, 0, 65, 64), (1, 2, 3, 700, 20)):
        q, k = ops.pack(torch.randn(2, 2, blocks, n, width)), ops.panels_from(ops.pack(torch.randn(2, 2, blocks, keys, width)))
        far = ops.panels_from(ops.pack(torch.randn(2, 2, shared, width)))
        for seen, shared_seen in zip(masks(2, blocks, keys), masks(2, shared), strict=True):
            cost, threshold = cost_of_bit(torch.tensor([0.1]), width), torch.tensor([0.8])
            call = partial(ops.blocked_attention, q, k, far, keys, shared, width, cost, threshold, seen, shared_seen)
            assert torch.equal(call(), in_torch(monkeypatch, call)), (blocks, n, keys, shared)


def test_operands_of_the_wrong_shape_are_refused(kernel: str) -> None:
    q, k, cost, threshold = ops.pack(torch.randn(1, 2, 5, 64)), ops.pack(torch.randn(1, 2, 20, 64)), torch.ones(1).int(), torch.ones(1)
    panels, offsets = ops.panels_from(k), ops.panels_from(ops.pack(torch.randn(2, 39, 64)))
    wrong: list[Callable[[], Tensor]] = [
        lambda: ops.attention(q, panels, 40, 64, cost, threshold),
        lambda: ops.attention(q, panels, 20, 128, cost, threshold),
        lambda: ops.attention(q, panels, 20, 64, cost.float(), threshold),
        lambda: ops.attention(q, panels, 20, 64, cost, torch.ones(2)),
        lambda: ops.attention(q, panels, 20, 64, cost, threshold, torch.zeros(1, 2, dtype=torch.int32)),
        lambda: ops.relative_attention(q, q, panels, offsets, 20, 64, 64, cost, threshold),
        lambda: ops.relative_attention(q, q, panels, offsets[:, :2], 20, 64, 64, cost.repeat(2), threshold),
        lambda: ops.relative_attention(q, q, panels, offsets, 20, 64, 64, cost.repeat(2), threshold, None, 16),
        lambda: ops.blocked_attention(q.unsqueeze(2), panels.unsqueeze(2), panels, 20, 40, 64, cost, threshold),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


def test_shapes_are_known_without_running() -> None:
    q, k, cost, threshold = ops.pack(torch.randn(1, 2, 5, 40)), ops.pack(torch.randn(1, 2, 35, 40)), torch.ones(1).int(), torch.ones(1)
    panels, offsets = ops.panels_from(k), ops.panels_from(ops.pack(torch.randn(2, 69, 40)))
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.attention, (q, panels, 35, 40, cost, threshold)),
        (ops.relative_attention, (q, q, panels, offsets, 35, 40, 40, cost.repeat(2), threshold)),
        (ops.blocked_attention, (q.unsqueeze(2), panels.unsqueeze(2), panels, 35, 35, 40, cost, threshold)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


# -- packed forms, against simulated ones ----------------------------------------------------------------------------------


def started(module: nn.Module, valid: Tensor | None = None) -> nn.Module:
    """In eval mode, with scales as training leaves them; padding as given."""
    frames = FrameMask()
    frames.valid = valid
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Quantizer):
                part.frames = frames
                part.scale.uniform_(0.5, 1.2)
                part.initialized.fill_(True)
                part._ready = True
    return module.eval()


class Shared(nn.Module):
    """Zipformer's weights with two users, of all heads and of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.all, self.first = BinaryWeights(1, {}), BinaryMix(1, {}), BinaryMix(1, {})

    def forward(self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        weights = self.weights(q, k, p, offsets, seen, 0.0)
        return torch.cat((self.all(v, weights), self.first(v[:, :1], weights)), 1)


def forms(frames: int, width: int, padded: bool) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """Each form, and what to call it with."""
    q, other, k, v = torch.randn(4, 2, 3, frames, width).unbind(0)
    r, valid = torch.randn(3, 2 * frames - 1, width), torch.arange(frames) < torch.tensor([[frames], [2 * frames // 3 + 1]])
    attend, mask = (valid[:, None, None], valid) if padded else (None, None)
    yield started(BinaryAttention(1, {}), mask), (q, k, v, attend, 0.0)
    yield started(BinaryRelativeAttention(1, {}), mask), (q, other, k, r, v, attend, 0.0)
    for pattern in PATTERNS:
        yield started(BinarySparseAttention(1, {}), mask), (q, k, v, attend, 0.0, pattern)
    yield started(Shared(), mask), (q, k, other[..., :4], r[..., :4], v, valid[:, None] if padded else None)


@torch.no_grad()
def test_packed_forms_equal_the_simulated_ones(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for frames, width, padded in ((1, 64, False), (150, 36, True), (200, 64, False), (40, 33, True)):
        for module, inputs in forms(frames, width, padded):
            expected, packed = module(*inputs), pack(module)
            assert bool(expected.isfinite().all()) and (frames == 1 or 0.02 < (expected != 0).float().mean())
            assert torch.equal(packed(*inputs), expected), (type(module), frames, padded)
            with monkeypatch.context() as patch:  # as long input is cut, and computed anew
                patch.setattr(packed_forms, "BITS", 1)
                patch.setattr(packed_forms, "KEPT", 1)
                assert torch.equal(packed(*inputs), expected), (type(module), frames, padded)


@torch.no_grad()
def test_a_query_without_visible_keys_gets_zeros(kernel: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 64).unbind(0)
    attend = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    attend[1] = False
    for module, rest in ((BinaryAttention(1, {}), ()), (BinarySparseAttention(1, {}), (PATTERNS[0],))):
        for form in (started(module), pack(module)):
            mixed = form(q, k, v, attend, 0.0, *rest)
            assert mixed[0].any() and not mixed[1].any()


@torch.no_grad()
def test_threads_change_nothing(kernel: str) -> None:
    ((module, inputs),) = [found for found in forms(300, 64, False) if type(found[0]) is BinaryRelativeAttention]
    packed, threads = pack(module), torch.get_num_threads()
    expected = packed(*inputs)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(mixed, expected) for mixed in pool.map(lambda _: packed(*inputs), range(8)))
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed(*inputs), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_gradient_in_eval_mode_is_that_of_training() -> None:
    module, (q, k, v, *rest) = next(forms(60, 64, True))
    with torch.no_grad():
        expected = module(q, k, v, *rest)
    grads = []
    for training in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mixed = module.train(training)(*leaves, *rest)
        (mixed * q).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
        if not training:
            assert torch.equal(mixed.detach(), expected)
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any() and float((ours - theirs).norm() / theirs.norm()) < 0.1  # bits at the threshold may differ


@torch.no_grad()
def test_a_trace_keeps_softmax() -> None:
    module, (q, k, v, *_) = next(forms(30, 64, False))
    module.requires_grad_(False)
    traced = torch.jit.trace(lambda *x: module(*x, None, 0.0), (q, k, v))
    assert "aten::softmax" in str(traced.graph)
