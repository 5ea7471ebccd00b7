"""What a model costs: parameters, storage, and the operations of one forward pass, by module.

Counted is inference from a waveform to the last hidden state (`model.hidden_states`), one utterance, no padding mask. The
pre-training head (`final_proj`, label embeddings) is applied to frames in training only: it has parameters and no operations.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import SAMPLE_RATE
from ..errors import UserError, unknown
from ..registry import list_presets
from .counters import Counts, Tally, count_operations

if TYPE_CHECKING:
    from ..model import HubertModel

MIN_SAMPLES = 400  # the receptive field of one frame: 25 ms
MAX_SECONDS = 3600.0
LABEL_EMBEDDINGS = "label_embs_concat"


@dataclass
class ModuleCost:
    """One module with everything it contains. `name` is its path in the model, `kind` its class."""

    name: str
    kind: str
    params: int
    macs: int
    element_ops: int
    children: list[ModuleCost] = field(default_factory=list)

    def walk(self) -> Iterator[ModuleCost]:
        """This module and all below it, in the model's order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass
class Profile:
    """The cost of a model. MB is 1e6 bytes, G in `gflop` is 1e9 and in `bop_nonq_g` 2^30."""

    name: str
    seconds: float
    samples: int
    frames: int
    params: int  # all parameters
    params_without_labels: int  # without the label embeddings, which depend on the number of classes
    storage_mb: dict[str, float]  # float format -> size of the parameters without label embeddings
    macs: int
    gflop: float  # 2 operations per MAC
    bop_nonq_g: float  # bit operations of the products that are not quantised: 32 per MAC
    element_ops: int
    operations: dict[str, Tally]
    modules: ModuleCost

    def to_dict(self, depth: int | None = None) -> dict[str, Any]:
        """Plain values for JSON; the module tree down to `depth` levels below the model (None: all)."""

        def tree(module: ModuleCost, left: int | None) -> dict[str, Any]:
            below = [] if left == 0 else [tree(c, None if left is None else left - 1) for c in module.children]
            return {"name": module.name, "kind": module.kind, "params": module.params, "macs": module.macs,
                    "element_ops": module.element_ops, "children": below}

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["operations"] = {name: dataclasses.asdict(tally) for name, tally in self.operations.items()}
        values["modules"] = tree(self.modules, depth)
        return values

    def table(self, depth: int = 3) -> str:
        """The report as plain text, modules down to `depth` levels below the model."""
        from .report import render_text

        return render_text(self, depth)


def profile(model_or_preset: HubertModel | str | os.PathLike[str], seconds: float = 10.0) -> Profile:
    """Profile a model, a preset by name, or a checkpoint by path, on `seconds` of random 16 kHz audio.

    The model is run once, in evaluation mode and without gradients; its mode is restored. Raises `UserError` for a name that is
    neither a preset nor a file, for a duration that is not between 25 ms and one hour, and for an operation without a formula.
    """
    if not MIN_SAMPLES / SAMPLE_RATE <= seconds <= MAX_SECONDS:  # also refuses nan
        raise UserError(f"seconds={seconds:g} cannot be profiled: give between {MIN_SAMPLES / SAMPLE_RATE} and {MAX_SECONDS:g}")
    model, name = _resolve(model_or_preset)
    samples = round(seconds * SAMPLE_RATE)
    parameter = next(model.parameters())
    wave = torch.randn(1, samples, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), count_operations(model) as counts:
            states, _ = model.hidden_states(wave)
    finally:
        for module, mode in modes.items():
            module.training = mode
    params = sum(p.numel() for p in model.parameters())
    labels = getattr(model, LABEL_EMBEDDINGS, None)
    without_labels = params - (labels.numel() if labels is not None else 0)
    total = counts.total()
    return Profile(
        name=name,
        seconds=samples / SAMPLE_RATE,
        samples=samples,
        frames=states[-1].shape[1],
        params=params,
        params_without_labels=without_labels,
        storage_mb={"fp32": without_labels * 4 / 1e6, "fp16": without_labels * 2 / 1e6},
        macs=total.macs,
        gflop=2 * total.macs / 1e9,
        bop_nonq_g=32 * total.macs / 2**30,
        element_ops=total.element_ops,
        operations=counts.by_operation(),
        modules=_tree(model, "", counts, seen=set()),
    )


def _resolve(model_or_preset: HubertModel | str | os.PathLike[str]) -> tuple[HubertModel, str]:
    if isinstance(model_or_preset, nn.Module):
        return model_or_preset, type(model_or_preset).__name__
    name = os.fspath(model_or_preset)
    if name in list_presets():
        from ..model import build

        return build(name), name
    if os.path.exists(name):
        from ..checkpoint import load

        return load(name), name
    raise unknown("preset or checkpoint", name, list_presets())


def _tree(module: nn.Module, path: str, counts: Counts, seen: set[int]) -> ModuleCost:
    # a parameter that several modules share belongs to the first of them
    own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen.update(map(id, own))
    children = [_tree(c, f"{path}.{name}" if path else name, counts, seen) for name, c in module.named_children()]
    total = counts.total(path)
    params = sum(p.numel() for p in own) + sum(c.params for c in children)
    return ModuleCost(path, type(module).__name__, params, total.macs, total.element_ops, children)
