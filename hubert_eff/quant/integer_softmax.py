"""Finds the keys that a query attends to at one bit by integers alone, for the simulation in eval mode and for packed attention.

Queries and keys of one bit have scores that are an integer times a scale: each of the K bits that differ lowers the score by twice the
scale. So softmax needs no exp per key:

    cost      of a key: the number of bits that differ, times `cost_of_bit`, an integer in units of 2^-16 octaves (powers of two of the
              probability); with relative positions the sum of two such terms
    weight    w = 2^24 * 2^-gap of a key, an integer; gap: its cost, less that of the query's cheapest visible key
    bit       w > floor(threshold * sum w / visible), the sum running over the visible keys: visible * P > threshold

Sums of integers do not depend on their order. The last line is a product and a quotient in float64, each rounded once, and w is the same
polynomial in integers everywhere, so bits do not depend on the instruction set, on padding, or on how queries or keys are cut. Kernels
(kernels/attention.h) compute the same. Training and traced graphs (ONNX) keep `torch.softmax`, from which this differs by up to 2e-4
relatively.
"""

# n queries, keys

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers.bits import Cost, counted_as
from ..layers.tracing import follows_shapes

OCTAVE = 1 << 16  # units of cost that halve a weight
DEAREST = 30 * OCTAVE  # maximum cost of a bit, which already leaves nothing of a weight
PIECE = 1 << 16  # costs that are processed together and stay in cache
HIDDEN = 2**31 - 1  # the cost of a key that is not visible
POLYNOMIAL = (65535, 45286, 15069, 2551)  # 2^16 * 2^-x, 0 <= x < 1, within 1e-4: c0 - x (c1 - x (c2 - x c3))


def cost_of_bit(scale: Tensor, bits: int) -> Tensor:
    """The cost of one differing bit of `bits`, int32 (1,); each lowers the score by 2 scale; scale (1,)."""
    octaves = scale.detach().double() * (2 / math.log(2))
    return (octaves * OCTAVE).round().nan_to_num(nan=0.0).clamp(max=min(DEAREST, (1 << 30) // bits)).to(torch.int32)


def weights_(gaps: Tensor) -> Tensor:
    """Integers 2^24 * 2^-gap, of int32 gaps >= 0 in units of cost; in place."""
    places = (gaps >> 16).clamp_(max=31)
    x = gaps.bitwise_right_shift_(1).bitwise_and_((1 << 15) - 1)  # 15 bits: products stay below 2^31
    c0, c1, c2, c3 = POLYNOMIAL
    y = (x * c3).bitwise_right_shift_(15).neg_().add_(c2)
    y.mul_(x).bitwise_right_shift_(15).neg_().add_(c1)
    x.mul_(y).bitwise_right_shift_(15).neg_().add_(c0)
    return x.bitwise_left_shift_(8).bitwise_right_shift_(places)


@counted_as("attention", lambda costs, *_: Cost(0, 2 * costs.numel()))  # a weight and a comparison
def attended_(costs: Tensor, visible: Tensor | int, threshold: Tensor) -> Tensor:
    """Compute 1 for the keys attended to and 0 for others, int32, in place, from costs (..., n, keys) int32, `HIDDEN` for invisible keys.

    visible: number of visible keys, (..., 1); threshold (1,): what visible * P must exceed. A query without a visible key attends to none.
    """
    rows = costs.flatten(0, -2)  # contiguous: a view
    step = rows.size(0) if follows_shapes(costs) else max(1, PIECE // rows.size(1))
    best = rows.amin(-1, keepdim=True)
    parts = zip(torch.split(rows, step), torch.split(best, step), strict=True)
    total = torch.cat([weights_(part.sub_(least)).sum(-1, keepdim=True) for part, least in parts])
    share = total.view(*costs.shape[:-1], 1).double() * threshold.double() / visible
    share.masked_fill_(best.view_as(share) == HIDDEN, HIDDEN).nan_to_num_(nan=HIDDEN).clamp_(max=HIDDEN)
    return costs.gt_(share.floor_().to(torch.int32))
