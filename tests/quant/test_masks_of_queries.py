"""Packed attention in which each query has its own visible keys: every kernel against plain torch, and against masks all queries share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hubert_eff.kernels import loader
from hubert_eff.quant.runtime import KERNELS, ops


@pytest.fixture(params=[kernel for kernel in KERNELS if kernel != "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not isinstance(loader._load(request.param), loader.Kernel):
        pytest.skip(f"this machine does not run {request.param}")
    monkeypatch.setenv(loader.VARIABLE, request.param)
    yield request.param


def test_each_query_sees_its_own_keys(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for queries, keys, width in ((1, 1, 16), (16, 80, 64), (5, 33, 36), (70, 150, 64), (130, 130, 20)):
        q, k = ops.pack(torch.randn(2, 3, queries, width)), ops.panels_from(ops.pack(torch.randn(2, 3, keys, width)))
        p, offsets = ops.pack(torch.randn(2, 3, queries, width)), ops.panels_from(ops.pack(torch.randn(3, 2 * keys - 1, width)))
        cost, threshold = torch.tensor([9_000, 7_000], dtype=torch.int32), torch.tensor([1.1])
        shared = torch.rand(2, 1, keys) > 0.4
        for seen in (torch.rand(2, queries, keys) > 0.4, shared.expand(-1, queries, -1)):
            words = ops.words_from(seen)
            results = []
            for name in (kernel, "torch"):
                monkeypatch.setenv(loader.VARIABLE, name)
                dense = ops.attention(q, k, keys, width, cost[:1], threshold, words)
                relative = ops.relative_attention(q, p, k, offsets, keys, width, width, cost, threshold, words, keys - queries)
                results.append((dense, relative))
            monkeypatch.setenv(loader.VARIABLE, kernel)
            for ours, expected in zip(*results, strict=True):
                assert torch.equal(ours, expected)
                assert not (ours & ~words.unsqueeze(1)).any()  # no bit where nothing is seen
            if seen.stride(1) == 0:
                assert torch.equal(results[0][0], ops.attention(q, k, keys, width, cost[:1], threshold, ops.words_from(shared[:, 0])))
    with pytest.raises(ValueError, match="visible keys must be words"):
        ops.attention(q, k, keys, width, cost[:1], threshold, words[:, 1:])
