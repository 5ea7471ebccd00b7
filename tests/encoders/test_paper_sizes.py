"""The table of docs/encoders.md that sets sizes and FLOP beside the papers'."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import hubert_eff
from hubert_eff.config import SAMPLE_RATE
from hubert_eff.encoders.registry import preset_config
from hubert_eff.models.logmel import ConvEmbed, Subsampling
from hubert_eff.profiling.counters import count_operations
from hubert_eff.recognition.model import build_recognizer

from ..helpers.paths import ROOT

PAGE = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Sizes and FLOP beside the papers'") :]
ROWS = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) \| ([\d.]*) \|$", SECTION, re.MULTILINE)
AUTHORS = {"conv_feature_layers": "conv-embed", "conv_embed": "authors", "feature_norm": False}
SECONDS, UNITS, JOINED = 30, 500, 512  # of Zipformer's table: audio, symbols, width of the transducer's decoder and joiner
NO_NLA = {"zipformer_nonlinear_attention": False}
# row -> preset and keys; with a CTC layer, or a transducer's decoder and joiner
ZIPFORMER: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Zipformer-S, CTC": ("zipformer-s", {}, False),
    "Zipformer-M, CTC": ("zipformer-m", {}, False),
    "Zipformer-L, CTC": ("zipformer-l", {}, False),
    "Zipformer-M, no nonlinear attention": ("zipformer-m", NO_NLA, True),
    "Zipformer-M, nor shared weights": ("zipformer-m", {**NO_NLA, "zipformer_share_weights": False}, True),
    "Zipformer-M, no bypass": ("zipformer-m", {"zipformer_bypass": False}, True),
    "Zipformer-M, two Conformer blocks for each": ("zipformer-m", {"zipformer_block": "conformer"}, True),
    "Zipformer-M, no temporal downsampling": ("zipformer-m-flat", {}, True),
}
CTC_AT_40_MS = {
    **{f"Conformer-CTC-{size.upper()}": f"conformer-{size}" for size in ("s", "m", "l")},
    **{f"Squeezeformer-{size.upper()}": f"squeezeformer-{size}" for size in ("xs", "s", "sm", "m", "ml", "l")},
}
FUSIONFORMER = {"FusionFormer, 12 blocks of 256": "fusionformer-12+3+3", "FusionFormer, 16 blocks of 384": "fusionformer-16+3+3"}
CHARACTERS = 4_233  # blank and end among them


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def without_positions(encoder: nn.Module) -> int:
    return size(encoder) - size(encoder.get_submodule("pos_conv"))


def transducer(dim: int) -> int:
    """Parameters of the authors' pruned transducer behind an encoder: decoder (embedding, convolution), joiner, two simple layers."""
    decoder = UNITS * JOINED + 4 * 2 * JOINED
    joiner = (dim + 1) * JOINED + (JOINED + 1) * JOINED + (JOINED + 1) * UNITS
    return decoder + joiner + (dim + 1) * UNITS + (JOINED + 1) * UNITS


def parameters(row: str) -> int:
    with torch.device("meta"):
        if row in ZIPFORMER:
            preset, keys, transduces = ZIPFORMER[row]
            model = hubert_eff.build(preset, **AUTHORS, **keys)
            dim = model.config.encoder_embed_dim
            head = transducer(dim) if transduces else (dim + 1) * UNITS
            return without_positions(model.encoder) + size(ConvEmbed(model.config.input_dim, authors=True)) + head
        if row in CTC_AT_40_MS:
            preset = CTC_AT_40_MS[row]
            encoder, dim = hubert_eff.build(preset).encoder, preset_config(preset).encoder_embed_dim
            front = Subsampling(dim, separable=preset.startswith("squeezeformer"), rates=(2, 2))
            return without_positions(encoder) + size(front) + (dim + 1) * 128
        letters = "".join(chr(0x4E00 + i) for i in range(CHARACTERS - 2))
        model = build_recognizer(FUSIONFORMER[row], letters, conv_feature_layers="logmel-conv", feature_norm=False)
        return size(model) - size(model.hubert.encoder.pos_conv) - size(model.hubert.final_proj) - model.hubert.mask_emb.numel()


