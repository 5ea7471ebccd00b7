"""Learning rate schedules in closed form: the rate of an update from its number, without state."""

from __future__ import annotations


def eden(
    batch: int,
    epoch: int,
    lr: float,
    lr_batches: float = 7500.0,
    lr_epochs: float = 10.5,
    warmup_batches: int = 5000,
    warmup_start: float = 0.0,
) -> float:
    """Learning rate of Eden, which falls with batches and with epochs (Zipformer, Yao et al. 2024, section 3.5).

        lr ((b^2 + B^2) / B^2)^-1/4 ((e^2 + E^2) / E^2)^-1/4 warmup(b)

    `batch` b and `epoch` e count finished ones, so both are 0 in the first update. The two factors begin to fall at B = `lr_batches` and
    E = `lr_epochs` (from there on about as b^-1/2 and e^-1/2). The warm-up rises from `warmup_start` to 1 in `warmup_batches`.
    The defaults are those of self-supervised training, whose `lr` is 0.045.
    """
    warmup = 1.0 if batch >= warmup_batches else warmup_start + (1.0 - warmup_start) * batch / warmup_batches
    return float(lr * (1.0 + (batch / lr_batches) ** 2) ** -0.25 * (1.0 + (epoch / lr_epochs) ** 2) ** -0.25 * warmup)


def noam(update: int, lr: float, warmup_updates: int) -> float:
    """Learning rate of the Transformer's schedule (Vaswani et al. 2017, section 5.3), with the peak as a separate parameter.

        lr T0^1/2 min(t^-1/2, t T0^-3/2)

    `update` t counts from 1. The rate rises linearly to `lr` at t = T0 = `warmup_updates`, and falls as t^-1/2 from there. In the
    original the peak follows from the model dimension and T0; here it does not. FusionFormer (Song et al. 2022) takes 0.002, and 0.001
    for a Conformer.
    """
    return float(lr * warmup_updates**0.5 * min(update**-0.5, update * warmup_updates**-1.5))
