"""Opens trained encoders whose hidden states become labels or teach a student, by one grammar:

    FILE                  what `hubert_eff.load` reads; a file or folder wins over everything below
    PRESET[+wNaM][@SEED]  a model with random weights
    FOLDER                a folder of Hugging Face; this package reads what its Transformer can hold, and transformers reads the rest
    KIND:NAME             an encoder of another package, such as s3prl:wavlm_base, by the entry point KIND of the group
                          `hubert_eff.teachers`: a function of NAME that returns a module in eval mode, which takes 16 kHz audio (B, S)
                          and returns its hidden states, a sequence of (B, T, D)

Every state is brought to frames of 20 ms, 1 + (S - 400) // 320 for S samples: at 25 Hz each frame is repeated, at 100 Hz every second frame
is taken. State 0 enters the first block, and state L leaves block L; states are those of the encoder's own library.
"""

# B batch, S samples, T frames, D channels of a state

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.huggingface import CONFIG, is_folder, read_json, reads
from ..checkpoints.open import open_model
from ..config import FRAME_STRIDE, RECEPTIVE_FIELD, SAMPLE_RATE
from ..errors import UserError, about, short, unknown
from ..models.extractor import receptive_field
from ..models.hubert import HubertModel, normalize_waveform
from .features import chunks

GROUP = "hubert_eff.teachers"
RATE = SAMPLE_RATE / FRAME_STRIDE  # labels per second
RATES = {25.0: "each twice", RATE: "all", 100.0: "every second"}  # rate of a state -> the frames that are taken
PIECE = 3_000  # frames computed at a time (1 min); the memory of attention grows with their square
SLACK = 3  # number of frames that a state may lack or exceed at its end
PROBES = (1, 5)  # seconds of noise with which rates are measured


