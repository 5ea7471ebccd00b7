"""hubert-eff: speech self-supervised models that are cheap to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"
_moved.install()

if TYPE_CHECKING:
    from .checkpoints.load import load as load
    from .checkpoints.open import open_model as open_model
    from .encoders.registry import list_encoders as list_encoders
    from .encoders.registry import list_presets as list_presets
    from .encoders.registry import register_encoder as register_encoder
    from .exporting.safetensors import export as export
    from .inference.features import features as features
    from .models.fuse import fuse as fuse
    from .models.hubert import build as build
    from .profiling import profile as profile
    from .quant import binarize as binarize
    from .quant import quantize as quantize

# public name -> module that defines it; imported on first use, so commands that do not need torch start at once
_PUBLIC = {
    "binarize": "quant",
    "build": "models.hubert",
    "export": "exporting.safetensors",
    "features": "inference.features",
    "fuse": "models.fuse",
    "list_encoders": "registry",
    "list_presets": "registry",
    "load": "checkpoints.load",
    "open_model": "checkpoints.open",
    "profile": "profiling",
    "quantize": "quant",
    "register_encoder": "registry",
}
_MODULES = ("edge", "recognition", "registry", "streaming")  # public modules, likewise
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC and name not in _MODULES:
        raise AttributeError(f"module 'hubert_eff' has no attribute '{name}'")
    import importlib

    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
