"""`HubertConfig`: every key of a model, flat, under fairseq's names where fairseq has one.

An encoder derives its own dataclass from it and adds its keys. That dataclass is the only place where a key, its default and its
help stand: the fairseq dataclass of `hubert_<encoder>` is derived from it.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import UserError, short, unknown

SAMPLE_RATE = 16_000
FRAME_STRIDE = 320  # samples per frame: 20 ms at 16 kHz
RECEPTIVE_FIELD = 400  # samples that one frame of the named extractors depends on: 25 ms
LOUDEST = 2.0**31  # float samples may hold integers of 32 bits; larger values are not audio, and their squares overflow in sums

# (channels, kernel, stride) of each convolution of the waveform extractor
CONV_FEATURE_LAYERS: dict[str, tuple[tuple[int, int, int], ...]] = {
    # wav2vec 2.0 / HuBERT
    "default": ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2),
    # the compact extractor of SEW, "FastConv" in the main paper
    "fastconv": (
        (64, 10, 5),
        *((128, 3, 2), (128, 1, 1)) * 2,
        *((256, 3, 2), (256, 1, 1)) * 2,
        *((512, 2, 2), (512, 1, 1)) * 2,
    ),
}

MEL_FRONTS = ("logmel-conv", "logmel-dws", "conv-embed")  # on a log-mel spectrogram (logmel.py)

# limits of absurd values, which are refused before anything is built from them
LARGEST = 2**32 - 1  # of whole numbers
LONGEST = 1 << 16  # characters of a text value; a policy is the longest
MOST_LAYERS = 100
WIDEST = 1 << 16  # channels, kernel and stride of a convolution of the extractor

_TYPES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}

Config = TypeVar("Config", bound="HubertConfig")


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option accepts. As text they read, in help and errors, like "at least 0 and below 1"."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds; NaN never is."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and not (self.odd and value % 2 == 0)
        )

    def __str__(self) -> str:
        odd = "odd, " if self.odd else ""
        if self.least is not None and self.most is not None:
            return f"{odd}{self.least:.12g} to {self.most:.12g}"
        named = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return odd + " and ".join(f"{word} {value:.12g}" for word, value in named.items() if value is not None)


PROBABILITY = Bounds(least=0, most=1)
POSITIVE = Bounds(above=0)
NOT_NEGATIVE = Bounds(least=0)
COUNT = Bounds(least=1)
ODD = Bounds(least=1, odd=True)


def option(default: Any, text: str, choices: tuple[str, ...] = (), bounds: Bounds | None = None, longest: int = LONGEST) -> Any:
    """A dataclass field with its help; `check_options` checks the choices of a word, the bounds of a number, the length of a text."""
    said = str(bounds) if bounds else " | ".join(choices)
    known = {"choices": choices, "bounds": bounds, "longest": longest}
    return field(default=default, metadata={"help": f"{text} ({said})" if said else text, **known})


@dataclass
class HubertConfig:
    """Keys shared by all encoders. Sizes are in channels or frames of 20 ms, probabilities in [0, 1]."""

    label_rate: float = option(50.0, "labels per second of every target; a multiple of the frame rate 50", bounds=POSITIVE)
    normalize: bool = option(False, "scale each waveform to zero mean and unit variance over its valid samples")
    normalize_eps: float = option(1e-5, "value added to that variance: 1e-5 as in fairseq, or 1e-7 as in transformers", bounds=POSITIVE)
    seed: int = option(1, "seed of the masks, together with the update number and the utterance", bounds=NOT_NEGATIVE)

    # waveform extractor
    extractor_mode: str = option(
        "default",
        "normalization: GroupNorm over time on the first convolution, or LayerNorm over channels on every one",
        ("default", "layer_norm"),
    )
    conv_feature_layers: str = option(
        "fastconv",
        "default | fastconv | fairseq's list [(channels, kernel, stride)] * n + ...; or, on a log-mel spectrogram, where extractor_mode "
        "and conv_bias do nothing: " + " | ".join(MEL_FRONTS),
    )
    conv_embed: str = option(
        "paper", "conv-embed as in Zipformer's paper (10 bins at its end) or as in its authors' code (19 bins and a BiasNorm)",
        ("paper", "authors"),
    )  # fmt: skip
    conv_bias: bool = option(False, "bias in the extractor's convolutions")
    feature_norm: bool = option(True, "LayerNorm on the extractor's output, before it is projected; DistilHuBERT has none")
    feature_grad_mult: float = option(1.0, "factor on the gradient that reaches the extractor; 0 freezes it", bounds=NOT_NEGATIVE)
    valid_frames: str = option(
        "receptive_field",
        "when a frame is valid: its whole receptive field is audio, or, by fairseq's rule, any sample of its slot is",
        ("receptive_field", "fairseq"),
    )

    # running in chunks (layers/chunks.py)
    streaming: bool = option(
        False,
        "build a model for audio that comes in pieces: extractor_mode is layer_norm, and no convolution sees beyond the chunk of its frame",
    )
    conv_context: str = option(
        "chunk", "what convolutions over time see in a streaming model: both sides up to the end of the chunk, or only the past",
        ("chunk", "causal"),
    )  # fmt: skip
    chunk_sizes: str = option(
        "", "frames of a chunk in training, drawn for each batch from a list such as '8,16,32,0'; 0 is the whole utterance"
    )
    left_chunks: str = option("-1", "chunks before its own that a frame attends to in training, drawn from a list such as '4,-1'; -1: all")

    # encoder
    encoder_layers: int = option(12, "number of blocks", bounds=Bounds(1, MOST_LAYERS))
    encoder_embed_dim: int = option(768, "model dimension D", bounds=COUNT)
    encoder_ffn_embed_dim: int = option(3072, "inner dimension of the feed-forward modules", bounds=COUNT)
    encoder_attention_heads: int = option(12, "number of attention heads", bounds=COUNT)
    layer_norm_first: bool = option(False, "LayerNorm after the last block instead of before the first (pre-LN Transformer)")
    conv_pos: int = option(128, "kernel of the convolutional positional embedding, in frames", bounds=COUNT)
    conv_pos_groups: int = option(16, "groups of the convolutional positional embedding", bounds=COUNT)
    required_seq_len_multiple: int = option(
        2, "number of frames to a multiple of which sequences are padded inside the encoder", bounds=Bounds(1, 1000)
    )
    checkpoint_activations: bool = option(False, "recompute each block in the backward pass to save memory")
    compile_blocks: bool = option(
        False, "compile the blocks in training with torch.compile, once per shape of the batch: for GPUs, with task.length_buckets"
    )
    identity_attention_updates: int = option(
        0,
        "updates at the start of training in which every frame attends to itself alone, which keeps the encoder from reversing time",
        bounds=NOT_NEGATIVE,
    )

    # dropout
    dropout: float = option(0.1, "dropout on the output of every module", bounds=PROBABILITY)
    attention_dropout: float = option(0.1, "dropout on attention probabilities", bounds=PROBABILITY)
    activation_dropout: float = option(0.0, "dropout after the activation of the feed-forward modules", bounds=PROBABILITY)
    encoder_layerdrop: float = option(0.0, "probability of skipping a block in training", bounds=PROBABILITY)
    dropout_input: float = option(0.0, "dropout on the projected features before masking", bounds=PROBABILITY)

    # codebook head
    final_dim: int = option(0, "dimension of the codebook space; 0 is encoder_embed_dim", bounds=NOT_NEGATIVE)
    untie_final_proj: bool = option(False, "use one projection per codebook")
    logit_temp: float = option(0.1, "temperature that divides the cosine similarities", bounds=POSITIVE)
    target_glu: bool = option(False, "apply a linear layer and a GLU to the codewords")
    skip_masked: bool = option(False, "compute no loss on masked frames")
    skip_nomask: bool = option(False, "compute no loss on unmasked frames")

    # masks over time
    mask_prob: float = option(0.65, "share of masked frames before overlaps: spans = mask_prob * T / mask_length", bounds=PROBABILITY)
    mask_length: int = option(10, "length of a masked span, in frames", bounds=COUNT)
    mask_selection: str = option("static", "distribution of span lengths", ("static", "uniform", "normal", "poisson"))
    mask_other: float = option(0.0, "second parameter of that distribution: lower bound (uniform), deviation (normal)", bounds=NOT_NEGATIVE)
    # masks over channels
    mask_channel_prob: float = option(0.0, "share of masked channels before overlaps; 0 masks none", bounds=PROBABILITY)
    mask_channel_length: int = option(10, "length of a masked span of channels", bounds=COUNT)
    mask_channel_selection: str = option(
        "static", "distribution of lengths of spans of channels", ("static", "uniform", "normal", "poisson")
    )
    mask_channel_other: float = option(0.0, "second parameter of that distribution, as of mask_other", bounds=NOT_NEGATIVE)

    # quantization
    quant: str = option(
        "none", "precision: none is float; w1aN is one-bit weights with activations of N bits", ("none", "w1a1", "w1a2", "w1a4", "w1a8")
    )
    quant_policy: str = option("default", "what is binarized: default | paper | a YAML file, or its content as {...}")

    def __post_init__(self) -> None:
        check_options(self)
        if self.streaming:
            self.extractor_mode = "layer_norm"
        self.validate()
        if self.quant != "none":
            from .quant.policy import read_policy

            self.quant_policy = read_policy(self.quant_policy).text  # the content of the file, which is saved with the model

    def validate(self) -> None:
        """Raise `UserError` for a value that cannot be built or trained. Encoders extend it."""
        for axis in ("mask", "mask_channel"):
            other, span = getattr(self, f"{axis}_other"), getattr(self, f"{axis}_length")
            if getattr(self, f"{axis}_selection") == "uniform" and other > 2 * span:
                raise UserError(f"{axis}_other={other} must be in [0, 2 * {axis}_length = {2 * span}]: the shortest uniform span")
        for name, width, dim in (
            ("encoder_attention_heads", "encoder_embed_dim", self.encoder_embed_dim),
            ("conv_pos_groups", "the encoder's input width", self.input_dim),
        ):
            if dim % getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} does not divide {width}={dim}: change one of the two")
        self._check_streaming()
        if self.identity_attention_updates and self.quant != "none":
            raise UserError(
                f"identity_attention_updates={self.identity_attention_updates} must be 0 for a binarized model (quant={self.quant})"
            )
        if self.compile_blocks and self.quant != "none":
            raise UserError(f"compile_blocks=true: the blocks of a binarized model (quant={self.quant}) are not compiled; set it to false")
        if self.mask_channel_prob > 0 and self.mask_channel_prob * self.input_dim / self.mask_channel_length < 1:
            raise UserError(
                f"mask_channel_prob={self.mask_channel_prob} asks for less than one span of mask_channel_length="
                f"{self.mask_channel_length} in {self.input_dim} channels: raise it to "
                f"{self.mask_channel_length / self.input_dim:.3g} or shorten the span"
            )
        if self.label_rate * FRAME_STRIDE % SAMPLE_RATE:
            raise UserError(f"label_rate={self.label_rate} is not a multiple of the frame rate {SAMPLE_RATE // FRAME_STRIDE} Hz")
        if self.conv_embed != "paper" and self.conv_feature_layers != "conv-embed":
            raise UserError(
                f"conv_embed={self.conv_embed} does nothing with conv_feature_layers={short(repr(self.conv_feature_layers))}: set "
                "conv_feature_layers=conv-embed, or leave conv_embed=paper"
            )
        stride = math.prod(s for _, _, s in self.conv_layers)
        if stride != FRAME_STRIDE:
            raise UserError(
                f"conv_feature_layers={self.conv_feature_layers!r} has a total stride of {stride} samples: it must be "
                f"{FRAME_STRIDE} (20 ms)"
            )

    def _check_streaming(self) -> None:
        for key, least in (("chunk_sizes", 0), ("left_chunks", -1)):
            numbers = read_numbers(key, getattr(self, key))
            if numbers and min(numbers) < least or (key == "left_chunks" and not numbers):
                raise UserError(f"{key}={getattr(self, key)!r} must be whole numbers, at least {least}, joined by commas")
        if not self.streaming:
            if self.chunk_sizes:
                raise UserError(f"chunk_sizes={self.chunk_sizes!r} needs streaming=true; otherwise frames see beyond their chunk")
            return
        if self.normalize:
            raise UserError("streaming=true: normalize=true needs the whole utterance, which a stream does not have; set normalize=false")

    @property
    def causal(self) -> bool:
        """Whether convolutions over time see nothing after their frame."""
        return self.streaming and self.conv_context == "causal"

    @property
    def conv_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, kernel, stride) of each convolution of the extractor."""
        if self.conv_feature_layers in MEL_FRONTS:  # one step of the same grid; the front reads more on either side (LogMelExtractor.reach)
            return ((self.input_dim, RECEPTIVE_FIELD, FRAME_STRIDE),)
        return parse_conv_layers(self.conv_feature_layers)

    @property
    def input_dim(self) -> int:
        """Width of the projected features that enter the encoder: D, unless its first block is narrower."""
        return self.encoder_embed_dim

    @property
    def codebook_dim(self) -> int:
        """Dimension of the codebook space."""
        return self.final_dim if self.final_dim > 0 else self.encoder_embed_dim

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build from a mapping. Raises `UserError` for an unknown key, with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown(f"key of {cls.__name__}", key, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All keys as plain values."""
        return dataclasses.asdict(self)


def check_options(config: Any) -> None:
    """Check a dataclass of `option`s.

    Raises `UserError` where a value is not of its key's type, is not finite or absurdly large, or is not what the key allows.
    """
    kinds = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        key, kind = entry.name, kinds[entry.name]
        if kind not in _TYPES:
            continue  # an encoder's own kind of key, which its validate() checks
        value, accepted = getattr(config, key), (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is float and not -LARGEST <= value <= LARGEST):
            raise UserError(f"{key}={short(repr(value))} must be {_TYPES[kind]}")
        if kind is int and abs(value) > LARGEST:
            raise UserError(f"{key}={short(hex(value))} is too large: at most {LARGEST}")
        if kind is str and len(value) > (longest := entry.metadata.get("longest", LONGEST)):
            raise UserError(f"{key} has {len(value)} characters: at most {longest}")
        choices, bounds = entry.metadata.get("choices"), entry.metadata.get("bounds")
        if choices and value not in choices:
            raise unknown(f"value of {key}", value, choices)
        if bounds and not bounds.holds(value):
            raise UserError(f"{key}={value} must be {bounds}")


def read_numbers(key: str, text: str) -> tuple[int, ...]:
    """Read whole numbers joined by commas; an empty text gives none. Raises `UserError` for other texts."""
    try:
        numbers = tuple(int(part) for part in text.split(",")) if text.strip() else ()
        if len(numbers) > MOST_LAYERS or any(abs(number) > LARGEST for number in numbers):
            raise ValueError(text)
    except ValueError as error:
        raise UserError(f"{key}={short(repr(text))} must be whole numbers joined by commas") from error
    return numbers


def parse_conv_layers(spec: str) -> tuple[tuple[int, int, int], ...]:
    """Read `conv_feature_layers`: a name, or lists of integer triples joined by `+` and repeated by `*`. Never evaluated."""
    if spec in CONV_FEATURE_LAYERS:
        return CONV_FEATURE_LAYERS[spec]
    names = ", ".join([*CONV_FEATURE_LAYERS, *MEL_FRONTS])
    hint = f"write {names}, or a list such as [(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"

    if len(spec) > 2000:
        raise UserError(f"conv_feature_layers has {len(spec)} characters, more than any list of layers needs: {hint}")

    def read(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Tuple):
            return tuple(read(e) for e in node.elts)
        if isinstance(node, ast.List):
            return [read(e) for e in node.elts]
        if isinstance(node, ast.BinOp):
            left, right = read(node.left), read(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int) and 0 < right * len(left) <= 64:
                return left * right
        raise ValueError(ast.dump(node))

    try:
        layers = read(ast.parse(spec.strip(), mode="eval").body)
        if not layers or not isinstance(layers, list) or any(len(t) != 3 or not 1 <= min(t) <= max(t) <= WIDEST for t in layers):
            raise ValueError(spec)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:  # nested brackets raise the last two
        raise UserError(f"conv_feature_layers={short(repr(spec))} cannot be read: {hint}") from error
    return tuple((c, k, s) for c, k, s in layers)
