"""Hidden states of a frozen upstream, computed once per recording and kept on disk.

A head sees each recording again in every epoch, fold and learning rate, and two tasks may share a data set; the upstream is most of the
work. States are kept in half precision, in a folder per model and data set, under a digest of the recording's samples: they are the same
whatever the task. Each recording is computed alone.

A file is a .npy array with a digest behind it, of its content and its place. One that is not whole, or not what belongs there, is never
used: it is named and made anew.

# B utterances, T frames, L+1 states, D model dim
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf
import torch
from torch import Tensor, nn

from hubert_eff.config import FRAME_STRIDE, SAMPLE_RATE
from hubert_eff.errors import UserError, printable
from hubert_eff.utils.files import replacing, writable

from ..data import layouts
from ..upstream.expert import UpstreamExpert

DIGEST = 16  # bytes
NAMED = 5  # number of damaged files that are named before one line says that there are more
TOLERANCE = 0.05  # relative L2 between states of one code: half precision and another device's arithmetic are far below


def estimate(folders: Iterable[Path], states: int, width: int) -> tuple[float, int]:
    """Hours of all recordings in the folders, and bytes of their `states` hidden states of `width` channels."""
    seconds = sum(sf.info(file).duration for folder in folders for file in layouts.recordings(folder))
    return seconds / 3600, round(seconds * SAMPLE_RATE / FRAME_STRIDE * states * width * 2)


def check_space(folder: Path, size: int) -> None:
    """Raise `UserError` if `size` bytes do not fit where `folder` is, or it cannot be written to."""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(f"--cache {folder}: about {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    writable(folder)


class CachedUpstream(nn.Module):
    """An `UpstreamExpert` that reads what it has computed before. Frozen: its output carries no gradient.

    `limit` is the number of bytes after which nothing more is written to `folder`, that of a model and a data set: of long recordings,
    S3PRL takes pieces at random, which never come again.
    """

    def __init__(self, expert: UpstreamExpert, folder: Path, limit: int) -> None:
        super().__init__()
        self.expert, self.folder, self.limit = expert, folder, limit
        self.left = limit - sum(file.lstat().st_size for file in folder.rglob("*.npy"))
        self.damaged = 0  # files found so

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return FRAME_STRIDE

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Do what `UpstreamExpert.forward` does: B waveforms to L+1 states, each (B, T, D)."""
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

    @torch.no_grad()
    def verify(self) -> None:
        """Compare the states of a second of noise with those in the folder; where they differ, it is emptied: other code made them.

        That is for what no digest of weights and code sees.
        """
        generator = torch.Generator().manual_seed(0)
        noise = 0.1 * torch.randn(SAMPLE_RATE, generator=generator).to(next(self.expert.parameters()).device)
        file = self._file(noise)
        states, kept = self._compute(noise), self._read(file, len(noise))
        if kept is not None and (kept.to(states) - states).norm() > TOLERANCE * states.norm():
            _say(f"cache {self.folder}: its states are not those that this model computes: they are made anew")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.left, kept = self.limit, None
        if kept is None:
            self._write(file, states)

    def _states(self, wav: Tensor) -> Tensor:
        """(L+1, T, D) in float32."""
        file = self._file(wav)
        if (kept := self._read(file, len(wav))) is not None:
            return kept.to(wav.device, torch.float32)
        states = self._compute(wav)
        return states.half().float() if self._write(file, states) else states

    def _compute(self, wav: Tensor) -> Tensor:
        self.expert.eval()
        return torch.stack(self.expert([wav])["hidden_states"])[:, 0].float()

    def _file(self, wav: Tensor) -> Path:
        name = hashlib.blake2b(wav.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.npy"

    def _read(self, file: Path, samples: int) -> Tensor | None:
        """The states in a file, None where there is none. One that is not what belongs there is named and removed."""
        try:
            size = file.lstat().st_size
        except OSError:
            return None
        model = self.expert.model
        frames = model.num_frames(max(samples, self.expert.receptive_field))
        shape = (len(model.encoder.layers) + 1, frames, model.config.encoder_embed_dim)
        try:
            if (states := self._whole(file, shape)) is not None:
                return torch.from_numpy(states)
            reason = "is not whole, or is of another recording or model"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        self.damaged += 1
        if self.damaged <= NAMED:
            _say(f"cache: {file} {reason}: it is made anew")
        elif self.damaged == NAMED + 1:
            _say(f"cache {self.folder}: more files are not whole: they are made anew, too")
        with contextlib.suppress(OSError):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            self.left += size
        return None

    def _whole(self, file: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float16] | None:
        """The array in a file, if its digest, shape and values are valid. Raises `OSError` if it cannot be read."""
        if not file.is_file() or file.stat().st_size > 2 * math.prod(shape) + 1024:
            return None
        content = file.read_bytes()
        if content[-DIGEST:] != self._digest(file, content[:-DIGEST]):
            return None
        states: npt.NDArray[np.float16] = np.load(io.BytesIO(content), allow_pickle=False)
        return states if states.shape == shape and states.dtype == np.float16 and np.isfinite(states).all() else None

    def _digest(self, file: Path, content: bytes) -> bytes:
        place = "/".join((self.folder.parent.name, self.folder.name, file.name))
        return hashlib.blake2b(place.encode() + content, digest_size=DIGEST).digest()

    def _write(self, file: Path, states: Tensor) -> bool:
        """Keep states. Returns whether half precision can hold them. If they cannot be written, as on a full disk, the run continues."""
        half = states.half()
        if not torch.isfinite(half).all():
            return False  # computed every time
        if self.left > 0:
            array = io.BytesIO()
            np.save(array, half.cpu().numpy())
            content = array.getvalue() + self._digest(file, array.getvalue())
            try:
                with replacing(file, sync=False) as temporary:
                    temporary.write_bytes(content)
                self.left -= len(content)
            except (OSError, UserError) as error:
                _say(f"cache {self.folder}: {error}; from here on nothing more is kept")
                self.left = 0
        return True


def _say(line: str) -> None:
    print(f"-- {printable(line)}", file=sys.stderr, flush=True)
