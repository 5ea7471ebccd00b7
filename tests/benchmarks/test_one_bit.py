"""The peers of one-bit layers compute what float layers do, within their precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ..helpers.paths import ROOT


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/speed, imported as its scripts import them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "speed")
    import int8_linear
    import one_bit

    yield int8_linear, one_bit
    for name in set(sys.modules) - before:
        if name in ("harness", "int8_linear", "larq_layer", "one_bit"):
            del sys.modules[name]


@torch.no_grad()
def test_int8_products_of_onednn(benchmarks: Any) -> None:
    int8_linear, _ = benchmarks
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model, x = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 33, bias=False)).to(dtype), torch.randn(2, 9, 96).to(dtype)
        small = int8_linear.with_int8_linears(model)
        if small is None:
            pytest.skip("this torch has no int8 products of oneDNN")
        y, expected = small(x), model(x)
        assert y.dtype == dtype and y.shape == expected.shape and type(model[0]) is nn.Linear
        assert (y - expected).norm() < 0.04 * expected.norm()


@torch.no_grad()
def test_the_ratio_that_counts_is_the_one_against_the_fastest(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, one_bit = benchmarks
    rows = one_bit.rows_of("layer", {"slow": lambda: torch.randn(1 << 20), "fast": lambda: None}, lambda: None, 3)
    assert {row["sides"][0]: row["best"] for row in rows} == {"slow": False, "fast": True}
    one_bit.harness.show(rows, {}, False)
    assert "one bit" in capsys.readouterr().out.split("Against the fastest of its peers:")[1]
