"""Small models of transformers and torchaudio with random weights, and their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = {"conv_dim": [16] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 7, "classifier_proj_size": 8, **CONVOLUTIONS,
}  # fmt: skip
# what distinguishes the published models
KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "distilhubert": {"feat_proj_layer_norm": False},
    "post-norm-layer": {"feat_extract_norm": "layer"},
    "pre-norm-group": {"do_stable_layer_norm": True},
}


def theirs(name: str = "HubertModel", kind: str = "base", **keys: Any) -> Any:
    """A model of transformers, all of whose parameters are random: norms and biases too."""
    import transformers

    config_class = "HubertConfig" if name.startswith("Hubert") else "Wav2Vec2Config"
    config = getattr(transformers, config_class)(**{**SIZES, **KINDS[kind], **keys})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    shaken(model)
    return model


def shaken(model: nn.Module) -> None:
    """Move every parameter, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def audio() -> tuple[Tensor, Tensor]:
    """Two recordings (B, S), the second one shorter, and their padding."""
    generator = torch.Generator().manual_seed(1)
    wav, padding = 0.1 * torch.randn(2, 4000, generator=generator), torch.zeros(2, 4000, dtype=torch.bool)
    padding[1, 2900:] = True
    return wav.masked_fill(padding, 0.0), padding


def apart(ours: list[Tensor], padding: Tensor, others: Any) -> float:
    """The largest difference of hidden states on valid frames."""
    assert len(ours) == len(others)
    return max(float((a - b)[~padding].detach().abs().max()) for a, b in zip(ours, others, strict=True))
