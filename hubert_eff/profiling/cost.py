"""The cost of a model: parameters, storage, operations of one forward pass by module, and the minimum time on a device.

It counts inference from a waveform to the last hidden state (`model.hidden_states`) for one utterance without a padding mask. The
pre-training head (`final_proj`, label embeddings) is used in training only: it has parameters and no operations.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints.open import open_model
from ..config import SAMPLE_RATE
from ..errors import UserError, unknown
from ..layers.bits import Bits, stored_bits
from ..models.hubert import LABEL_EMBEDDINGS
from ..quant import quant_report
from ..quant.packing import packed_copy
from ..quant.storage import WIDE_TYPES, fold_moves, is_packed
from ..utils.evaluating import evaluating
from .counters import Counts, Tally, count_operations
from .device import read_device

if TYPE_CHECKING:
    from ..models.hubert import HubertModel

MIN_SAMPLES = 400  # the receptive field of one frame: 25 ms
MAX_SECONDS = 3600.0
MAX_RUN_SECONDS = 60.0
SHORT = 5e6  # parameters x seconds of audio: up to here a pass takes less time than what torch imports to follow meta tensors
MASK_EMBEDDING = "mask_emb"
FLOAT_BITS = 16  # a product with a narrower operand is a quantized one

# bit operations of one MAC: the paper counts the width once (32 for float32, 1 for W1A1), Bayesian Bits the product of both widths
BOPS: dict[str, Callable[[Bits], int]] = {"paper": max, "product": math.prod}


def is_float(bits: Bits) -> bool:
    """Whether a product of these widths counts as a float one (FLOP, BOP_NonQ), not as a quantized one (BOP_BQ)."""
    return min(bits) >= FLOAT_BITS


def bit_operations(macs_by_bits: Mapping[Bits, int], convention: str) -> tuple[float, float]:
    """(BOP_NonQ, BOP_BQ) in 2^30: bit operations of float products, and of quantized ones. `convention`: paper | product."""
    if convention not in BOPS:
        raise unknown("BOP convention", convention, BOPS)
    total = {True: 0, False: 0}
    for bits, macs in macs_by_bits.items():
        total[is_float(bits)] += macs * BOPS[convention](bits)
    return total[True] / 2**30, total[False] / 2**30


@dataclass
class ModuleCost:
    """One module with everything it contains. `name` is its path in the model, `kind` its class."""

    name: str
    kind: str
    params: int
    macs_by_bits: dict[Bits, int]
    element_ops: int
    children: list[ModuleCost] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """MACs of all widths."""
        return sum(self.macs_by_bits.values())

    def walk(self) -> Iterator[ModuleCost]:
        """This module and all below it, in the model's order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass
class Profile:
    """The cost of a model.

    A MB is 1e6 bytes; G is 1e9 in `gflop` and 2^30 in `bop_nonq_g` and `bop_bq_g`, as in Table 1 of Jeon et al. 2023. Times are estimates.
    """

    name: str
    seconds: float
    samples: int
    frames: int
    params: int  # all parameters
    params_without_labels: int  # without the label embeddings, which depend on the number of classes
    storage_mb: dict[str, float]  # paper: by the paper's formula; file: the tensors that `export` writes
    macs: int
    macs_by_bits: dict[Bits, int]  # (weight, activation) bits -> MACs
    gflop: float  # 2 operations per MAC of float operands
    bops: str  # convention of the bit operations: paper | product
    bop_nonq_g: float  # bit operations of float products
    bop_bq_g: float  # bit operations of quantized products
    device: str
    est_time_s: dict[str, float]  # paper: by the paper's formula; roofline: at the device's peak rates
    element_ops: int
    kinds: dict[str, Tally]
    operations: dict[str, Tally]
    modules: ModuleCost
    quantized: list[dict[str, Any]]  # for a binarized model: what became of each part, and why

    def to_dict(self, depth: int | None = None) -> dict[str, Any]:
        """Convert the profile to plain values for JSON.

        Args:
            depth: how many levels of modules to keep below the model; None for all.

        Returns:
            The fields by name.
        """

        def tree(module: ModuleCost, left: int | None) -> dict[str, Any]:
            below = [] if left == 0 else [tree(c, None if left is None else left - 1) for c in module.children]
            return {
                "name": module.name,
                "kind": module.kind,
                "params": module.params,
                "macs": module.macs,
                "macs_by_bits": _plain(module.macs_by_bits),
                "element_ops": module.element_ops,
                "children": below,
            }

        def rows(tallies: dict[str, Tally]) -> dict[str, Any]:
            return {
                name: {"calls": t.calls, "macs": t.macs, "macs_by_bits": _plain(t.macs_by_bits), "element_ops": t.element_ops}
                for name, t in tallies.items()
            }

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["macs_by_bits"] = _plain(self.macs_by_bits)
        values["kinds"], values["operations"] = rows(self.kinds), rows(self.operations)
        values["modules"] = tree(self.modules, depth)
        return values


