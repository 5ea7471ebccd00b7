"""Watches a model that learns at one bit; failures show here long before the loss shows them."""

# B batch, T frames, C channels, H heads, d head dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..models.hubert import HubertModel
from .attention import Probabilities
from .functional import FLOOR, signed_range, weight_signs
from .modules import BinaryConv1d, BinaryLinear, Quantizer

BinaryLayer = BinaryLinear | BinaryConv1d


@dataclass
class Health:
    """Shares in [0, 1], by name of the quantizer or layer.

    saturated: the share of a quantizer's input outside its range, where no gradient passes.
    dead: the share of its channels whose code is the same at all valid frames of the batch; for attention probabilities, the share of
    queries that attend to nothing.
    flipped: the share of a layer's weights whose sign the update changed.
    """

    saturated: dict[str, float]
    dead: dict[str, float]
    flipped: dict[str, float]

    def by_block(self) -> dict[str, float]:
        """Means over the parts of each block: `saturated_0` ..., `dead_0` ..., `flipped_0` ..."""
        shares: dict[str, list[float]] = {}
        for measure, values in vars(self).items():
            for name, value in values.items():
                shares.setdefault(f"{measure}_{_block(name)}", []).append(value)
        return {key: sum(values) / len(values) for key, values in shares.items()}

    def worst(self) -> str:
        """The part with the highest share of each kind, as text."""
        found = []
        for measure, values in vars(self).items():
            if values:
                name = max(values, key=values.__getitem__)
                found.append(f"most {measure} {values[name]:.1%} ({name})")
        return ", ".join(found)


def _block(name: str) -> str:
    return name.split(".")[2]  # encoder.layers.N....


class Monitor:
    """Watches a binarized model: its activations in a forward pass, its signs over an update, its scales."""

    def __init__(self, model: HubertModel) -> None:
        self.quantizers: dict[str, Quantizer] = {}
        self.layers: dict[str, BinaryLayer] = {}
        self.queries: set[str] = set()  # quantizers of probabilities
        for name, module in model.named_modules():
            if isinstance(module, Quantizer):
                self.quantizers[name] = module
            elif isinstance(module, (BinaryLinear, BinaryConv1d)):
                self.layers[name] = module
            elif isinstance(module, Probabilities):
                self.queries.add(f"{name}.quantizer")
        self.seen: dict[str, list[Tensor]] = {}  # counts: saturated elements of all, dead channels of all
        self.before: dict[str, Tensor] = {}
        self.warned: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in forward passes inside."""
        for name, quantizer in self.quantizers.items():
            quantizer.watch = partial(self._count, name)
        try:
            yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.watch = None

    @torch.no_grad()
    def _count(self, name: str, x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, mask: Tensor | None) -> None:
        quantizer = self.quantizers[name]
        q = (x if offset is None else x - offset) / scale
        if quantizer.signed:
            low, high = signed_range(quantizer.bits)
        else:
            low, high = 0, 2**quantizer.bits - 1
        outside = (q < low) | (q > high)
        levels = codes if offset is None else codes - offset / scale
        if mask is None:
            elements = torch.tensor(float(x.numel()), device=x.device)
            least = most = levels
        else:
            outside = outside & mask
            elements = mask.sum().float() * (x.numel() // mask.numel())
            least, most = levels.masked_fill(~mask, torch.inf), levels.masked_fill(~mask, -torch.inf)
        if name in self.queries:
            dead = most.amax(-1) < 0.5  # (B, H, n)
        else:
            over = (0, 2) if x.dim() == 4 else (0, 1)
            dead = most.amax(over) - least.amin(over) < 0.5  # (C,) or (H, d)
        counts = torch.stack((outside.sum().float(), elements, dead.sum().float(), torch.tensor(float(dead.numel()), device=x.device)))
        self.seen.setdefault(name, []).append(counts)

    def before_update(self) -> None:
        """Keep the signs of all weights for comparison after the update."""
        self.before = self._signs()

    def after_update(self) -> Health:
        """The counts since the last call, and the signs that the update changed."""
        flipped = {name: (signs != self.before[name]).float().mean() for name, signs in self._signs().items()}
        counts = {name: torch.stack(seen).sum(0).clamp(min=1e-9) for name, seen in self.seen.items()}
        self.before, self.seen = {}, {}
        return Health(
            {name: float(c[0] / c[1]) for name, c in counts.items()},
            {name: float(c[2] / c[3]) for name, c in counts.items()},
            {name: float(share) for name, share in flipped.items()},
        )

    @torch.no_grad()
    def _signs(self) -> dict[str, Tensor]:
        return {
            name: weight_signs(layer.weight, layer.per_channel, getattr(layer, "groups", 1))[0] > 0 for name, layer in self.layers.items()
        }

    def collapsed(self) -> list[str]:
        """Quantizers whose scale has fallen to its floor since the last call."""
        names = [name for name in self.quantizers if name not in self.warned]
        if not names:
            return []
        low = (torch.cat([self.quantizers[name].scale.detach() for name in names]) <= FLOOR).tolist()
        found = [name for name, is_low in zip(names, low, strict=True) if is_low]
        self.warned.update(found)
        return found


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a model, which have their own learning rate and no weight decay."""
    return [module.scale for module in model.modules() if isinstance(module, Quantizer)]
