"""`Recognizer`: a HuBERT encoder with a CTC layer (Baevski et al. 2020, section 3.3) and, as an option, an attention decoder."""

# B batch, S samples at 16 kHz, T frames of 20 ms, D model dim, U letters, V labels: blank and letters

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import COUNT, MEL_FRONTS, MOST_LAYERS, NOT_NEGATIVE, PROBABILITY, Bounds, HubertConfig, check_options, option
from ..encoders.registry import encoder_of, preset_config, stored_config
from ..errors import UserError, short, unknown
from ..layers.dropout import Dropout
from ..layers.linear import Linear
from ..layers.zipformer import Downsample
from ..models.hubert import HEADS, HubertModel, normalize_waveform
from ..models.logmel import BINS, LogMelExtractor
from ..models.masking import uniform_mask
from ..models.output import RecognizerOutput
from .alphabet import BLANK, Alphabet, frames_needed
from .decoder import AttentionDecoder, backwards, shifted
from .lstm_decoder import LSTMDecoder
from .pieces import Pieces

# encoder keys that fine-tuning may set, since they change no weight
TRAINING_KEYS = (
    "seed", "chunk_sizes", "left_chunks", "identity_attention_updates", "feature_grad_mult",
    "dropout", "attention_dropout", "activation_dropout", "dropout_input", "encoder_layerdrop",
    "mask_prob", "mask_length", "mask_selection", "mask_other",
    "mask_channel_prob", "mask_channel_length", "mask_channel_selection", "mask_channel_other",
)  # fmt: skip
# sizes of published recognizers: encoder preset, encoder keys that differ, decoder keys
PRESETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{encoder}-{layers}+{decoders}": (
        preset,
        {
            "encoder_layers": layers, "encoder_embed_dim": dim, "encoder_ffn_embed_dim": 2048, "encoder_attention_heads": heads, **more,
            **({"conv_module_expansion": 2} if encoder == "fusionformer" and decoders == "3+3" else {}),
        },
        {
            "decoder_layers": 6 if decoders == "6" else 3, "decoder_right_layers": 0 if decoders == "6" else 3,
            "decoder_ffn_embed_dim": 2048, "decoder_attention_heads": heads, "decoder_norm": norm,
        },
    )
    for encoder, preset, norm, more in (
        ("fusionformer", "fusionformer-s", "batch_norm", {}),
        ("conformer", "conformer-s", "layer_norm", {"depthwise_conv_kernel_size": 15}),
    )
    for layers, dim, heads in ((12, 256, 4), (16, 384, 6))
    for decoders in ("6", "3+3")  # 3+3: U2++'s two; with 4,233 symbols these have the 48 and 98 million parameters that are printed
}  # fmt: skip


DROPOUT = Bounds(least=0, below=1)
MASKS = Bounds(least=0, most=100)