def _plain(macs_by_bits: Mapping[Bits, int]) -> dict[str, int]:
    return {f"{weight}x{activation}": macs for (weight, activation), macs in sorted(macs_by_bits.items(), reverse=True)}


def profile(
    model_or_preset: HubertModel | str | os.PathLike[str],
    seconds: float = 10.0,
    bops: str = "paper",
    device: str | os.PathLike[str] = "a100",
) -> Profile:
    """Count what a model costs: parameters, storage, operations by bit width, and the time that a device needs at least.

    The model is traced with meta tensors, which have a shape but no values, in eval mode and without gradients: an hour of audio takes no
    longer than a second. A model whose operations have no such form, that runs under autocast, or whose pass is short (`SHORT`), is
    run on noise instead, which gives the same figures. Its mode is restored afterwards.

    Args:
        model_or_preset: a model, which is profiled as it is, or what `open_model` takes. The name of a w1a1 model, PRESET+w1a1 or a
            checkpoint, stands for its packed form.
        seconds: the length of the audio in seconds.
        bops: how to count the bit operations of one MAC: `paper` for the width of the wider operand (Jeon et al. 2023, Table 1),
            `product` for the product of both widths (Bayesian Bits, van Baalen et al. 2020).
        device: a name in configs/device, or the path of such a file; times are estimated from its rates.

    Returns:
        The costs, in total and by module, kind of layer and operation.

    Raises:
        UserError: the name is neither a preset nor a file; the duration is not between 25 ms and one hour (one minute where the model
            must be run); or an operation has no formula.
    """
    if not MIN_SAMPLES / SAMPLE_RATE <= seconds <= MAX_SECONDS:  # also refuses nan
        raise UserError(f"seconds={seconds:g} cannot be profiled: give between {MIN_SAMPLES / SAMPLE_RATE} and {MAX_SECONDS:g}")
    rates = read_device(device)
    if bops not in BOPS:
        raise unknown("BOP convention", bops, BOPS)
    model, name = model_of(model_or_preset, structure=not torch.is_autocast_enabled("cpu"))  # autocast does not reach the meta device
    if model is not model_or_preset and model.config.quant == "w1a1" and not is_packed(model):
        model = packed_copy(model)  # as in its export
        fold_moves(model)
    samples = round(seconds * SAMPLE_RATE)
    counts, frames = _count(model, samples)
    total = counts.total()
    modules = _tree(model, "", counts.by_module(), seen=set())
    labels = getattr(model, LABEL_EMBEDDINGS, None)
    storage = {"paper": paper_storage(model) / 1e6, "file": file_storage(model) / 1e6}
    nonq, quantized = bit_operations(total.macs_by_bits, bops)
    return Profile(
        name=name,
        seconds=samples / SAMPLE_RATE,
        samples=samples,
        frames=frames,
        params=modules.params,
        params_without_labels=modules.params - (labels.numel() if labels is not None else 0),
        storage_mb=storage,
        macs=total.macs,
        macs_by_bits=total.macs_by_bits,
        gflop=2 * sum(macs for bits, macs in total.macs_by_bits.items() if is_float(bits)) / 1e9,
        bops=bops,
        bop_nonq_g=nonq,
        bop_bq_g=quantized,
        device=rates.name,
        est_time_s={
            "paper": rates.paper_time(*bit_operations(total.macs_by_bits, "paper")),
            "roofline": rates.roofline_time(total.macs_by_bits, storage["file"] * 1e6),
        },
        element_ops=total.element_ops,
        kinds=counts.by_kind(),
        operations=counts.by_operation(),
        modules=modules,
        quantized=quant_report(model),
    )


def _count(model: HubertModel, samples: int) -> tuple[Counts, int]:
    """Count what `hidden_states` runs for one utterance of so many samples; returns counts and frames."""
    parameter = next(model.parameters())
    reason = ""
    if not parameter.is_meta and torch.is_autocast_enabled(parameter.device.type):
        reason = "it runs under autocast"
    elif parameter.is_meta or not _is_short(model, samples):
        try:
            with evaluating(model), _without_values(model), count_operations(model) as counts:
                states, _ = model.hidden_states(torch.empty(1, samples, dtype=parameter.dtype, device="meta"))
            return counts, states[-1].size(1)
        except (RuntimeError, TypeError, AttributeError) as error:  # no form for meta tensors; other faults appear again below
            if parameter.is_meta:
                raise
            reason = " ".join(str(error).split())[:160]
    if reason and samples > MAX_RUN_SECONDS * SAMPLE_RATE:
        raise UserError(
            f"seconds={samples / SAMPLE_RATE:g} cannot be profiled: this model must be run to be counted, at most {MAX_RUN_SECONDS:g} s "
            f"({reason})"
        )
    wav = noise(model, samples / SAMPLE_RATE)
    with evaluating(model), count_operations(model) as counts:
        states, _ = model.hidden_states(wav)
    return counts, states[-1].size(1)


