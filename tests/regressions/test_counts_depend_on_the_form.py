"""Counted figures differed between dtypes, lengths and threads, and long audio could not be counted at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.layers import attention, zipformer_attention
from hubert_eff.profiling import Counts, count_operations
from hubert_eff.profiling.cost import noise
from hubert_eff.profiling.formulas import ATTENTION
from hubert_eff.profiling.precision import at_precision, shipped
from hubert_eff.utils.evaluating import evaluating

SECONDS = 2.77  # 138 frames: a number that neither blocks, nor rates, nor strides divide


def figures(counts: Counts) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """(MACs, element operations) by module and by kind."""
    by_module, by_kind = (
        {name: (t.macs, t.element_ops) for name, t in found.items() if t.macs or t.element_ops}
        for found in (counts.by_module(), counts.by_kind())
    )
    return by_module, by_kind


def run(model: torch.nn.Module, autocast: bool = False) -> Counts:
    """Counts of a real pass."""
    with evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast), count_operations(model) as counts:
        model.hidden_states(noise(model, SECONDS))
    return counts


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long audio without long audio: attention works in blocks, and Zipformer's weights are computed anew for each use."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(zipformer_attention, "KEPT", 2000)


PRESETS = [(preset, {}) for preset in hubert_eff.list_presets() if preset.endswith("-debug")]
OTHERS = [("conformer-debug", {"extractor_mode": "default"}), ("sparseformer-debug", {"sparse_pattern": "local", "sparse_window": 9})]


@pytest.mark.parametrize("preset, keys", PRESETS + OTHERS)
def test_counts_are_the_same_in_every_dtype_and_without_values(preset: str, keys: dict[str, object]) -> None:
    model = hubert_eff.build(preset, **keys)
    profile = hubert_eff.profile(model, seconds=SECONDS)
    exact = figures(run(model))
    by_module = {m.name: (m.macs, m.element_ops) for m in profile.modules.walk() if m.macs or m.element_ops}
    assert (by_module, {k: (t.macs, t.element_ops) for k, t in profile.kinds.items() if t.macs or t.element_ops}) == exact
    assert figures(run(model, autocast=True)) == figures(run(model.bfloat16())) == figures(run(model.half())) == exact


@pytest.mark.parametrize("preset", ["conformer-debug", "zipformer-debug"])
def test_one_bit_models_cost_the_same_packed(preset: str) -> None:
    simulated = hubert_eff.build(f"{preset}+w1a1")
    packed = shipped(simulated)
    found = [hubert_eff.profile(model, seconds=SECONDS) for model in (simulated, packed, at_precision(packed, "bfloat16"))]
    assert run(packed).total().macs_by_bits == found[1].macs_by_bits == found[0].macs_by_bits
    assert found[2].macs == found[0].macs and found[2].macs_by_bits[1, 1] == found[0].macs_by_bits[1, 1]
    assert figures(run(packed))[0][""][1] == found[1].element_ops  # limits are looked for in the first pass alone


def test_rewritten_and_compiled_models_have_the_same_macs() -> None:
    model = hubert_eff.build("conformer-debug", pos_enc_type="rel_pos").eval()
    exact = hubert_eff.profile(model, seconds=SECONDS).macs
    assert hubert_eff.profile(hubert_eff.fuse(model), seconds=SECONDS).macs == exact
    assert run(hubert_eff.edge.rewrite(model)).total().macs == exact

    def opaque(graph: torch.fx.GraphModule, _: object) -> object:
        """A compiler whose kernels nobody sees into."""

        def call(*args: object) -> object:
            with torch.utils._python_dispatch._disable_current_modes():
                return graph(*args)

        return call

    for block in model.encoder.layers:
        block.compile(backend=opaque)
    with torch.no_grad():
        model.hidden_states(noise(model, SECONDS))
    assert run(model).total().macs == exact


def test_an_hour_is_counted_like_a_second() -> None:
    frames = 179_999
    whole = hubert_eff.profile("transformer-debug", seconds=3600)
    assert whole.frames == frames and whole.kinds[ATTENTION].macs == 2 * 2 * frames**2 * 64
    # the rest grows by the same for every second
    profiles = (hubert_eff.profile("transformer-debug", seconds=seconds) for seconds in (1, 2, 3600))
    one, two, hour = (profile.macs - profile.kinds[ATTENTION].macs for profile in profiles)
    assert hour == one + 3599 * (two - one)


def test_a_model_that_must_be_run_is_counted_up_to_a_minute() -> None:
    model = hubert_eff.fuse(hubert_eff.build("transformer-debug"))
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear  # the one that torch's quantization looks for
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert hubert_eff.profile(model, seconds=1.0).macs_by_bits[8, 8] > 0
    with pytest.raises(UserError, match="seconds=3600 cannot be profiled: this model must be run to be counted, at most 60 s"):
        hubert_eff.profile(model, seconds=3600)
    assert all(not p.is_meta for p in model.parameters())
