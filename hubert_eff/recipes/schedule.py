"""One learning-rate schedule over several runs, each of which counts its updates from 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError

POLYNOMIAL = "polynomial_decay"


def shared_schedule(config: Mapping[str, Any], start: int, total: int) -> list[str]:
    """Overrides by which a run of this configuration takes up fairseq's polynomial decay at update `start` of `total`.

    With the peak r, the end e, warm-up w and power p the rate at update u is e + (r - e) ((total - u) / (total - w))^p. From `start` on
    that is the same decay over total - start updates, without warm-up, from the rate at `start`. Of all groups of parameters.
    Raises `UserError` for another schedule, and for a start within the warm-up.
    """
    sections = {"": config}
    if config["optimizer"]["_name"] == "composite":
        sections = {f"optimizer.groups.{name}.": group for name, group in config["optimizer"]["groups"].items()}
    overrides = []
    for prefix, section in sections.items():
        schedule = section["lr_scheduler"]
        if schedule["_name"] != POLYNOMIAL:
            raise UserError(f"one schedule over all stages needs {prefix}lr_scheduler={POLYNOMIAL}, not {schedule['_name']}")
        warmup, end, power = (schedule[key] for key in ("warmup_updates", "end_learning_rate", "power"))
        overrides.append(f"{prefix}lr_scheduler.total_num_update={total - start}")
        if start == 0:
            continue
        if not warmup <= start < total:
            raise UserError(
                f"a stage starts at update {start} of {total}, within a warm-up of {warmup} updates: give the first stage more updates"
            )
        key, rates = "optimization.lr", config["optimization"]["lr"]
        if prefix and not isinstance(section["optimizer"]["lr"], str):  # otherwise it refers to optimization.lr
            key, rates = f"{prefix}optimizer.lr", section["optimizer"]["lr"]
        left = ((total - start) / (total - warmup)) ** power
        overrides.append(f"{key}=[{','.join(f'{end + (rate - end) * left:.9g}' for rate in rates)}]")
        overrides.append(f"{prefix}lr_scheduler.warmup_updates=0")
    return overrides