def _is_short(model: HubertModel, samples: int) -> bool:
    """Whether a model is rather run. A simulated one is not: it also works out the signs of its weights where there are values."""
    simulated = model.config.quant != "none" and not is_packed(model)
    return not simulated and sum(p.numel() for p in model.parameters()) * samples <= SHORT * SAMPLE_RATE


@contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Replace parameters and buffers by meta tensors inside, and restore them."""
    holders: list[dict[str, Any]] = [holder for module in model.modules() for holder in (module._parameters, module._buffers)]
    own = [dict(holder) for holder in holders]
    empty: dict[int, Tensor] = {}  # one for each tensor, so shared tensors stay shared
    try:
        with torch.device("meta"):
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None and not tensor.is_meta:
                        holder[name] = empty.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
            yield
    finally:
        for holder, values in zip(holders, own, strict=True):
            holder.update(values)


def model_of(model_or_name: HubertModel | str | os.PathLike[str], structure: bool = False) -> tuple[HubertModel, str]:
    """(model, name to show) for a model or what `open_model` takes; `structure`: build a preset without storage."""
    if isinstance(model_or_name, nn.Module):
        if not hasattr(model_or_name, "hidden_states"):
            raise UserError(f"a {type(model_or_name).__name__} has no hidden_states(): give a HubertModel, a preset or a checkpoint")
        return model_or_name, type(model_or_name).__name__
    return open_model(model_or_name, structure=structure), os.fspath(model_or_name)


def noise(model: nn.Module, seconds: float, batch: int = 1) -> Tensor:
    """The same noise (batch, samples) in every call, in the dtype and on the device of the model."""
    parameter = next(model.parameters())
    wave = torch.randn(batch, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    return wave.to(parameter.device, parameter.dtype)


def paper_storage(model: nn.Module, float_bytes: int | None = None) -> float:
    """Bytes by the paper's formula: parameters without label embeddings, each at its width, and no buffers.

    For a model with quantized weights the mask embedding is not counted either, as in the paper's BQ rows. float_bytes: bytes of a float
    parameter (default: those of its dtype).
    """
    total, quantized, seen = 0.0, False, set()
    for module in model.modules():
        stored = stored_bits(module)
        quantized |= any(bits < FLOAT_BITS for _, bits in stored.values())
        total += sum(elements * bits / 8 for elements, bits in stored.values())
        for name, parameter in module.named_parameters(recurse=False):
            if name not in stored and name != LABEL_EMBEDDINGS and id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel() * (float_bytes or parameter.element_size())
    mask = getattr(model, MASK_EMBEDDING, None)
    if quantized and mask is not None:
        total -= mask.numel() * (float_bytes or mask.element_size())
    return total


def file_storage(model: nn.Module) -> int:
    """Bytes of the tensors that `export` writes: parameters and persistent buffers, without label embeddings, each at its width.

    The float tensors of a model from an export count in the dtype of its file.
    """
    modules, kept = dict(model.named_modules()), getattr(model, "stored_dtype", None)
    total = 0
    for name, tensor in model.state_dict().items():
        path, _, own = name.rpartition(".")
        stored = stored_bits(modules[path]) if path in modules else {}
        if own in stored:
            elements, bits = stored[own]
            total += math.ceil(elements * bits / 8)
        elif isinstance(tensor, Tensor) and name != LABEL_EMBEDDINGS:
            width = tensor.element_size()
            if kept is not None and tensor.is_floating_point() and not isinstance(modules.get(path), WIDE_TYPES):
                width = min(width, kept.itemsize)
            total += tensor.numel() * width
    return total


def _tree(module: nn.Module, path: str, totals: Mapping[str, Tally], seen: set[int]) -> ModuleCost:
    # a parameter that several modules share belongs to the first of them
    stored = stored_bits(module)
    own = [p for name, p in module.named_parameters(recurse=False) if name not in stored and id(p) not in seen]
    seen.update(map(id, own))
    children = [_tree(c, f"{path}.{name}" if path else name, totals, seen) for name, c in module.named_children()]
    total = totals.get(path, Tally())
    params = sum(p.numel() for p in own) + sum(elements for elements, _ in stored.values()) + sum(c.params for c in children)
    return ModuleCost(path, type(module).__name__, params, total.macs_by_bits, total.element_ops, children)