class Teacher(nn.Module):
    """An encoder with random or trained weights, in eval mode.

    Attributes:
        name: the name by which the encoder was opened.
        rates: frames per second of each hidden state.
        pads: whether utterances of different lengths may share a batch, because padding changes nothing.
        eps: added to the variance in the normalization of whole recordings; None if audio is not normalized.
        piece: maximum frames of 20 ms in one pass; longer recordings are cut.
        window: number of samples that one frame depends on.
        least: number of samples that even the shortest utterance costs.
    """

    rates: tuple[float, ...] = ()
    pads = False
    eps: float | None = None
    piece = PIECE
    window = RECEPTIVE_FIELD
    least = 0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @property
    def depth(self) -> int:
        """The number of the last hidden state."""
        return len(self.rates) - 1

    def frames(self, samples: int) -> int:
        """Frames of 20 ms of an utterance; 0 if it is too short."""
        return max(0, 1 + (samples - RECEPTIVE_FIELD) // FRAME_STRIDE)

    def of_audio(self, wav: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        """All hidden states (B, T, D), each at its own rate, of audio (B, S) that is normalized already."""
        raise NotImplementedError

    def check_layers(self, layers: Sequence[int], option: str = "--layer") -> None:
        """Raise `UserError` for a missing state, and for one whose frames cannot be brought to 20 ms."""
        for layer in layers:
            if not 0 <= layer <= self.depth:
                raise UserError(f"{option} {layer} is not in {self.name}: it has hidden states 0 to {self.depth}")
            if self.rates[layer] not in RATES:
                raise UserError(
                    f"{self.name} has {self.rates[layer]:g} frames per second in its hidden state {layer}: only those of 25, 50 or 100 "
                    "can be brought to the 50 of labels"
                )

    def states(self, wav: Tensor, padding: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """The chosen states of a piece of normalized audio (B, S), each (B, T, D) at 20 ms; T is that of the longest utterance."""
        found, length = self.of_audio(wav, padding), self.frames(wav.size(1))
        return [self._at_20_ms(found[layer], self.rates[layer], length) for layer in layers]

    def _at_20_ms(self, state: Tensor, rate: float, length: int) -> Tensor:
        state = state[:, ::2] if rate == 100 else state.repeat_interleave(2, 1) if rate == 25 else state
        if abs(state.size(1) - length) > SLACK:
            raise UserError(
                f"{self.name} gives {state.size(1)} frames of 20 ms where {length} are expected: its states are not a sequence in time"
            )
        if state.size(1) < length:
            state = torch.cat([state, state[:, -1:].expand(-1, length - state.size(1), -1)], 1)
        return state[:, :length]

    def normalized(self, wav: Tensor, padding: Tensor | None = None) -> Tensor:
        """Normalize whole recordings (B, S) as the encoder expects."""
        return wav if self.eps is None else normalize_waveform(wav, padding, self.eps)

    def of_batch(self, wav: Tensor, padding: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """The chosen states (B, T, D) at 20 ms of whole utterances (B, S) as recorded, zero after the frames of each utterance."""
        wav = self.normalized(wav, padding)
        lengths = [wav.size(1)] * len(wav) if padding is None else (~padding).sum(1).tolist()
        groups: dict[int, list[int]] = {}  # rows that share a batch
        for row, samples in enumerate(lengths):
            groups.setdefault(max(lengths) if self.pads else samples, []).append(row)
        total, result = self.frames(wav.size(1)), []
        for samples, rows in groups.items():
            parts = []
            for start, end in chunks(samples, self.frames(samples), FRAME_STRIDE, self.window, self.piece):
                mask = None if padding is None else padding[rows, start:end]
                parts.append(self.states(wav[rows, start:end], mask if mask is not None and bool(mask.any()) else None, layers))
            result.append((rows, [torch.cat(part, 1) for part in zip(*parts, strict=True)]))
        found = [wav.new_zeros(len(wav), total, state.size(-1)) for state in result[0][1]]
        own = torch.tensor([self.frames(samples) for samples in lengths], device=wav.device)  # (B,)
        behind = (torch.arange(total, device=wav.device) >= own[:, None])[..., None]  # (B, T, 1)
        for rows, states in result:
            for whole, state in zip(found, states, strict=True):
                whole[rows, : state.size(1)] = state.to(whole.dtype)
        return [state.masked_fill(behind, 0.0) for state in found]

    def widths(self, layers: Sequence[int]) -> list[int]:
        """Channels of the chosen states."""
        device = next((tensor.device for tensor in self.parameters()), torch.device("cpu"))
        noise = 0.1 * torch.randn(1, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return [state.size(-1) for state in self.states(self.normalized(noise).to(device), None, layers)]


class OwnModel(Teacher):
    """A model of this package. Long recordings are normalized here as a whole."""

    def __init__(self, name: str, model: HubertModel) -> None:
        super().__init__(name)
        config = model.config
        self.rates = (RATE,) * (len(model.encoder.layers) + 1)
        self.eps = config.normalize_eps if config.normalize else None
        self.window = receptive_field(config.conv_layers)
        self.pads = config.extractor_mode == "layer_norm" and config.valid_frames == "receptive_field"
        model.config = replace(config, normalize=False)
        self.model = model.eval()

    def frames(self, samples: int) -> int:
        return self.model.num_frames(samples)

    def of_audio(self, wav: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        return self.model.hidden_states(wav, padding)[0]


class Foreign(Teacher):
    """An encoder of another package: audio (B, S) in, hidden states out."""

    def __init__(self, name: str, model: Any) -> None:
        super().__init__(name)
        self.model = model
        self.rates = measured(self)

    def of_audio(self, wav: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.model(wav)
        return found


def measured(teacher: Teacher) -> tuple[float, ...]:
    """Measure the frames per second of each hidden state with noise of two lengths. Raises `UserError` if there are no such states."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for seconds in PROBES:
        noise = 0.1 * torch.randn(1, seconds * SAMPLE_RATE, generator=generator)
        try:
            with torch.no_grad():
                states = list(teacher.of_audio(teacher.normalized(noise), None) or ())
        except UserError:
            raise
        except Exception as error:  # other libraries may raise anything
            raise UserError(f"{teacher.name} does not run on audio: {type(error).__name__}: {short(error)}") from error
        if not states or any(not isinstance(state, Tensor) or state.dim() != 3 or len(state) != 1 for state in states):
            raise UserError(f"{teacher.name} gives no hidden states of shape (utterances, frames, channels)")
        counts.append([state.size(1) for state in states])
    if len(counts[0]) != len(counts[1]):
        raise UserError(f"{teacher.name} gives {len(counts[0])} hidden states for one input and {len(counts[1])} for another")
    seconds = PROBES[1] - PROBES[0]
    return tuple(_rounded((many - few) / seconds, 1 / seconds) for few, many in zip(*counts, strict=True))


def _rounded(rate: float, error: float) -> float:
    return next((known for known in RATES if abs(rate - known) <= error), rate)


def open_teacher(name: str) -> Teacher:
    """Open the encoder that a name stands for, in eval mode on the CPU; the module's docstring has the grammar.

    Raises `UserError` for any other name, a folder without configuration or weights, quantized weights, a missing package, and as
    `open_model` does.
    """
    if not is_foreign(name):
        return OwnModel(name, open_model(name))
    if os.path.exists(name):
        from .huggingface import open_folder

        with about(name):
            return open_folder(Path(name), read_json(Path(name) / CONFIG))
    kind, _, rest = name.partition(":")
    return Foreign(name, _from_entry_point(kind, rest))


def is_foreign(name: str) -> bool:
    """Whether another package runs the encoder that a name stands for."""
    path = Path(name)
    if not path.exists():
        kind, colon, _ = name.partition(":")
        return bool(colon) and os.sep not in kind
    if not (path.is_dir() and is_folder(path)):
        return False
    with about(path):
        return not reads(read_json(path / CONFIG))


def _from_entry_point(kind: str, name: str) -> Any:
    known = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in known:
        raise unknown(f"kind of teacher (entry point of the group {GROUP})", kind, known)
    if not name:
        raise UserError(f"{kind}: names no encoder: write {kind}:NAME")
    try:
        model = known[kind].load()(name)
    except UserError:
        raise
    except Exception as error:  # other packages may raise anything
        raise UserError(f"{kind}:{name} cannot be opened: {type(error).__name__}: {short(error)}") from error
    return model.eval() if isinstance(model, nn.Module) else model


def weights_digest(name: str, model: nn.Module) -> str:
    """SHA-256 of a name and of all weights, which identifies an encoder without a file."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
