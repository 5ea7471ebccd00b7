"""HuBERT in plain torch (Hsu et al. 2021, section II): extractor, masks, encoder, codebook head; hidden states."""

# B batch, S samples at 16 kHz, T frames of 20 ms, D model dim, C codewords, N masked (or unmasked) frames

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import FRAME_STRIDE, MEL_FRONTS, SAMPLE_RATE, HubertConfig, read_numbers
from ..encoders.registry import encoder_of, preset_config
from ..errors import UserError
from ..layers.chunks import Chunks
from ..layers.dropout import Dropout
from ..layers.kinds import CODEBOOK_HEAD, EXTRACTOR, INPUT_PROJECTION, Kind
from ..layers.linear import Linear, linear
from ..layers.precision import wide
from ..layers.tracing import is_symbolic
from ..quant.convert import convert
from ..quant.policy import SPECS, read_policy
from .extractor import check_audio, check_samples, extractor_of, frame_padding_mask, num_frames, receptive_field
from .masking import batch_mask
from .output import HubertOutput, Masks

HEADS = ("CTC layer", "CTC layer and attention decoder")  # heads of a fine-tuned model, without and with a decoder
LABEL_EMBEDDINGS = "label_embs_concat"

M = TypeVar("M", bound="HubertModel")


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class HubertModel(nn.Module):
    """A HuBERT with any registered encoder (Hsu et al. 2021, section II).

    Parameters are named as in fairseq's HubertModel, so that official checkpoints load.

    Args:
        config: the configuration; its class decides which encoder is built.
        num_classes: the size of each codebook; empty for a model without a pre-training head.

    Raises:
        UserError: the configuration has a value that is not allowed, or values that contradict each other.
    """

    fused = False  # whether this is a copy for inference that `hubert_eff.fuse` made
    edge = ""  # the form of a copy that `edge.rewrite` made (edge.FORMS)
    heads = ""  # of the encoder of a fine-tuned model: the heads that were left out
    stored_dtype: torch.dtype | None = None  # of a model read from an export: the dtype of its float tensors in the file

    def __init__(self, config: HubertConfig, num_classes: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = config
        self.num_classes = tuple(num_classes)
        self.num_updates = 0
        self.conv_layers = config.conv_layers  # parsed once, because tracers cannot follow the parser
        channels, dim, code = self.conv_layers[-1][0], config.input_dim, config.codebook_dim
        self.feature_extractor = extractor_of(config)
        self.layer_norm = nn.LayerNorm(channels) if config.feature_norm else nn.Identity()
        self.post_extract_proj = Linear(channels, dim) if channels != dim else None
        self.dropout_input = Dropout(config.dropout_input)
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = encoder_of(config).module(config)
        copies = len(self.num_classes) if config.untie_final_proj and self.num_classes else 1
        for size in read_numbers("chunk_sizes", config.chunk_sizes):
            self.chunks(size or None)  # refuses an invalid size now rather than in the batch that draws it
        self.final_proj = Linear(config.encoder_embed_dim, code * copies)
        self.target_glu = nn.Sequential(Linear(code, 2 * code), nn.GLU()) if config.target_glu else None
        if self.num_classes:
            self.label_embs_concat = nn.Parameter(torch.empty(sum(self.num_classes), code).uniform_())
        if config.quant != "none":
            convert(self, SPECS[config.quant], read_policy(config.quant_policy), config.streaming)

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the model's own parts (layers/kinds.py); the encoder declares its own.

        Returns:
            The kind of each part by the name of its attribute.
        """
        head = dict.fromkeys(("final_proj", "target_glu"), Kind(CODEBOOK_HEAD))
        return {"feature_extractor": Kind(EXTRACTOR), "post_extract_proj": Kind(INPUT_PROJECTION), **head}

    def train(self: M, mode: bool = True) -> M:
        """Set train or eval mode; a fused model stays in eval mode.

        Args:
            mode: True for train mode, False for eval mode.

        Returns:
            The model itself.
        """
        return super().train(mode and not self.fused)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Copy weights into this model, as `torch.nn.Module.load_state_dict` does.

        Args:
            state_dict: tensors by name.
            strict: refuse names that are missing or superfluous.
            *args: further arguments of `torch.nn.Module.load_state_dict`.
            **kwargs: likewise, by name.

        Returns:
            The missing and the unexpected names, as torch returns them.

        Raises:
            UserError: `strict`, and the weights are those of a binarized model while this one is float, or the other way round.
        """
        quantizers = [name for name in state_dict if name.endswith(".initialized")]
        if strict and quantizers and self.config.quant == "none":
            raise UserError(
                f"these are the weights of a binarized model ({len(quantizers)} quantizers, the first in {quantizers[0][:-12]}), but "
                "this model is float: build it with its quant (w1a1, w1a2 ...), as a preset PRESET+w1a1 does"
            )
        if strict and not quantizers and self.config.quant != "none":
            raise UserError(
                f"these are the weights of a float model, without scales of quantizers, but this model is binarized "
                f"({self.config.quant}): load them into a float model, then hubert_eff.binarize it"
            )
        return super().load_state_dict(state_dict, strict, *args, **kwargs)

    # -- features ----------------------------------------------------------------------------------------------------

    def num_frames(self, samples: int) -> int:
        """Count the frames of an utterance.

        Args:
            samples: its length in samples at 16 kHz.

        Returns:
            The number of frames of 20 ms: floor((samples - 400) / 320) + 1 for the default extractor.
        """
        return int(num_frames(samples, self.conv_layers))

    def _extract(self, source: Tensor, padding_mask: Tensor | None, spectrum: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveform (B, S) -> extractor output (B, T, C) and padding of frames (B, T); spectrum: what a log-mel front masks."""
        check_audio(source, padding_mask)
        if not is_symbolic():  # otherwise the number of frames would become a constant
            self._frames_of(source)
        if padding_mask is not None:
            source = source.masked_fill(padding_mask, 0.0)
        hidden = () if spectrum is None else (spectrum,)
        if self.config.feature_grad_mult > 0:
            features = self.feature_extractor(source, *hidden)
            if self.config.feature_grad_mult != 1.0 and features.requires_grad:
                features = ScaleGradient.apply(features, self.config.feature_grad_mult)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                features = self.feature_extractor(source, *hidden)
        frames = None if padding_mask is None else self._frame_padding(padding_mask, features.size(1))
        return features, frames

    def _in_chunks(self, wav: Tensor, padding_mask: Tensor | None, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
        """Compute encoder input (B, T, D) and padding of frames of audio (B, S), chunk by chunk as a stream does: in other shapes torch
        may sum in another order, and the last digit decides bits."""
        length = self._frames_of(wav)
        before, behind = self.feature_extractor.reach
        source = wav if padding_mask is None else wav.masked_fill(padding_mask, 0.0)
        source = F.pad(source, (before, behind))
        need = (chunks.size - 1) * FRAME_STRIDE + receptive_field(self.conv_layers) + before + behind
        parts = []
        for start in range(0, length, chunks.size):
            samples = source[:, start * FRAME_STRIDE :]
            samples = samples[:, :need] if start + chunks.size <= length else samples
            parts.append(self.project(self.feature_extractor.of_padded(samples)))
        frames = None if padding_mask is None else self._frame_padding(padding_mask, length)
        return torch.cat(parts, 1), frames

    def _frame_padding(self, padding_mask: Tensor, frames: int) -> Tensor:
        return frame_padding_mask(padding_mask, frames, self.config.valid_frames, self.conv_layers)

    def _frames_of(self, source: Tensor) -> int:
        """Number of frames of audio (B, S). Raises `UserError` if there are none."""
        length = self.num_frames(source.size(-1)) if source.size(-1) else 0
        if length < 1:
            raise UserError(f"{source.size(-1)} samples are too few: one frame needs {receptive_field(self.conv_layers)}")
        return length

    def project(self, features: Tensor) -> Tensor:
        """Normalize and project what the extractor gives.

        Args:
            features: extractor output (B, T, C).

        Returns:
            Encoder input (B, T, D).
        """
        x: Tensor = self.layer_norm(features)
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        return x

    def chunks(self, chunk_size: int | None, left_chunks: int = -1) -> Chunks | None:
        """Describe how this model runs in chunks.

        Args:
            chunk_size: frames of 20 ms in a chunk; None for the whole utterance at once.
            left_chunks: how many chunks before its own a frame attends to; -1 for all.

        Returns:
            What the encoder needs to run in chunks; None for the whole utterance.

        Raises:
            UserError: a number is invalid or does not fit this encoder, or the model cannot run in chunks.
        """
        if chunk_size is None:
            return None
        for name, value, least in (("chunk_size", chunk_size, 1), ("left_chunks", left_chunks, -1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} must be a whole number, at least {least}")
        multiple = self.encoder.chunk_multiple
        if not self.config.streaming:
            reason = "its extractor normalizes over the whole utterance (extractor_mode=default)"
            if self.config.extractor_mode == "layer_norm" or self.config.conv_feature_layers in MEL_FRONTS:
                reason = "its convolutions over time see beyond the end of a chunk"
            raise UserError(f"this model cannot stream: {reason}; build and train it with streaming=true")
        if multiple is None:
            raise UserError(f"this model cannot stream: a {type(self.encoder).__name__} does not run in chunks")
        if chunk_size % multiple:
            raise UserError(
                f"chunk_size={chunk_size} must be a multiple of {multiple}, the number of frames that this encoder takes together"
            )
        block = self.encoder.attention_block
        if self.config.quant != "none" and block and chunk_size % block and block % chunk_size:
            raise UserError(
                f"chunk_size={chunk_size} does not fit the blocks of {block} frames in which this one-bit model attends (sparse_stride): "
                f"take a divisor or a multiple of {block}"
            )
        return Chunks(chunk_size, left_chunks)

    def hidden_states(
        self, wav: Tensor, padding_mask: Tensor | None = None, chunk_size: int | None = None, left_chunks: int = -1
    ) -> tuple[list[Tensor], Tensor]:
        """Compute all hidden states of 16 kHz audio.

        Time masks, channel masks and LayerDrop are off. The caller chooses train or eval mode and whether gradients are kept.
        `config.normalize` is applied here, over valid samples.

        Args:
            wav: audio (B, S) at 16 kHz, floats of any width within [-1, 1].
            padding_mask: (B, S) bool, True for padding, which stands at the end of a row; None where nothing is padded.
            chunk_size: frames of 20 ms in a chunk. No frame then sees beyond the end of its chunk, and the states are those of a
                stream (`StreamingModel`). None for the whole utterance at once.
            left_chunks: how many chunks before its own a frame attends to; -1 for all.

        Returns:
            L + 1 states (B, T, D) at 20 ms per frame, zero on padding, and the padding of frames (B, T) bool. State 0 enters block 1;
                state i leaves block i.

        Raises:
            UserError: audio or mask have another shape or dtype, the audio is shorter than one frame or not finite, or the model cannot
                run in these chunks.
        """
        check_audio(wav, padding_mask)
        check_samples(wav, padding_mask)
        chunks = self.chunks(chunk_size, left_chunks)
        if self.config.normalize:
            wav = normalize_waveform(wav, padding_mask, self.config.normalize_eps)
        if chunks is None or torch.is_grad_enabled():
            features, frames = self._extract(wav, padding_mask)
            x = self.project(features)
        else:
            x, frames = self._in_chunks(wav, padding_mask, chunks)
        states = self.encoder.hidden_states(self.dropout_input(x), frames, chunks)
        if frames is None:
            frames = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return states, frames

    # -- pre-training ------------------------------------------------------------------------------------------------

    def set_num_updates(self, num_updates: int) -> None:
        """Tell the model how many updates have been made: the masks of the next one depend on it.

        Args:
            num_updates: the number of updates.
        """
        self.num_updates = num_updates
        self.encoder.set_num_updates(num_updates)

    def draw_chunks(self) -> tuple[int | None, int]:
        """Choose the chunks of the next batch from the config's `chunk_sizes` and `left_chunks`.

        Returns:
            `chunk_size` and `left_chunks`, drawn by seed and update in training; the first of each list in evaluation.
        """
        sizes, lefts = (read_numbers(key, getattr(self.config, key)) for key in ("chunk_sizes", "left_chunks"))
        if not sizes:
            return None, -1
        generator = np.random.default_rng((self.config.seed, self.num_updates + 1, 2))
        size, left = (numbers[int(generator.integers(len(numbers)))] if self.training else numbers[0] for numbers in (sizes, lefts))
        return size or None, left

    def forward(
        self,
        source: Tensor,
        target_list: Sequence[Tensor] | None = None,
        padding_mask: Tensor | None = None,
        mask: bool = True,
        features_only: bool = False,
        output_layer: int | None = None,
        sample_ids: Tensor | None = None,
        masks: Masks | None = None,
        return_states: bool = False,
        chunks: tuple[int | None, int] | None = None,
        spectrum: Tensor | None = None,
    ) -> HubertOutput:
        """Predict the labels of masked frames (Hsu et al. 2021, section II-B), in chunks if the config says so (`draw_chunks`).

        Args:
            source: audio (B, S) at 16 kHz, normalized already if the config says so.
            target_list: labels (B, T') of each codebook, at `config.label_rate` per second; None to compute outputs only.
            padding_mask: (B, S) bool, True for padding; None where nothing is padded.
            mask: mask spans of frames.
            features_only: leave out the head.
            output_layer: take the output of this block (1 ... L, or 0 for what enters block 1); None for the last.
            sample_ids: (B,) numbers that, with the seed and the update, decide each row's mask; None for the row's index.
            masks: the masks of another model's output, to hide the same frames; None to draw them.
            return_states: also return all hidden states; LayerDrop is then off.
            chunks: `chunk_size` and `left_chunks` of another model's output, to see the same frames; None to draw them.
            spectrum: (B, M, 80) bool, the parts of its spectrogram that a log-mel front masks.

        Returns:
            Outputs (B, T, D), masks, and with labels the logits (N, C) and labels (N,) of masked and unmasked frames per codebook.

        Raises:
            UserError: the audio is too short, or labels are given to a model without codebooks.
        """
        features, frames = self._extract(source, padding_mask, spectrum)
        if target_list is not None:
            features, frames, target_list = self._align(features, frames, target_list)
        features_pen = features.float().square().mean()
        x = self.dropout_input(self.project(features))
        projected = x
        if masks is None:
            masks = self._draw_masks(x, frames, sample_ids) if mask else (None, None)
        masked, channels = masks
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_emb.to(x.dtype), x)
        if channels is not None:
            x = x.masked_fill(channels.unsqueeze(1), 0.0)
        drawn = self.draw_chunks() if chunks is None else chunks
        running = self.chunks(*drawn)
        states = self.encoder.hidden_states(x, frames, running) if return_states else None
        if states is None:
            x = self.encoder(x, frames, layer=output_layer, chunks=running)
        else:
            x = states[-1 if output_layer is None else output_layer]
        output = HubertOutput(x, frames, masked, masks, drawn, projected, features_pen, states=states)
        if not self.training:
            output.features_square = features.float().square().mean(-1)
        if features_only or target_list is None:
            return output
        if not self.num_classes:
            raise UserError("this model has no codebooks: build it with num_classes to pre-train it")
        if masked is None:
            masked = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        valid = torch.ones_like(masked) if frames is None else ~frames
        if not self.config.skip_masked:
            output.logits_m, output.targets_m = self._classify(x, valid & masked, target_list)
        if not self.config.skip_nomask:
            output.logits_u, output.targets_u = self._classify(x, valid & ~masked, target_list)
        return output

    def _classify(self, x: Tensor, chosen: Tensor, targets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (N, C) and labels (N,) of the chosen frames (B, T) bool, per codebook."""
        return self.logits(x[chosen]), [labels[chosen].long() for labels in targets]

    def logits(self, x: Tensor) -> list[Tensor]:
        """Compare encoder outputs with all codewords: cosine similarity over temperature (Hsu et al. 2021, equation 3).

        Args:
            x: encoder outputs (N, D).

        Returns:
            Logits (N, C) of each codebook.
        """
        projected = self.final_proj(x)
        if self.config.untie_final_proj:
            parts = projected.chunk(len(self.num_classes), dim=-1)
        else:
            parts = (projected,) * len(self.num_classes)
        logits = []
        for part, codewords in zip(parts, torch.split(self.label_embs_concat, list(self.num_classes)), strict=True):
            if self.target_glu is not None:
                codewords = self.target_glu(codewords)
            with torch.autocast(part.device.type, enabled=False):  # autocast would multiply in half precision
                cosine = linear(F.normalize(part.float(), dim=-1), F.normalize(codewords.float(), dim=-1))
            logits.append(cosine / self.config.logit_temp)
        return logits

    def _align(self, features: Tensor, frames: Tensor | None, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Cut features (B, T, C) and labels to their common length; pick the label of each frame, (B, T)."""
        ratio = int(self.config.label_rate * FRAME_STRIDE) // SAMPLE_RATE
        length = min(features.size(1), *(-(-t.size(1) // ratio) for t in targets))
        cut = [t[:, : length * ratio : ratio] for t in targets]
        return features[:, :length], None if frames is None else frames[:, :length], cut

    def _draw_masks(self, x: Tensor, frames: Tensor | None, sample_ids: Tensor | None) -> Masks:
        """Masks for x (B, T, D), whose padding is `frames`."""
        config, (batch, length, dim) = self.config, x.shape
        lengths = [length] * batch if frames is None else (~frames).sum(1).tolist()
        ids = range(batch) if sample_ids is None else sample_ids.tolist()
        update = self.num_updates + 1 if self.training else 0  # evaluation always uses the same masks
        masked = channels = None
        if config.mask_prob > 0:
            seeds = [(config.seed, update, i, 0) for i in ids]
            masked = batch_mask(
                lengths, length, seeds, config.mask_prob, config.mask_length, config.mask_selection, config.mask_other, 2
            ).to(x.device)
        if config.mask_channel_prob > 0:
            seeds = [(config.seed, update, i, 1) for i in ids]
            channels = batch_mask(
                [dim] * batch, dim, seeds, config.mask_channel_prob, config.mask_channel_length,
                config.mask_channel_selection, config.mask_channel_other,
            ).to(x.device)  # fmt: skip
        return masked, channels


def normalize_waveform(wav: Tensor, padding_mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalize each row (B, S) to zero mean and unit variance (plus `eps`) over its valid samples; padding becomes 0."""
    if padding_mask is None and is_symbolic():  # lengths are not constants there
        padding_mask = torch.zeros_like(wav, dtype=torch.bool)
    if padding_mask is None:
        return F.layer_norm(wav, wav.shape[-1:], eps=eps)
    samples = wide(wav)
    valid = (~padding_mask).to(samples.dtype)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    samples = samples.masked_fill(padding_mask, 0.0)  # removes any values there, even NaN
    mean = samples.sum(1, keepdim=True) / count
    centered = (samples - mean) * valid
    variance = centered.square().sum(1, keepdim=True) / count
    return (centered * torch.rsqrt(variance + eps)).to(wav.dtype)


def build(preset: str, num_classes: Sequence[int] = (), **overrides: Any) -> HubertModel:
    """Build the model of a preset with random weights, in train mode.

    Args:
        preset: one of `list_presets()`; `PRESET+w1a1` (or +w1a2, +w1a4, +w1a8) is its binarized form.
        num_classes: the size of each codebook for pre-training; empty for a model without a head.
        **overrides: keys of the configuration that replace those of the preset.

    Returns:
        The model, on the CPU, initialized from torch's global random state.

    Raises:
        UserError: the preset or a key is unknown, or a value is not allowed.
    """
    return HubertModel(preset_config(preset, **overrides), num_classes)
