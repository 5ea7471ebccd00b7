"""Turns modules of a float model into binary ones in place, by the decisions of a policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..layers.activation import relu
from ..layers.convolution import DepthwiseConv
from ..layers.kinds import BINARY_KINDS, DEPTHWISE, POINTWISE, Kind, kinds_of
from .attention import FORMS, Probabilities
from .modules import BinaryConv1d, BinaryLinear, FrameMask, Quantizer
from .policy import BINARY, Policy


@dataclass(frozen=True)
class Decision:
    """The decision for one declared part: `owner` holds it as `name`; `conv` says whether its block has a convolution."""

    path: str
    owner: nn.Module
    name: str
    kind: Kind
    action: str
    reason: str
    conv: bool

    @property
    def part(self) -> nn.Module | None:
        """The module itself; None for an attention product of the float model."""
        part: nn.Module | None = getattr(self.owner, self.name)
        return part


def decisions(model: nn.Module, policy: Policy) -> list[Decision]:
    """The decision of the policy for each declared part of a float or binarized HuBERT, in the model's order."""
    found = []
    blocks = {f"encoder.layers.{index}": block for index, block in enumerate(_blocks(model))}
    for prefix, block in blocks.items():
        parts = [part for path, module in block.named_modules(prefix=prefix) for part in _parts(module, path)]
        conv = any(kind.name in (POINTWISE, DEPTHWISE) for _, _, _, kind in parts)
        found += [(*part, conv) for part in parts]
    inside = set(map(id, (m for block in blocks.values() for m in block.modules())))
    for path, module in model.named_modules():
        if id(module) not in inside:
            found += [(*part, False) for part in _parts(module, path)]
    policy.check([path for path, *_ in found])
    return [Decision(path, owner, name, kind, *policy.decide(path, kind.name), conv) for path, owner, name, kind, conv in found]


def _blocks(model: nn.Module) -> nn.ModuleList:
    layers = model.get_submodule("encoder.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str, Kind]]:
    for name, kind in kinds_of(module).items():
        if kind.form or getattr(module, name) is not None:
            yield f"{path}.{name}" if path else name, module, name, kind


def convert(model: nn.Module, bits: int, policy: Policy, streaming: bool = False) -> None:
    """Binarize a HuBERT in place; its weights stay the same parameters. `streaming`: nothing may depend on a whole utterance."""
    chosen = decisions(model, policy)
    if all(choice.action != BINARY for choice in chosen):
        kinds = sorted({choice.kind.name for choice in chosen if choice.kind.name in BINARY_KINDS})
        found = (
            f"its policy leaves everything float that its blocks declare ({', '.join(kinds)})"
            if kinds
            else "its blocks have no method kinds() that says which layers to binarize (docs/tutorials/new-encoder.md, 'One bit')"
        )
        raise UserError(f"nothing of this {type(model.get_submodule('encoder')).__name__} would be binarized: {found}")
    shared: dict[tuple[int, str], set[str]] = {}
    for choice in chosen:
        if choice.kind.shared:
            actions = shared.setdefault((id(choice.owner), choice.kind.shared), set())
            actions.add(choice.action)
            if len(actions) > 1:
                raise UserError(f"the policy binarizes only some of the layers that share the input of '{choice.path}': all or none")
        if choice.action == BINARY:
            setattr(choice.owner, choice.name, _binary(choice, bits, policy))
            if choice.kind.activation:
                setattr(choice.owner, choice.kind.activation, relu)
    for block in _blocks(model):
        frames = FrameMask()
        for module in block.modules():
            if isinstance(module, Quantizer):
                module.frames, module.from_zero = frames, streaming
            elif isinstance(module, Probabilities):
                module.dropped = policy.attention_dropout
        block.register_forward_pre_hook(frames.enter)
        block.register_forward_hook(frames.leave)


def _binary(choice: Decision, bits: int, policy: Policy) -> nn.Module:
    kind, part = choice.kind, choice.part
    if kind.form:
        moved = policy.moves == "all" or (policy.moves == "attention" and not choice.conv)
        return _placed(FORMS[kind.form](bits, kind.shapes if moved else {}), next(choice.owner.parameters()))
    per_channel, move = policy.weight_scale == "channel", policy.moves == "all"
    binary: BinaryLinear | BinaryConv1d
    if isinstance(part, nn.Linear):
        rows, columns = part.weight.shape
        if kind.shared and getattr(choice.owner, kind.shared) is None:
            setattr(choice.owner, kind.shared, _placed(Quantizer(bits, kind.signed, (columns,) if move else None), part.weight))
        binary = BinaryLinear(
            columns, rows, part.bias is not None, bits=bits, signed=kind.signed, per_channel=per_channel, move=move,
            own_input=not kind.shared,
        )  # fmt: skip
    elif isinstance(part, DepthwiseConv):
        channels, _, kernel = part.weight.shape
        binary = BinaryConv1d(
            channels, channels, kernel, part.bias is not None, stride=part.stride, groups=channels, bits=bits, signed=kind.signed,
            per_channel=per_channel, move=move, causal=part.causal,
        )  # fmt: skip
    else:
        raise UserError(f"'{choice.path}' is declared as {kind.name}, but a {type(part).__name__} has no binary form")
    _placed(binary, part.weight)
    binary.weight = part.weight
    if part.bias is not None:
        binary.bias = part.bias
    return binary


def _placed(module: nn.Module, like: Tensor) -> nn.Module:
    """A new module with the dtype and on the device of a tensor; `Module.to` goes through all that it holds also where nothing is to do."""
    first = next(module.parameters(), like)
    return module if (first.dtype, first.device) == (like.dtype, like.device) else module.to(like)
