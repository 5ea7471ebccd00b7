"""What layers tell the binarizer: the kind of each of their parts, and the values that its input takes.

A module with `kinds()` declares parts by the names of their attributes. Other parts stay float. `hubert_eff.quant` decides by kind alone
(quant/policy.py) and does not name encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

PROJECTION, PRODUCT, FEED_FORWARD = "attention_projection", "attention_product", "feed_forward"
POINTWISE, DEPTHWISE = "pointwise_conv", "depthwise_conv"
BINARY_KINDS = {  # kind -> its description; a policy decides which of these are binarized
    PROJECTION: "linear layers to queries, keys and values, and the output projection of the attention",
    PRODUCT: "queries times keys, probabilities times values",
    FEED_FORWARD: "linear layers of feed-forward modules",
    POINTWISE: "convolutions over one frame: linear layers of convolution modules",
    DEPTHWISE: "convolutions over time, channel by channel",
}
EXTRACTOR, INPUT_PROJECTION, POSITIONAL_CONV = "extractor", "input_projection", "positional_conv"
POSITION_PROJECTION, RATE_CHANGE, CODEBOOK_HEAD = "position_projection", "rate_change", "codebook_head"
FLOAT_KINDS = {  # kind -> why it is never binarized
    EXTRACTOR: "reads the waveform itself, where single bits lose the signal",
    INPUT_PROJECTION: "one layer that all others depend on",
    POSITIONAL_CONV: "one layer at the entrance, before the first norm",
    POSITION_PROJECTION: "the attention binarizes its output, not its input",
    RATE_CHANGE: "part of the path between frame rates that bypasses the blocks",
    CODEBOOK_HEAD: "used in pre-training only",
}


@dataclass(frozen=True)
class Kind:
    """The kind of one part of a module.

    signed: whether the layer's input takes both signs; otherwise it is non-negative, once `activation` is a ReLU.
    activation: attribute of the module with the activation function right before the layer.
    shared: attribute of the module for the quantizer of an input that several layers share.
    form: the attention product that fills a part that is None in the float model (quant/attention.py).
    shapes: its operands with a learnable bias, with shapes that broadcast to (B, H, T, d).
    sources: its operands that in inference are, except for their shape, the output of a linear layer: operand -> (attribute of the layer,
    first channel).
    """

    name: str
    signed: bool = True
    activation: str = ""
    shared: str = ""
    form: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, int]] = field(default_factory=dict)


@runtime_checkable
class Declared(Protocol):
    """A module that declares the kinds of its parts."""

    def kinds(self) -> Mapping[str, Kind]:
        """The kind of each part by the name of its attribute."""


def kinds_of(module: object) -> Mapping[str, Kind]:
    """The kinds of the parts that a module declares; nothing of one that is not `Declared`."""
    declares = hasattr(type(module), "kinds")  # isinstance would take long: a model has hundreds of modules
    return cast(Declared, module).kinds() if declares else {}


def head_shapes(heads: int, dim: int, *names: str) -> dict[str, tuple[int, ...]]:
    """`Kind.shapes` of operands of `heads` heads of `dim` channels each."""
    return dict.fromkeys(names, (heads, 1, dim))
