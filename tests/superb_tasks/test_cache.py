"""Hidden states kept on disk: the same features, computed once, and never those of another model."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile as sf
import torch

from hubert_eff.errors import UserError
from superb_tasks.running.cache import CachedUpstream, check_space, estimate
from superb_tasks.upstream.expert import UpstreamExpert

LENGTHS = (16000, 12345, 400, 31999)


@pytest.fixture(scope="module")
def expert() -> UpstreamExpert:
    return UpstreamExpert("conformer-debug").eval()


@pytest.fixture(scope="module")
def wavs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in LENGTHS]


def test_features_are_those_of_the_upstream_to_half_precision(expert, wavs, tmp_path):
    cached = CachedUpstream(expert, tmp_path, limit=10**9)
    with torch.no_grad():
        expected = expert(wavs)["hidden_states"]
    for _ in range(2):  # computed, then read
        found = cached(wavs)
        for ours, theirs in zip(found["hidden_states"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert torch.equal(found["last_hidden_state"], found["hidden_states"][-1])
    assert len(list(tmp_path.rglob("*.npy"))) == len(LENGTHS)


def test_a_recording_is_computed_once(expert, wavs, tmp_path, monkeypatch):
    first = CachedUpstream(expert, tmp_path, limit=10**9)(wavs)["hidden_states"]
    again = CachedUpstream(expert, tmp_path, limit=10**9)
    monkeypatch.setattr(expert, "forward", lambda wavs: pytest.fail("computed again"))
    for state, other in zip(again(wavs[::-1])["hidden_states"], first):
        assert torch.equal(state.flip(0), other)


def test_nothing_is_written_beyond_the_limit(expert, wavs, tmp_path):
    cached = CachedUpstream(expert, tmp_path, limit=1)
    cached(wavs[:1])
    cached(wavs)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    full = CachedUpstream(expert, tmp_path, limit=1)
    full(wavs)
    assert len(list(tmp_path.rglob("*.npy"))) == 1


def test_states_too_large_for_half_precision_are_not_kept(expert, wavs, tmp_path, monkeypatch):
    forward = expert.forward
    monkeypatch.setattr(expert, "forward", lambda wavs: {"hidden_states": [1e6 * state for state in forward(wavs)["hidden_states"]]})
    states = CachedUpstream(expert, tmp_path, limit=10**9)(wavs[:1])["hidden_states"]
    assert all(torch.isfinite(state).all() for state in states) and max(state.abs().max() for state in states) > 65504
    assert not list(tmp_path.rglob("*.npy"))


def test_the_size_is_known_before(expert, wavs, tmp_path):
    for index, wav in enumerate(wavs):
        sf.write(tmp_path / f"{index}.wav", wav.numpy(), 16000)
    hours, size = estimate([tmp_path], states=3, width=64)
    assert hours == pytest.approx(sum(LENGTHS) / 16000 / 3600)
    CachedUpstream(expert, tmp_path / "states", limit=10**9)(wavs)
    written = sum(np.load(file).nbytes for file in (tmp_path / "states").rglob("*.npy"))
    assert size == pytest.approx(written, rel=0.1)
    check_space(tmp_path / "absent" / "folder", size)
    with pytest.raises(UserError, match="GB are needed"):
        check_space(tmp_path / "absent", 10**18)
