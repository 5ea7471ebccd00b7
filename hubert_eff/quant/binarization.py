"""`binarize`: a float HuBERT as one that trains and runs at one bit, by a policy."""

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
    """A binarized copy of a HuBERT with any encoder; the source is not changed.

    spec: w1a1 (one-bit weights and activations), w1a2, w1a4, w1a8 (activations of 2, 4, 8 bits), or a policy, which stands for w1a1 by it.
    policy: default, paper, a YAML file or a mapping (quant/policy.py). The copy has the source's weights as float `weight`s, of which
    signs are taken as it runs; scales of activations start from the first batch in train mode. A w1a2 model becomes w1a1 with the scales
    it has learned; its policy is kept.
    Raises `UserError` for an unknown spec or policy, one that names a module that is not there or leaves all float, a fused model, and
    one that is binarized already.
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
