"""Reads state dicts of torchaudio's HuBERT and wav2vec 2.0 models without torchaudio; the shapes tell the architecture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from ..config import CONV_FEATURE_LAYERS, HubertConfig
from ..encoders.registry import stored_config
from ..errors import UserError, short
from ..models.hubert import HEADS, HubertModel
from .foreign import Held, filled, held_in, without_prefix
from .huggingface import PROJECTION, their_name, without_identity
from .torchfile import TorchFile

NORMALIZING = "model."  # prefix of the wrapper that pipelines put around a model to normalize audio
PREFIXES = ("wav2vec2.", NORMALIZING)  # the first is that of a model for pre-training
PRETRAINING = ("logit_generator.", "mask_generator.")
HEADS_OF = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # heads of torchaudio's models, by width
ARGUMENTS, STATE = "arguments", "state_dict"  # keys of a file that also has the arguments
PARTS = (("feature_projection.", "encoder."), ("encoder.", "encoder.transformer."))  # prefix of transformers' names -> torchaudio's
MASK = ("masked_spec_embed", "mask_generator.mask_embedding")


def is_torchaudio(content: object) -> bool:
    """Whether the content of a file of `torch.save` is weights by torchaudio's names, alone or with arguments."""
    weights = content.get(STATE, content) if isinstance(content, dict) else None
    return isinstance(weights, dict) and any(isinstance(name, str) and "encoder.transformer.layers." in name for name in weights)


def model_in(opened: TorchFile) -> HubertModel:
    """Read the encoder of a state dict, in eval mode on the CPU; the head of a fine-tuned model is left out.

    Shapes do not tell the number of heads, the strides of the extractor and the places of LayerNorms. For the widths of torchaudio's
    models those of its models are taken; other files must be `torch.save({"arguments": {...}, "state_dict": model.state_dict()})` with
    arguments of `torchaudio.models.wav2vec2_model`. Weights from a pipeline that normalizes audio normalize it here; others do not.

    Raises `UserError` for WavLM, and for parts that the Transformer here does not have.
    """
    content = opened.content
    arguments = content.get(ARGUMENTS, {}) if STATE in content else {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"its {ARGUMENTS} are not by name")
    named = held_in(opened, content.get(STATE, content))
    held = without_prefix(named, PREFIXES)
    if wrong := next((name for name in held if "rel_attn_embed" in name or "gru_rel_pos" in name), None):
        raise UserError(f"it is a WavLM, whose gated relative positions ({short(wrong)}) the Transformer here cannot hold")
    normalize = any(name.startswith(NORMALIZING) for name in named)
    config = _config(held, arguments, normalize)
    if config.extractor_mode == "layer_norm" and not normalize:
        warnings.warn(
            f"{opened.file} does not say whether its audio is normalized, as that of torchaudio's large models is: pass normalized audio, "
            "or save the state dict of what the pipeline's get_model() returns",
            stacklevel=4,
        )
    model = filled(config, without_identity(held, _their_name(PROJECTION), config), _their_name, (*PRETRAINING, "aux."))
    model.heads = HEADS[0] if any(name.startswith("aux.") for name in held) else ""
    return model


def _their_name(ours: str) -> str:
    name = their_name(ours)
    if name == MASK[0]:
        return MASK[1]
    for theirs, before in PARTS:
        if name.startswith(theirs):
            return before + name.removeprefix("encoder.")
    return name


def _config(held: Mapping[str, Held], arguments: Mapping[Any, Any], normalize: bool) -> HubertConfig:
    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = held[name].shape if name in held else ()
        if len(found) != dims:
            raise UserError(f"it lacks {name} of {dims} dimensions: it is not a complete state dict")
        return found

    count = 1 + max(
        (int(match[1]) for name in held if (match := re.match(r"feature_extractor\.conv_layers\.(\d{1,3})\.", name))), default=-1
    )
    sizes = [shape(f"feature_extractor.conv_layers.{i}.conv.weight", 3) for i in range(count)]
    strides = [stride for _, _, stride in CONV_FEATURE_LAYERS["default"]]
    kernels = [kernel for _, kernel, _ in CONV_FEATURE_LAYERS["default"]]
    layers = arguments.get("extractor_conv_layer_config")
    if layers is None and [size[2] for size in sizes] != kernels:
        raise UserError(
            f"its extractor has kernels {[size[2] for size in sizes]}, whose strides are unknown{_ask('extractor_conv_layer_config')}"
        )
    if layers is None:
        layers = [(out, kernel, stride) for (out, _, kernel), stride in zip(sizes, strides, strict=True)]
    depth = 1 + max((int(match[1]) for name in held if (match := re.match(r"encoder\.transformer\.layers\.(\d{1,3})\.", name))), default=-1)
    inner, width = shape("encoder.transformer.layers.0.feed_forward.intermediate_dense.weight", 2)
    heads = arguments.get("encoder_num_heads", HEADS_OF.get(width))
    if heads is None:
        raise UserError(f"its number of attention heads is unknown: no model of torchaudio has {width} channels{_ask('encoder_num_heads')}")
    _, per_group, kernel = shape("encoder.transformer.pos_conv_embed.conv.weight_v", 3)
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in held
    values = {
        "extractor_mode": "layer_norm" if layer_norms else "default",
        "conv_feature_layers": str(layers),
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in held,
        "encoder_layers": depth,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": inner,
        "encoder_attention_heads": heads,
        "conv_pos": kernel,
        "conv_pos_groups": width // per_group if per_group else 0,
        "layer_norm_first": arguments.get("encoder_layer_norm_first", layer_norms),
        "normalize": normalize,
    }
    return stored_config("transformer", values)


def _ask(argument: str) -> str:
    return f"; save {{'{ARGUMENTS}': {{'{argument}': ...}}, '{STATE}': model.state_dict()}}"
