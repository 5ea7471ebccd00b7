"""Products on AMX: the same source with scalar code in the place of the tile instructions, on any x86 processor; and when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hubert_eff.kernels import loader
from hubert_eff.quant import pack
from hubert_eff.quant.runtime import kernel_in_use, ops

from ..helpers.packed import debug, differing

TILES = Path(__file__).parents[1] / "helpers" / "tiles.h"


@pytest.fixture(scope="module")
def library() -> Iterator[None]:
    """The kernels compiled with the stand-in."""
    caches = (loader._library, loader._load, loader._best)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "FLAGS", (*loader.FLAGS, "-O1", f'-DHUBERT_EFF_TILES="{TILES}"'))
        patch.setattr(loader, "SOURCES", (*loader.SOURCES, TILES))
        for cached in caches:
            cached.cache_clear()
        if not isinstance(loader._load(loader.AMX), loader.Kernel):
            pytest.skip(f"no stand-in here: {loader._load(loader.AMX)}")
        yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def forced(library: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All products on AMX."""
    monkeypatch.setenv(loader.VARIABLE, loader.AMX)
    return monkeypatch


def test_products(forced: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(1, 1, 1), (16, 32, 64), (17, 48, 65), (33, 16, 96), (130, 70, 200), (300, 40, 320), (70, 33, 9000)]
    for rows, outputs, inputs in shapes + torch.randint(1, 100, (6, 3)).tolist():
        a, shared = ops.pack(torch.randn(2, rows, inputs)), ops.panels_from(ops.pack(torch.randn(outputs, inputs)))
        own = ops.panels_from(ops.pack(torch.randn(2, outputs, inputs)))
        scale, size, bias = torch.rand(1), torch.rand(outputs), torch.randn(outputs)
        limit = torch.randint(-1, inputs + 1, (outputs,), dtype=torch.int32)
        for b in (shared, own):
            calls = [
                lambda signed=signed, rest=rest, b=b: ops.product(a, b, outputs, inputs, signed, *rest)  # noqa: B023
                for signed in (True, False)
                for rest in ((), (scale, size, bias), (None, size[:1], None, True))
            ]
            for call in (*calls, lambda b=b: ops.product_bits(a, b, outputs, inputs, limit)):  # noqa: B023
                found = call()
                with forced.context() as patch:
                    patch.setenv(loader.VARIABLE, loader.TORCH)
                    assert torch.equal(found, call()), (rows, outputs, inputs)


def test_threads_change_nothing(forced: pytest.MonkeyPatch) -> None:
    rows, panels, threads = ops.pack(torch.randn(700, 256)), ops.panels_from(ops.pack(torch.randn(96, 256))), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.product(rows, panels, 96, 256, True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("encoder", ["transformer", "zipformer"])
@torch.no_grad()
def test_a_packed_model_equals_the_simulated_one(forced: pytest.MonkeyPatch, encoder: str) -> None:
    model, wav = debug(encoder), torch.randn(2, 12_000)
    assert differing(pack(model).hidden_states(wav)[0], model.hidden_states(wav)[0]) == 0


def test_small_products_are_summed_by_popcounts(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    assert kernel_in_use() == loader.AMX
    kernel = loader.current()
    assert kernel is not None
    popcount = loader.POPCOUNT if isinstance(loader._load(loader.POPCOUNT), loader.Kernel) else loader.AMX
    for rows, inputs, expected in ((16, 128, loader.AMX), (499, 768, loader.AMX), (15, 768, popcount), (499, 64, popcount)):
        assert loader.for_product(kernel, rows, inputs).name == expected
    assert "amx from 16 rows and 128 inputs on" in loader.described()["products"]
    monkeypatch.setenv(loader.VARIABLE, loader.AMX)
    assert loader.for_product(kernel, 1, 1).name == loader.AMX and loader.described()["products"] == loader.AMX
