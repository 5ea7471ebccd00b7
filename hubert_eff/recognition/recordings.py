"""Recordings for recognition: files of any format, or a manifest with its transcripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..labels.audio import Unusable, check, read_mono


def read_recording(path: Path) -> Tensor:
    """A file as 16 kHz mono, (1, S). Raises `UserError` if it is missing, no audio, silent, or holds a sample that is not finite."""
    if not path.is_file():
        raise UserError(f"no recording at {path}")
    try:
        checked = check(path)
    except Unusable as reason:
        raise UserError(f"{path} cannot be used: {reason}") from reason
    return torch.from_numpy(np.concatenate(list(read_mono(path, checked))))[None]
