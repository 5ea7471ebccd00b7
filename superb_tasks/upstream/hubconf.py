"""Entry point of the upstream in S3PRL's hub: `-u hubert_eff -k CKPT`."""

from __future__ import annotations

from .expert import UpstreamExpert as _UpstreamExpert  # without the underscore S3PRL would list it as an upstream


def hubert_eff(ckpt: str, model_config: str | None = None, refresh: bool = False) -> _UpstreamExpert:
    """The upstream for a checkpoint or a preset; see `UpstreamExpert`. `refresh` concerns downloads: there are none."""
    return _UpstreamExpert(ckpt, model_config=model_config)
