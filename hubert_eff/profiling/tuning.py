"""Measures which form of each float layer is faster on this machine, for `hubert-eff doctor --tune`."""

# M rows, K inputs, N outputs, T frames

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from ..layers.attention import RelativeSelfAttention, _blockwise
from ..layers.choice import NEVER, Choice
from ..layers.linear import Linear, product
from .machine import seconds_of

ROWS = (16, 128, 384, 1536)  # measured sizes, from which on a form may be chosen
WEIGHTS = ((128, 128), (144, 576), (256, 768), (256, 1024), (768, 768), (768, 3072))  # K, N, by their number
FRAMES = (192, 384, 768, 1536)
HEADS, WIDTH = 4, 64
ROUNDS = 7
WORTH = 0.97  # our form is chosen if it takes at most this share of torch's time
SHORT = 5e-4  # seconds; a call is repeated until a round takes this long


def _is_faster(ours: Callable[[], object], stock: Callable[[], object]) -> bool:
    """Whether the median of `ours` is below that of `stock`, in rounds of both."""
    ours(), stock()
    times = max(1, round(SHORT / max(seconds_of(stock), 1e-7)))

    def repeated(call: Callable[[], object]) -> float:
        return seconds_of(lambda: [call() for _ in range(times)])

    pairs = [(repeated(ours), repeated(stock)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return bool(mine <= WORTH * theirs)


def _first(sizes: list[tuple[int, bool]]) -> float:
    """The smallest of rising sizes from which our form is always faster."""
    least = NEVER
    for size, is_faster in reversed(sizes):
        if not is_faster:
            break
        least = size
    return least


def _products(folded: bool) -> tuple[tuple[int, float], ...]:
    steps = []
    for rows in reversed(ROWS):
        found = []
        for inputs, outputs in WEIGHTS:
            layer, x = Linear(inputs, outputs), torch.randn(1, rows, inputs)
            layer = layer.fold() if folded else layer
            operands = x, layer.weight, layer.bias
            found.append((inputs * outputs, _is_faster(partial(product, *operands), partial(F.linear, *operands))))
        least = _first(found)
        if least != NEVER:
            steps.append((rows, least))
    return tuple(steps)


def _attention(relative: bool) -> float:
    module, found = RelativeSelfAttention(HEADS * WIDTH, HEADS).eval(), []
    for frames in FRAMES:
        q, k, v = torch.randn(3, 1, HEADS, frames, WIDTH).unbind(0)
        if relative:
            operands = q, q, k, v, torch.randn(HEADS, 2 * frames - 1, WIDTH), None
            faster = _is_faster(partial(module._blockwise, *operands), partial(module._chunked, *operands, 0.0))
        else:
            faster = _is_faster(partial(_blockwise, q, k, v, None), partial(F.scaled_dot_product_attention, q, k, v))
        found.append((frames, faster))
    return _first(found)


@torch.no_grad()
def tune() -> Choice:
    """Measure this machine with the current number of threads, for about ten seconds in which nothing else should run."""
    linear, folded = _products(False), _products(True)
    least = min((weights for _, weights in (*linear, *folded)), default=NEVER)
    return Choice(linear, folded, _attention(False), _attention(True), least)
