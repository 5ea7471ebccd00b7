"""Running in chunks: what a frame may see of an utterance that comes in pieces, and what a stream keeps between pieces."""

# B batch, T frames, C channels, H heads, d head dim, n chunks

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Table = TypeVar("Table", Tensor, "Tensor | None")


@dataclass(frozen=True)
class Chunks:
    """How a model runs chunk by chunk.

    A frame attends to its own chunk and to `left` chunks before it; no convolution sees beyond the end of its frame's chunk.

    Without `kept` an utterance is computed at once, under masks (in training, and as the reference of streaming). With `kept` one chunk is
    computed, and `kept` holds what later chunks need: keys and values of attention, and the last input frames of convolutions.
    """

    size: int  # frames of a chunk
    left: int  # chunks; -1: all
    kept: dict[nn.Module, tuple[Tensor, ...]] | None = None
    tables: dict[Hashable, tuple[int, Tensor | None]] = field(default_factory=dict)  # in a stream: positions, which chunks share
    start: int = 0  # in a stream: number of frames before this chunk

    def at_rate(self, rate: int) -> Chunks:
        """The same at a lower rate: one frame stands for `rate` of these; `size` and `start` are multiples of it."""
        return replace(self, size=self.size // rate, start=self.start // rate)

    # -- attention ---------------------------------------------------------------------------------------------------

    def visible(self, frames: int, device: torch.device) -> Tensor:
        """(1, 1, T, T) bool: the keys that each query of an utterance may see."""
        number = torch.arange(frames, device=device) // self.size
        distance: Tensor = number[:, None] - number
        seen: Tensor = distance >= 0
        if self.left >= 0:
            seen = seen & (distance <= self.left)
        return seen[None, None]

    def keys(self, queries: int) -> int:
        """Number of keys of a chunk with so many queries: those that are kept, and its own."""
        if self.kept is None:
            return queries
        return queries + (self.start if self.left < 0 else min(self.start, self.left * self.size))

    def surplus(self, keys: int) -> int:
        """How many keys at the start of a stream's keys no later chunk sees."""
        return 0 if self.left < 0 else max(0, keys - self.left * self.size)

    @property
    def keys_before(self) -> int:
        """In a stream: number of keys of the previous chunk."""
        return replace(self, start=self.start - self.size).keys(self.size) if self.start else 0

    def with_kept(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        """Put the keys and values that `module` has kept in front of these, (B, H, T, d)."""
        if self.kept is None:
            return parts
        if module in self.kept:
            parts = tuple(torch.cat(pair, 2) for pair in zip(self.kept[module], parts, strict=True))
        surplus = self.surplus(parts[0].size(2))
        self.kept[module] = tuple(part[:, :, surplus:].clone() if surplus else part for part in parts)
        return parts

    def table(self, owner: Hashable, keys: int, make: Callable[[], Table]) -> Table:
        """`make()`, a table for so many keys; a stream makes it again only when their number changes."""
        if self.kept is None:
            return make()
        known = self.tables.get(owner)
        if known is None or known[0] != keys:
            known = self.tables[owner] = keys, make()
        return known[1]  # type: ignore[return-value]

    # -- convolution -------------------------------------------------------------------------------------------------

    def windows(self, module: nn.Module, x: Tensor, before: int, after: int) -> Tensor:
        """Cut x (B, T, C) into what the convolution of `module` sees: each chunk, `before` frames before it, and `after` zeros after it.

        Returns (B n, before + size + after, C), or one window for all of x if `after` is 0 or x is a chunk of a stream.
        """
        if self.kept is not None:
            (context,) = self.kept.get(module, (x.new_zeros(x.size(0), before, x.size(2)),))
            window = torch.cat((context, x), 1)
            self.kept[module] = (window[:, window.size(1) - before :].clone(),)
            return F.pad(window, (0, 0, 0, after)) if after else window
        if after == 0:
            return F.pad(x, (0, 0, before, 0))
        x = F.pad(x, (0, 0, before, -x.size(1) % self.size))
        cut = x.unfold(1, before + self.size, self.size).mT  # (B, n, before + size, C)
        return F.pad(cut.flatten(0, 1), (0, 0, 0, after))

    def convolved(self, module: nn.Module, x: Tensor, before: int, after: int, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `convolve` to the windows of x (B, T, C) and join the results: (B, T', C').

        Without gradient it goes chunk by chunk, as a stream does: in other shapes torch may sum in another order, and the last digit
        decides bits.
        """
        if self.kept is None and not torch.is_grad_enabled():
            x = F.pad(x, (0, 0, before, 0))
            cut = [x[:, start : start + before + self.size] for start in range(0, x.size(1) - before, self.size)]
            return torch.cat([convolve(F.pad(window, (0, 0, 0, after)) if after else window) for window in cut], 1)
        y = convolve(self.windows(module, x, before, after))
        return self.joined(y, x.size(0), y.size(0) * y.size(1) // x.size(0)).contiguous()  # gives later modules one layout

    @staticmethod
    def joined(y: Tensor, batch: int, frames: int) -> Tensor:
        """Reshape the output of a convolution of `windows`, (B n, T', C'), to (B, frames, C')."""
        return y.reshape(batch, -1, y.size(2))[:, :frames]


@dataclass
class Frames:
    """What a block may need to know of its input (B, T, D).

    `valid` marks the frames that are not padding and `attend` the keys that a query may see; None for all. `positions` is the table of an
    encoder with one, and `chunks` says how to run in chunks, None for the whole utterance.
    """

    valid: Tensor | None = None  # (B, T) bool, None = all frames are valid
    attend: Tensor | None = None  # bool, the keys that may be seen: (B, 1, 1, T), or in chunks (B, 1, T, T); None = all
    positions: Tensor | None = None  # encoder-specific positional table
    chunks: Chunks | None = None  # None = every frame may see every other