@torch.no_grad()
def gflop(row: str) -> float:
    """Twice the multiply-accumulates of front and encoder; heads are not counted."""
    if row in ZIPFORMER:
        model = hubert_eff.build(ZIPFORMER[row][0], **AUTHORS).eval()
        with count_operations(model) as counts:
            model.hidden_states(torch.zeros(1, SECONDS * SAMPLE_RATE))
        return 2e-9 * (counts.total().macs - counts.total("encoder.pos_conv").macs - counts.total("feature_extractor.mel").macs)
    preset = CTC_AT_40_MS[row]
    encoder = hubert_eff.build(preset).eval().encoder
    front = Subsampling(preset_config(preset).encoder_embed_dim, separable=preset.startswith("squeezeformer"), rates=(2, 2))
    with count_operations(front) as before:
        x = front(torch.zeros(1, 100 * SECONDS + 3, 80))
    with count_operations(encoder) as counts:
        encoder(x)
    return 2e-9 * (before.total().macs + counts.total().macs - counts.total("pos_conv").macs)


def papers_gflop(row: str) -> float:
    """As Squeezeformer's table counts: positional tables of T rows instead of 2 T - 1, no layers that halve and restore the rate."""
    config: Any = preset_config(CTC_AT_40_MS[row])
    dim, frames, squeezed = config.encoder_embed_dim, 25 * SECONDS, row.startswith("Squeeze")

    def block(t: int) -> int:
        feed_forward, convolution = 16 * dim * dim, (4 * dim + 62) * dim if squeezed else (3 * dim + 31) * dim
        attention = 4 * dim * dim + dim * dim + 3 * t * dim  # the position's projection and product have T rows, too
        return t * (feed_forward + convolution + attention)

    second = 9 * dim + dim * dim if squeezed else 9 * dim * dim  # separable or not, over 20 bins
    front = 2 * frames * 40 * 9 * dim + frames * 20 * (second + dim * dim)
    if not squeezed:
        return 2e-9 * (front + (config.encoder_layers + (row == "Conformer-CTC-L")) * block(frames))
    slow = config.time_recover_idx - config.time_reduce_idx
    return 2e-9 * (front + (config.encoder_layers - slow) * block(frames) + slow * block(frames // 2))


@pytest.mark.parametrize("row", CTC_AT_40_MS)
def test_how_squeezeformers_table_counts(row: str) -> None:
    paper = next(float(paper) for name, _, _, paper, _ in ROWS if name == row)
    if row in ("Squeezeformer-S", "Squeezeformer-M", "Squeezeformer-L"):
        assert f"{papers_gflop(row):.1f}" in SECTION and 1.105 < papers_gflop(row) / paper < 1.135
    else:
        assert round(papers_gflop(row), 1) == paper


def test_every_row_is_there() -> None:
    assert {row for row, *_ in ROWS} == {*ZIPFORMER, *CTC_AT_40_MS, *FUSIONFORMER}


@pytest.mark.parametrize(("row", "paper", "here"), [(row, float(paper), float(here)) for row, paper, here, *_ in ROWS])
def test_sizes(row: str, paper: float, here: float) -> None:
    count = parameters(row) / 1e6
    assert here == pytest.approx(count, abs=0.051)
    if row in ZIPFORMER:
        assert round(count, 1) == paper
    elif row != "Conformer-CTC-L":
        assert count == pytest.approx(paper, abs=0.75 if row in FUSIONFORMER else 0.1)


EVERYDAY = ("Zipformer-S, CTC", "Squeezeformer-XS")


@pytest.mark.parametrize(
    ("row", "paper", "here"),
    [
        pytest.param(row, float(paper), float(here), marks=() if row in EVERYDAY else pytest.mark.long)
        for row, _, _, paper, here in ROWS
        if paper
    ],
)
def test_flop(row: str, paper: float, here: float) -> None:
    count = gflop(row)
    assert here == pytest.approx(count, abs=0.051)
    assert count == pytest.approx(paper, rel=2e-3 if row in ZIPFORMER else 0.2)


def test_the_papers_fusionformers_have_twice_d_in_their_convolution_modules() -> None:
    for row, preset in FUSIONFORMER.items():
        with torch.device("meta"):
            whole, narrow = (build_recognizer(preset, "AB", conv_module_expansion=n).hubert.encoder for n in (2, 1))
        paper = next(float(paper) for name, paper, *_ in ROWS if name == row)
        assert parameters(row) / 1e6 - (size(whole) - size(narrow)) / 1e6 < paper - 1
