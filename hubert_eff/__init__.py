"""hubert-eff: speech self-supervised models that are cheap to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .exporting import export as export
    from .fusing import fuse as fuse
    from .model import build as build
    from .profiling import profile as profile
    from .quant import binarize as binarize
    from .registry import list_encoders as list_encoders
    from .registry import list_presets as list_presets
    from .registry import register_encoder as register_encoder

# public name -> module that defines it; imported on first use, so that commands which need no torch start at once
_PUBLIC = {
    "binarize": "quant",
    "build": "model",
    "export": "exporting",
    "fuse": "fusing",
    "list_encoders": "registry",
    "list_presets": "registry",
    "load": "checkpoint",
    "profile": "profiling",
    "register_encoder": "registry",
}
_MODULES = ("edge", "recognition", "streaming")  # public modules, likewise
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
