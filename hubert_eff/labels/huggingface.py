"""Encoders in folders of Hugging Face that transformers runs: WavLM, Whisper's, and others that take samples. Nothing is downloaded."""

# B batch, S samples, T frames, D channels of a state

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.huggingface import EPS, PREPROCESSOR, check_weights, normalizes
from ..config import SAMPLE_RATE
from ..errors import UserError, require, short
from .teachers import RATE, Teacher, measured

PADDED = ("hubert", "wav2vec2", "wavlm")  # with norms over channels, no padded frame of these reaches a valid one
UNUSED = ("masked_spec_embed",)  # weights that only pre-training uses


class Waveform(Teacher):
    """A model of transformers that takes samples."""

    def __init__(self, name: str, model: Any, normalize: bool) -> None:
        super().__init__(name)
        self.model = model
        self.eps = EPS if normalize else None
        config = model.config
        self.pads = config.model_type in PADDED and getattr(config, "feat_extract_norm", "") == "layer"
        self.rates = measured(self)

    def of_audio(self, wav: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        more = {} if padding is None else {"attention_mask": (~padding).long()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # raised by WavLM, without effect
            states: Sequence[Tensor] = self.model(wav, output_hidden_states=True, **more).hidden_states
        return states


class Whisper(Teacher):
    """Whisper's encoder (Radford et al., 2022): log-mel spectrograms of windows of a fixed length, 30 s in the published models.

    A shorter utterance is extended to a window by silence, as in the model's training, and only its own frames are taken. Frame i is
    centered at 20 i ms, 12.5 ms earlier than in a HuBERT.
    """

    pads = True  # every utterance of a batch has a window of its own

    def __init__(self, name: str, model: Any, features: Any) -> None:
        super().__init__(name)
        self.model, self.features = model, features
        self.hop = 2 * features.hop_length  # samples: the second convolution halves the frames
        self.rates = (SAMPLE_RATE / self.hop,) * (model.config.encoder_layers + 1)
        self.least = model.config.max_source_positions * self.hop
        self.piece = round(self.least / SAMPLE_RATE * RATE)

    def of_audio(self, wav: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        lengths = [wav.size(1)] * len(wav) if padding is None else (~padding).sum(1).tolist()
        audio = [row[:length].cpu().float().numpy() for row, length in zip(wav, lengths, strict=True)]
        mel = self.features(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features  # (B, bands, 2 T)
        weight = self.model.conv1.weight
        states = self.model(mel.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
        most = -(-max(lengths) // self.hop)
        return [state[:, :most] for state in states]


def open_folder(folder: Path, values: Mapping[str, Any]) -> Teacher:
    """The encoder of a folder whose config.json holds `values`.

    Raises `UserError`, without the folder's name, for weights that are missing, quantized or of another model, for a model that does not
    take audio, and if transformers is missing.
    """
    if values.get("quantization_config") is not None:
        raise UserError("its weights are quantized (quantization_config), which is not read: give the float model that it was made from")
    normalize = normalizes(folder)
    weights = check_weights(folder)
    require("transformers", "hf", f"a model of type {short(repr(values.get('model_type')))}")
    import transformers

    offline = {"local_files_only": True, "trust_remote_code": False}
    with _one_line():
        model, info = transformers.AutoModel.from_pretrained(
            folder, **offline, weights_only=True, use_safetensors=weights.endswith((".safetensors", ".safetensors.index.json")),
            output_loading_info=True,
        )  # fmt: skip
    whisper = model.config.model_type == "whisper"
    missing = [name for name in info["missing_keys"] if not name.endswith(UNUSED) and not (whisper and name.startswith("decoder."))]
    if missing:
        raise UserError(f"its weights lack {short(min(missing))}, which its configuration asks for")
    if not whisper and model.main_input_name != "input_values":
        raise UserError(f"its model_type {short(repr(model.config.model_type))} takes {model.main_input_name}, not samples of audio")
    if not whisper:
        return Waveform(str(folder), model.float().eval(), normalize)
    if not (folder / PREPROCESSOR).is_file():
        raise UserError(f"it holds no {PREPROCESSOR}, which says how Whisper's spectrogram is made")
    with _one_line():
        features = transformers.AutoFeatureExtractor.from_pretrained(folder, **offline)
    encoder = model.get_encoder().float().eval()
    config = encoder.config
    found = (features.feature_size, features.nb_max_frames)
    if found != (wanted := (config.num_mel_bins, 2 * config.max_source_positions)):
        raise UserError(f"{PREPROCESSOR} makes {found[0]} bands of {found[1]} frames, the encoder takes {wanted[0]} of {wanted[1]}")
    return Whisper(str(folder), encoder, features)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn errors of transformers into one line, and silence its own messages."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"transformers cannot open it: {short(error)}") from error
    finally:
        logging.set_verbosity(before)
