"""Encoders and presets by name: the public face of `hubert_eff.encoders.registry`."""

from .encoders.registry import (
    EncoderEntry,
    encoder_of,
    get_encoder,
    list_encoders,
    list_presets,
    preset_config,
    register_encoder,
    written_config,
)

__all__ = [
    "EncoderEntry", "encoder_of", "get_encoder", "list_encoders", "list_presets", "preset_config", "register_encoder", "written_config",
]  # fmt: skip
