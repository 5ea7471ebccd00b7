"""Reads recordings for recognition: files of any format, or a manifest with its transcripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.audio import Unusable, check, read_mono
from ..errors import UnusableFile, UserError


def read_recording(path: Path) -> Tensor:
    """Read a file as 16 kHz mono, (1, S). Raises `UserError` if it is missing, not audio, silent or not finite."""
    try:
        if path.is_dir():
            raise UnusableFile(f"{path} is a folder: name the recordings in it")
        if not path.is_file():
            raise UnusableFile(f"{path} is not a regular file" if path.exists() else f"no recording at {path}")
        return torch.from_numpy(np.concatenate(list(read_mono(path, check(path)))))[None]
    except Unusable as reason:
        raise UnusableFile(f"{path} cannot be used: {reason}") from reason
    except UnusableFile:
        raise
    except (UserError, OSError) as error:
        raise UnusableFile(f"{path} cannot be read: {error}") from error
