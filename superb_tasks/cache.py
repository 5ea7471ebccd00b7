"""Hidden states of a frozen upstream, computed once per recording and kept on disk.

A head sees each recording again in every epoch, fold and learning rate, and two tasks may share a data set; the upstream is most of the
work. States are kept in half precision, in a folder per model and data set, under a digest of the recording's samples: they are the same
whatever the task. Each recording is computed alone.

# B utterances, T frames, L+1 states, D model dim
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor, nn

from hubert_eff.config import FRAME_STRIDE, SAMPLE_RATE
from hubert_eff.errors import UserError
from hubert_eff.files import replacing


def estimate(folders: Iterable[Path], states: int, width: int) -> tuple[float, int]:
    """Hours of all recordings in the folders, and bytes of their `states` hidden states of `width` channels."""
    seconds = sum(sf.info(file).duration for folder in folders for kind in ("*.wav", "*.flac") for file in folder.rglob(kind))
    return seconds / 3600, round(seconds * SAMPLE_RATE / FRAME_STRIDE * states * width * 2)


def check_space(folder: Path, size: int) -> None:
    """Raise `UserError` if `size` bytes do not fit where `folder` is."""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(f"--cache {folder}: about {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


class CachedUpstream(nn.Module):
    """An `UpstreamExpert` that reads what it has computed before. Frozen: its output carries no gradient.

    `limit` is the number of bytes after which nothing more is written to `folder`, that of a model and a data set: of long recordings,
    S3PRL takes pieces at random, which never come again.
    """

    def __init__(self, expert: nn.Module, folder: Path, limit: int) -> None:
        super().__init__()
        self.expert, self.folder = expert, folder
        self.left = limit - sum(file.stat().st_size for file in folder.rglob("*.npy"))

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return FRAME_STRIDE

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """As `UpstreamExpert.forward`: B waveforms to L+1 states, each (B, T, D)."""
        rows = [self._states(wav) for wav in wavs]  # each (L+1, T_i, D)
        frames = max(row.shape[1] for row in rows)
        states = rows[0].new_zeros(rows[0].shape[0], len(rows), frames, rows[0].shape[2])  # (L+1, B, T, D)
        for index, (row, wav) in enumerate(zip(rows, wavs)):
            states[:, index, : row.shape[1]] = row
            # S3PRL takes a frame for every 320 samples begun: the last one is repeated, as the expert does in a batch
            states[:, index, row.shape[1] : -(-len(wav) // FRAME_STRIDE)] = row[:, -1:]
        return {
            "hidden_states": list(states),
            "last_hidden_state": states[-1],
            **{f"hidden_state_{i}": state for i, state in enumerate(states)},
        }

    def _states(self, wav: Tensor) -> Tensor:
        name = hashlib.blake2b(wav.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        file = self.folder / name[:2] / f"{name}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file)).to(wav.device, torch.float32)
        states = torch.stack(self.expert([wav])["hidden_states"])[:, 0]
        half = states.half()
        if not torch.isfinite(half).all():
            return states  # too large for half precision: computed every time
        if self.left > 0:
            with replacing(file) as temporary:
                np.save(temporary, half.cpu().numpy())
            self.left -= half.numel() * 2
        return half.float()
