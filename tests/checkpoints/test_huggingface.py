"""Folders of Hugging Face: every hidden state is theirs; what cannot be held is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hubert_eff

from ..helpers.foreign import KINDS, apart, audio, theirs

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "name, kind", [*(("HubertModel", kind) for kind in KINDS), *(("Wav2Vec2Model", kind) for kind in ("base", "large"))]
)
def test_hidden_states_are_theirs(tmp_path: Path, name: str, kind: str) -> None:
    model = theirs(name, kind)
    model.save_pretrained(tmp_path)
    ours, (wav, padding) = hubert_eff.load(tmp_path), audio()
    assert not ours.training and not ours.heads
    with torch.no_grad():
        for mask in (None, padding):
            expected = model(wav, attention_mask=None if mask is None else (~mask).long(), output_hidden_states=True).hidden_states
            states, frames = ours.hidden_states(wav, mask)
            assert apart(states, frames, expected) < 1e-5
