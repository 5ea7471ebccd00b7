"""`binarize` turns a float HuBERT into one that trains and runs at one bit, by a policy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..models.hubert import HubertModel
from .convert import convert
from .policy import POLICIES, SPECS, is_policy, read_policy


def binarize(
    model: HubertModel, spec: str | Path | Mapping[str, Any] = "w1a1", policy: str | Path | Mapping[str, Any] = "default"
) -> HubertModel:
    """Make a binarized copy of a HuBERT with any encoder (BiT, Liu et al. 2022).

    The source is not changed. The copy keeps the source's weights as float `weight`s and takes their signs as it runs, so that it can be
    trained. The first batch in train mode sets the scales of its activations. A w1a2 model becomes a w1a1 one with its learned scales and
    its policy.

    Args:
        model: a float model, or a w1a2 one to be made w1a1.
        spec: w1a1 (weights and activations of one bit), w1a2, w1a4 or w1a8 (activations of 2, 4 or 8 bits), or a policy for w1a1.
        policy: which layers are binarized, and how: `default`, `paper`, a YAML file or a mapping (quant/policy.py).

    Returns:
        The copy, in the mode and on the device of the source.

    Raises:
        UserError: the spec or policy is unknown, the policy names a missing module or leaves everything float, or the model is fused or
            binarized already.
    """
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot binarize a {type(model).__name__}: expected a HubertModel")
    if is_policy(spec):
        spec, policy = "w1a1", spec
    if spec not in SPECS:
        raise unknown("quantization", spec, [*SPECS, *POLICIES])
    if model.fused:
        raise UserError("this model is fused for inference: binarize the model that it was made from")
    was = model.config.quant
    if was == "w1a2" and spec == "w1a1":
        config = dataclasses.replace(model.config, quant=spec)
        lower = HubertModel(config, model.num_classes)
        lower.load_state_dict(model.state_dict())
        lower.to(next(model.parameters()).device, next(model.parameters()).dtype)
        lower.set_num_updates(model.num_updates)
        return lower.train(model.training)
    if was != "none":
        raise UserError(f"this model is binarized already ({was}): binarize its float form")
    chosen = read_policy(policy)
    copied = copy.deepcopy(model)
    copied.config = dataclasses.replace(model.config, quant=spec, quant_policy=chosen.text)
    convert(copied, SPECS[spec], chosen, model.config.streaming)
    return copied.train(model.training)