@dataclass
class RecognizerConfig:
    """The configuration of a recognizer; `encoder` and `encoder_config` describe its encoder, so a checkpoint needs no other file."""

    encoder: str = option("", "name of the encoder")
    encoder_config: str = option("", "configuration of the encoder as JSON; filled in when fine-tuning begins, as encoder is")
    letters: str = option("", "the dictionary: one character per letter, or symbols separated by spaces; filled in from the task")
    sentencepiece: str = option("", "the sentencepiece model of the symbols, compressed; filled in from the task", longest=1 << 24)
    final_dropout: float = option(0.1, "dropout on the encoder's output", bounds=DROPOUT)
    apply_mask: bool = option(True, "mask spans of frames and channels in training, as mask_* and mask_channel_* say")
    specaug_freq_masks: int = option(0, "number of bands of mel bins that SpecAugment masks in training, for a log-mel front", bounds=MASKS)
    specaug_freq_width: int = option(27, "largest width of these bands, in bins of 80", bounds=COUNT)
    specaug_time_masks: int = option(0, "number of spans of time that SpecAugment masks", bounds=MASKS)
    specaug_time_width: int = option(100, "largest length of these spans, in units of 10 ms", bounds=COUNT)
    specaug_time_share: float = option(1.0, "largest length of these spans, as a share of the utterance", bounds=PROBABILITY)
    freeze_finetune_updates: int = option(
        0, "updates at the start in which only the new layers learn, not the encoder", bounds=NOT_NEGATIVE
    )
    ctc_weight: float = option(
        0.3, "weight of the CTC loss; the decoder's loss has 1 - ctc_weight; without a decoder only CTC counts", bounds=PROBABILITY
    )
    label_smoothing: float = option(0.1, "label smoothing of the decoder's loss", bounds=DROPOUT)
    decoder_type: str = option(
        "transformer", "type of the decoder: blocks of attention, or one LSTM with single-head additive attention", ("transformer", "lstm")
    )
    decoder_layers: int = option(
        0, "number of blocks of the attention decoder; 0 is no decoder, an LSTM has 1", bounds=Bounds(0, MOST_LAYERS)
    )
    decoder_ffn_embed_dim: int = option(
        2048, "inner dimension of the decoder's feed-forward modules, or size of the LSTM's state", bounds=COUNT
    )
    decoder_attention_heads: int = option(4, "attention heads of the decoder; an LSTM always has one", bounds=COUNT)
    decoder_dropout: float = option(0.1, "its dropout", bounds=DROPOUT)
    decoder_norm: str = option(
        "layer_norm",
        "norms of the decoder: LayerNorm before each module, or BatchNorm after each linear layer",
        ("layer_norm", "batch_norm"),
    )
    decoder_right_layers: int = option(
        0,
        "number of blocks of a second decoder that reads texts backwards, as in U2++; 0 is no such decoder",
        bounds=Bounds(0, MOST_LAYERS),
    )
    decoder_reverse_weight: float = option(0.3, "weight of the second decoder in the loss and in rescoring", bounds=PROBABILITY)
    output_downsampling: int = option(
        1, "frames of 20 ms that a learned average joins for CTC layer and decoder; hidden states stay at 20 ms", bounds=Bounds(1, 8)
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.decoder_type == "lstm" and self.decoder_layers > 1:
            raise UserError(f"decoder_type=lstm is one layer: set decoder_layers=1, not {self.decoder_layers}")
        if self.decoder_type == "lstm" and self.decoder_norm != "layer_norm":
            raise UserError(f"decoder_norm={self.decoder_norm} is for Transformer decoders: decoder_type=lstm has no norms")
        if self.decoder_right_layers and not self.decoder_layers:
            raise UserError(f"decoder_right_layers={self.decoder_right_layers} needs a first decoder beside it: set decoder_layers above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecognizerConfig:
        """Build from a mapping. Raises `UserError` for an unknown key."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown(f"key of {cls.__name__}", key, known)
        return cls(**values)

    def describe(self, config: HubertConfig) -> None:
        """Store the encoder's configuration."""
        self.encoder = encoder_of(config).name
        self.encoder_config = json.dumps(config.to_dict(), sort_keys=True)

    def hubert(self) -> HubertConfig:
        """The configuration of the encoder. Raises `UserError` if there is none."""
        if not self.encoder or not self.encoder_config:
            raise UserError("the configuration does not describe an encoder: give a pre-trained checkpoint, or a preset")
        return stored_config(self.encoder, self.encoder_config)


class Recognizer(nn.Module):
    """Audio -> letters. `hubert` is the encoder, `ctc_proj` the CTC layer, `decoder` the attention decoder or None."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.config = config
        self.alphabet = Alphabet(config.letters, Pieces(config.sentencepiece) if config.sentencepiece else None)
        self.hubert = HubertModel(config.hubert())
        self.hubert.heads = HEADS[bool(config.decoder_layers)]
        front = self.hubert.config.conv_feature_layers
        if (config.specaug_freq_masks or config.specaug_time_masks) and front not in MEL_FRONTS:
            raise UserError(
                f"specaug_freq_masks and specaug_time_masks mask a log-mel spectrogram, and this model's front is {short(front, 60)}: use "
                f"mask_prob and mask_channel_prob, or a model with conv_feature_layers={' | '.join(MEL_FRONTS)}"
            )
        dim = self.hubert.config.encoder_embed_dim
        self.downsample = Downsample(config.output_downsampling)
        self.final_dropout = Dropout(config.final_dropout)
        self.ctc_proj = Linear(dim, len(self.alphabet))
        self.decoder: AttentionDecoder | LSTMDecoder | None = None
        self.num_updates = 0
        if config.decoder_layers and config.decoder_type == "lstm":
            self.decoder = LSTMDecoder(len(self.alphabet) + 1, dim, config.decoder_ffn_embed_dim, config.decoder_dropout)
        elif config.decoder_layers:
            if dim % config.decoder_attention_heads:
                raise UserError(f"decoder_attention_heads={config.decoder_attention_heads} does not divide the encoder's dimension {dim}")
            self.decoder = AttentionDecoder(
                len(self.alphabet) + 1, dim, config.decoder_layers, config.decoder_ffn_embed_dim, config.decoder_attention_heads,
                config.decoder_dropout, config.decoder_norm,
            )  # fmt: skip
        if config.decoder_right_layers:
            if not isinstance(self.decoder, AttentionDecoder):
                raise UserError(f"decoder_right_layers={config.decoder_right_layers} is for Transformer decoders: set it to 0")
            self.decoder.right = AttentionDecoder(
                len(self.alphabet) + 1, dim, config.decoder_right_layers, config.decoder_ffn_embed_dim, config.decoder_attention_heads,
                config.decoder_dropout, config.decoder_norm,
            )  # fmt: skip

    @property
    def head(self) -> AttentionDecoder | LSTMDecoder:
        """The decoder. Raises `UserError` for a model without one."""
        if self.decoder is None:
            raise UserError("this model has a CTC layer, but no attention decoder: search greedy or beam, or train model hubert_eff_aed")
        return self.decoder

    @property
    def learns_ctc(self) -> bool:
        """Whether the CTC layer learns in training; with ctc_weight=0 only the attention decoder does."""
        return self.decoder is None or self.config.ctc_weight > 0

    def check_ctc(self) -> None:
        """Raise `UserError` if the CTC layer has learned nothing."""
        if not self.learns_ctc:
            raise UserError(
                "this model was trained with ctc_weight=0: its CTC layer has learned nothing; search by its attention decoder alone "
                "(--search attention), or fine-tune with a ctc_weight above 0"
            )

    def set_num_updates(self, num_updates: int) -> None:
        """Tell the model how many updates have been made."""
        self.num_updates = num_updates
        self.hubert.set_num_updates(num_updates)

    # -- inference ---------------------------------------------------------------------------------------------------

    def encode(self, wav: Tensor, padding_mask: Tensor | None = None, **chunks: Any) -> tuple[Tensor, Tensor]:
        """Encode audio (B, S) for CTC layer and decoder: (B, T / output_downsampling, D), and its padding (B, T / output_downsampling).

        chunks: chunk_size and left_chunks of `hidden_states`. Raises `UserError` for chunks that frames of the heads do not fit.
        """
        self.check_chunk(chunks.get("chunk_size"))
        states, padding = self.hubert.hidden_states(wav, padding_mask, **chunks)
        return self.for_heads(states[-1], ~padding), padding[:, :: self.downsample.rate]

    def check_chunk(self, size: int | None) -> None:
        """Raise `UserError` for chunks of `size` frames of 20 ms that frames of the heads do not fit."""
        if size and size % self.downsample.rate:
            raise UserError(f"chunk_size={size} must be a multiple of output_downsampling={self.downsample.rate}")

    def for_heads(self, encoded: Tensor, valid: Tensor | None = None) -> Tensor:
        """Bring encoder output (B, T, D), with valid frames (B, T), to the rate of CTC layer and decoder."""
        return self.downsample.down(encoded, valid)

    def num_frames(self, samples: int) -> int:
        """Number of frames that CTC layer and decoder read for an utterance of so many samples."""
        return -(-self.hubert.num_frames(samples) // self.downsample.rate)

    def ctc_log_probs(self, encoded: Tensor) -> Tensor:
        """(B, T, D) -> log-probabilities of blank and letters (B, T, V). Raises `UserError` if the layer has learned nothing."""
        self.check_ctc()
        scores: Tensor = self.ctc_proj(self.final_dropout(encoded)).float()
        return scores.log_softmax(-1)

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(
        self, source: Tensor, targets: Tensor, target_lengths: Tensor, padding_mask: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> RecognizerOutput:
        """Losses of source (B, S), targets (B, U) of target_lengths (B,) and padding_mask (B, S); sample_ids (B,) seed the masks."""
        if self.hubert.config.normalize:
            source = normalize_waveform(source, padding_mask, self.hubert.config.normalize_eps)
        frozen = self.training and self.num_updates < self.config.freeze_finetune_updates
        with torch.no_grad() if frozen else nullcontext():
            masked = self.config.apply_mask and self.training
            spectrum = self._specaugment(source, padding_mask, sample_ids) if self.training else None
            output = self.hubert(
                source, padding_mask=padding_mask, mask=masked, features_only=True, sample_ids=sample_ids, spectrum=spectrum
            )  # fmt: skip
        encoded, padding = output.x, output.padding_mask
        encoded = self.for_heads(encoded, None if padding is None else ~padding)
        padding = None if padding is None else padding[:, :: self.downsample.rate]
        result = RecognizerOutput(encoded.new_zeros((), dtype=torch.float32))
        lengths = torch.full_like(target_lengths, encoded.size(1)) if padding is None else (~padding).sum(1)
        if not self.learns_ctc and not self.training:
            result.encoded, result.frames = encoded.detach(), lengths
        if self.learns_ctc:
            log_probs = self.ctc_log_probs(encoded)
            loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, blank=BLANK, reduction="sum")
            result = RecognizerOutput(loss, loss.detach(), log_probs.detach(), lengths)
        if self.decoder is None:
            return result
        attention, result.correct, result.count = self._says(self.decoder, targets, target_lengths, encoded, padding)
        if self.config.decoder_right_layers:
            assert isinstance(self.decoder, AttentionDecoder) and self.decoder.right is not None
            weight, right = self.config.decoder_reverse_weight, self.decoder.right
            reverse = self._says(right, backwards(targets, target_lengths), target_lengths, encoded, padding)[0]
            attention = (1 - weight) * attention + weight * reverse
        result.loss = self.config.ctc_weight * result.loss + (1 - self.config.ctc_weight) * attention
        result.loss_attention = attention.detach()
        return result

    def _specaugment(self, source: Tensor, padding_mask: Tensor | None, sample_ids: Tensor | None) -> Tensor | None:
        """SpecAugment's mask of the spectrograms (B, M, 80), by seed, update and utterance; None for none. Time is not warped."""
        config, extractor = self.config, self.hubert.feature_extractor
        if not (config.specaug_freq_masks or config.specaug_time_masks):
            return None
        assert isinstance(extractor, LogMelExtractor)
        batch, longest = len(source), extractor.mel_frames(source.size(1))
        samples = [source.size(1)] * batch if padding_mask is None else (~padding_mask).sum(1).tolist()
        masked = np.zeros((batch, longest, BINS), dtype=bool)
        for row, number in enumerate(range(batch) if sample_ids is None else sample_ids.tolist()):
            rng = np.random.default_rng((self.hubert.config.seed, self.num_updates + 1, number, 3))
            frames = min(extractor.mel_frames(samples[row]), longest)
            widest = min(config.specaug_time_width, int(config.specaug_time_share * frames))
            masked[row, :, uniform_mask(BINS, config.specaug_freq_masks, config.specaug_freq_width, rng)] = True
            masked[row, :frames][uniform_mask(frames, config.specaug_time_masks, widest, rng)] = True
        return torch.from_numpy(masked).to(source.device)

    def _says(
        self, decoder: nn.Module, targets: Tensor, lengths: Tensor, encoded: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A decoder's loss, summed over letters, the number of letters that it predicts correctly, and the number of all letters."""
        letters, wanted, valid = shifted(targets, lengths, self.alphabet.end)
        scores = decoder(letters, encoded, padding, valid)[valid].float()  # (N, V)
        loss = F.cross_entropy(scores, wanted[valid], reduction="sum", label_smoothing=self.config.label_smoothing)
        return loss, (scores.argmax(-1) == wanted[valid]).sum(), valid.sum()

    def check_length(self, numbers: list[int], samples: int, where: str) -> None:
        """Raise `UserError` if a text is longer than its audio allows."""
        frames = self.num_frames(samples)
        if frames_needed(numbers) > frames:
            raise UserError(too_long(where, numbers, frames))


def too_long(where: str, numbers: list[int], frames: int) -> str:
    """The message about a transcript that is longer than its audio allows."""
    return (
        f"{where}: {len(numbers)} letters need {frames_needed(numbers)} frames, one each and one between equal neighbors, but "
        f"the audio has {max(frames, 0)}: correct the transcript, or leave the recording out"
    )


def build_recognizer(preset: str, letters: str, **overrides: Any) -> Recognizer:
    """A randomly initialized recognizer of one of `PRESETS`; `overrides` are keys of its encoder."""
    if preset not in PRESETS:
        raise unknown("preset of a recognizer", preset, PRESETS)
    encoder, keys, decoder = PRESETS[preset]
    config = RecognizerConfig(letters=letters, **decoder)
    config.describe(preset_config(encoder, **{**keys, **overrides}))
    return Recognizer(config)
