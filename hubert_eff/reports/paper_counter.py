"""The counter behind the paper's Table 1, inferred from its figures ("Attention or Convolution", 10 s).

The paper does not print its formulas. These were found by fitting its columns; they count some products more than once, and other models
than the stored ones in places. A cell that no formula meets stays open. `reports.table1` shows them (`hubert-eff profile --table1
--counter paper`); what the models really compute is the clean count, the default.
"""

# L layers, D model dim, F feed-forward dim, T frames

from __future__ import annotations

from dataclasses import dataclass

from ..config import SAMPLE_RATE, HubertConfig
from ..encoders.registry import preset_config
from ..models.extractor import num_frames

SECONDS = 10.0
POSITIONAL = 8  # D^2 MACs of the positional convolution per frame: 128 taps x D channels in of 16 groups x D channels out
ATTENTION_PRODUCTS = 3  # number that is counted; two are computed
TABLE1_FFN = 1024  # of a Conformer-S that meets the paper's FLOP; its stored model has 3072

SUMMARY = (
    "Fitted: formulas found from the paper's figures (T = 500 frames), not what the models compute: that is the clean counter.",
    "Counted more than once: in FLOP attention as 3 products of T x T x D, of which 2 are computed; in BOP_BQ of the transformers 18 D^2",
    "per frame and layer for 12 D^2 (as if q, k and v were projected three times); in BOP_BQ of Conformer-S the depthwise convolution",
    "(62 D for 31 D) and one product of attention (3 T D for 2 T D).",
    "Counted of other models: dense attention in the Sparseformer rows; FFN 1024 in the FLOP of Conformer-S, whose stored FFN is 3072.",
    "Open (-), as no formula meets them: FLOP, BOPs and time of both Squeeze rows, BOP_NonQ and time of Vanilla Trans.",
    "BQ rows: their float part is the clean one; the paper's GFLOP are 1% to 6% more, and not twice the MACs behind its own BOP_NonQ.",
)


@dataclass(frozen=True)
class PaperCount:
    """MACs by the paper's counter; None for open cells. `bop_macs` are those behind BOP_NonQ if they differ from those behind FLOP."""

    float_macs: int | None
    bop_macs: int | None
    binary_macs: int | None


OPEN = PaperCount(None, None, None)


def paper_count(preset: str) -> PaperCount:
    """The result of the paper's counter for a preset of Table 1 (`+w1a1`: its BQ row) on 10 s of audio.

    Source: fitted to the figures of Table 1; see `float_macs` and `binary_macs`.
    """
    name, _, quant = preset.partition("+")
    config = preset_config(name)
    family = name.partition("-")[0]
    if family == "squeezeformer":
        return OPEN
    if quant:
        fixed = outside_macs(config)
        return PaperCount(fixed, fixed, binary_macs(config, conformer=family == "conformer"))
    counted = float_macs(config, conformer=family == "conformer")
    return PaperCount(counted, None if family == "transformer" else counted, 0)


def outside_macs(config: HubertConfig) -> int:
    """MACs outside the blocks: sum of C_in C_out K over the extractor's outputs, 512 D per frame of the projection (none where D is 512),
    8 D^2 per frame of the positional convolution. The projection sees 499 frames of 10 s, the rest behind it 500.
    """
    dim, macs, width = config.encoder_embed_dim, 0, 1
    for depth, (channels, kernel, _) in enumerate(config.conv_layers, start=1):
        macs += width * channels * kernel * int(num_frames(round(SECONDS * SAMPLE_RATE), config.conv_layers[:depth]))
        width = channels
    return macs + (width * dim * _frames(config) if width != dim else 0) + POSITIONAL * dim**2 * _padded(config)


def float_macs(config: HubertConfig, conformer: bool) -> int:
    """MACs behind FLOP of a float row: `outside_macs` + L T (W + 3 T D).

    W = 12 D^2 of a transformer (four projections D x D, a feed-forward module D x 4 D twice), 7 D^2 + 4 D F + 31 D of a Conformer (four
    projections and three of the pointwise convolutions, two feed-forward modules, the depthwise convolution) with F = 1024. The third
    T D is one product of attention too many: dense Vanilla comes to 105.85 GFLOP with two and to 110.46 with three, the paper has 110.54;
    DN 25.97 (26.05), SW 40.00 (40.09), both with dense attention; Conformer-S 22.12 (22.10), where F = 3072, which its storage needs, would
    be 40.99. A profiler whose patches stay in place when it ends may count like this: it sees a function of the second model twice.
    BOP_NonQ = 32 MACs / 2^30 of the same MACs in all float rows but Vanilla's, whose 1228.64 would be 1645.99; without the four projections
    it would be 1224.12, near but not equal.
    """
    dim, frames = config.encoder_embed_dim, _padded(config)
    per_frame = 7 * dim**2 + 4 * dim * TABLE1_FFN + 31 * dim if conformer else 12 * dim**2
    return outside_macs(config) + config.encoder_layers * frames * (per_frame + ATTENTION_PRODUCTS * frames * dim)


def binary_macs(config: HubertConfig, conformer: bool) -> int:
    """MACs behind BOP_BQ of a BQ row, one bit operation each.

    Transformers: L (18 D^2 T + 2 T^2 D), which is 63.62, 19.49 and 10.70 x 2^30 for Vanilla, SW and DN, the paper's to the last digit.
    The weights are 12 D^2. With whole numbers of counts (a for each of q, k, v; b for the output; c for the two feed-forward products of
    4 D^2): 3 a + b + 8 c = 18 has c = 1 only, and 3 a + b = 10; a = 3, b = 1 is the smallest: q, k and v three times, the rest once.
    Conformer-S: L T (7 D^2 + 4 D F + 62 D + 3 T D) with the stored F = 3072, 15.94 x 2^30 as in the paper: the depthwise convolution
    twice, three products of attention for two. With half the frames in blocks 8 to 15, as Squeezeformer has, it is 11.75; the paper has
    11.86.
    """
    dim, frames = config.encoder_embed_dim, _padded(config)
    if conformer:
        per_frame = 7 * dim**2 + 4 * dim * config.encoder_ffn_embed_dim + 62 * dim + ATTENTION_PRODUCTS * frames * dim
    else:
        per_frame = 18 * dim**2 + 2 * frames * dim
    return config.encoder_layers * frames * per_frame


def _frames(config: HubertConfig) -> int:
    return int(num_frames(round(SECONDS * SAMPLE_RATE), config.conv_layers))


def _padded(config: HubertConfig) -> int:
    """Frames as the encoder pads them: 500 of 499."""
    multiple = config.required_seq_len_multiple
    return -(-_frames(config) // multiple) * multiple
