"""Weights from other libraries, copied into a model of this package one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import HubertConfig
from ..errors import BUILD_ERRORS, UserError, short
from ..models.hubert import HubertModel
from .pickled import Stored
from .safetensors import check_numbers
from .torchfile import TorchFile, aligned, structure_only

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# the two tensors of weight norm, by the names of torch's older and newer functions
PARAMETRIZED, WEIGHT_NORM = "parametrizations.weight.", {"original0": "weight_g", "original1": "weight_v"}
NEW = ("final_proj.weight", "final_proj.bias", "mask_emb")  # used by pre-training only: a file may lack them


@dataclass(frozen=True)
class Held:
    """A tensor that is still in its file."""

    dtype: object  # a torch.dtype, or another library's name for one that torch does not have
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def held_in(opened: TorchFile, weights: Mapping[object, object]) -> dict[str, Held]:
    """The tensors of a file of `torch.save`, by name. Raises `UserError` for other content and for tensors that share bytes."""
    found, storages, claimed = {}, {}, 0
    for name, stored in weights.items():
        if not isinstance(name, str) or not isinstance(stored, Stored):
            raise UserError("its weights are not tensors by name")
        found[name] = Held(stored.dtype, stored.shape, functools.partial(opened.tensor, stored))
        storages[stored.storage.key] = stored.storage.nbytes
        claimed += stored.numel * stored.dtype.itemsize
    if claimed > sum(storages.values()):
        raise UserError("its weights are larger than the file: tensors share their bytes")
    return found


def without_prefix(held: Mapping[str, Held], prefixes: Iterable[str]) -> dict[str, Held]:
    """Rename tensors: weight norm gets its older names, and the first prefix that occurs is removed."""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in held)), "")
    found: dict[str, Held] = {}
    for name, tensor in held.items():
        bare = name.removeprefix(prefix)
        head, parametrized, tail = bare.partition(PARAMETRIZED)
        bare = head + WEIGHT_NORM[tail] if parametrized and tail in WEIGHT_NORM else bare
        if bare in found:
            raise UserError(f"it holds {short(bare)} twice")
        found[bare] = tensor
    return found


def filled(config: HubertConfig, held: Mapping[str, Held], theirs: Callable[[str], str], left_out: tuple[str, ...]) -> HubertModel:
    """Build the model of a configuration, in eval mode on the CPU, with weights under another library's names.

    theirs: maps our name of a tensor to the other library's; left_out: prefixes of the names of heads, which the model does not have.
    Names and shapes are compared before a tensor is read. Tensors become float32 one by one. Tensors that a file may lack (`NEW`) are
    random, from seed 0. Raises `UserError` for a tensor that is missing, of another shape or quantized, or has no place in the model.
    """
    with structure_only():
        try:
            model = HubertModel(config)
        except UserError:
            raise
        except BUILD_ERRORS as error:
            raise UserError(f"its configuration describes no model that can be built ({short(error)})") from error
    state = model.state_dict()
    names = {theirs(name): name for name in state}
    for name, tensor in held.items():
        if name not in names and not name.startswith(left_out):
            raise UserError(f"it holds {short(name)} {tensor.shape}, for which the architecture of this package has no place")
    for name, own in names.items():
        if name not in held:
            if own in NEW:
                continue
            raise UserError(f"its weights lack {short(name)}, which its configuration asks for")
        if held[name].dtype not in FLOATS:
            raise UserError(f"{short(name)} is {held[name].dtype}: quantized weights are not read, give the float model it was made from")
        if held[name].shape != tuple(state[own].shape):
            raise UserError(
                f"{short(name)} is {held[name].shape}, its configuration asks for {tuple(state[own].shape)}: they are not of one model"
            )
    generator = torch.Generator().manual_seed(0)
    for name, own in names.items():
        if name in held:
            state[own] = aligned(held[name].read().to(torch.float32).contiguous())
            check_numbers({name: state[own]})
        else:
            state[own] = _new(own, state[own], generator)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _new(name: str, like: Tensor, generator: torch.Generator) -> nn.Parameter:
    tensor = torch.zeros(like.shape) if name.endswith(".bias") else torch.randn(like.shape, generator=generator).mul_(0.02)
    return nn.Parameter(tensor)
