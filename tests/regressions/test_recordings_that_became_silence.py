"""`manifest`: what would be silence in training, though it is not in the recording, is left out by name or stored with enough bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_eff.data.audio import Unusable, check
from hubert_eff.data.manifest import Options, make_manifest

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0.0, 0.1, 8000)


def manifest(source: Path, out: Path, **options: object) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The samples of each utterance by its source, and the reasons of what was left out."""
    make_manifest(source, out, options=Options(valid_percent=0, **options))  # type: ignore[arg-type]
    root = Path((out / "train.tsv").read_text().split("\n", 1)[0])
    parts = [line.split("\t") for line in (out / "parts.tsv").read_text().splitlines()[1:]]
    audio = {part[3]: soundfile.read(root / part[0], dtype="float32")[0] for part in parts}
    return audio, dict(line.split("\t") for line in (out / "left_out.tsv").read_text().splitlines()[1:])


@pytest.mark.parametrize(
    ("channels", "share"),
    [
        ([NOISE, -NOISE], 100),
        ([NOISE, -0.999 * NOISE], 100),
        ([NOISE, -NOISE, NOISE, -NOISE], 100),
        ([NOISE, np.concatenate([NOISE[:4096], -NOISE[4096:]])], 50),
        ([NOISE * 1e-5, NOISE * -1e-5], 100),
    ],
)
def test_channels_that_cancel_each_other_are_left_out(channels: list[np.ndarray], share: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack(channels, 1), 16_000, subtype="FLOAT")
    for silent in (False, True):  # also where silence is allowed, as in `run`
        with pytest.raises(Unusable, match=f"channels cancel each other: in {share}% of it .*write one channel to a file of its own"):
            check(tmp_path / "a.wav", silent)


@pytest.mark.parametrize("other", [0 * NOISE, RNG.normal(0.0, 0.1, 8000), -0.8 * NOISE, 0.5 * NOISE])
def test_channels_that_do_not_are_used(other: np.ndarray, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([NOISE, other], 1), 16_000, subtype="FLOAT")
    assert check(tmp_path / "a.wav").peak == pytest.approx(np.abs(NOISE + other).max() / 2, rel=1e-6)


def test_whispers_are_stored_with_more_bits_and_what_is_below_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    stereo = np.stack([NOISE, NOISE], 1)
    for name, scale in (("loud", 1.0), ("whisper", 1e-4), ("faint", 1e-6), ("lost", 1e-9)):
        soundfile.write(source / f"{name}.wav", stereo * scale, 16_000, subtype="FLOAT")
    soundfile.write(source / "direct.wav", NOISE * 1e-6, 16_000, subtype="FLOAT")
    audio, reasons = manifest(source, tmp_path / "out")
    for name, scale, error in (("loud", 1.0, 1e-3), ("whisper", 1e-4, 1e-2), ("faint", 1e-6, 0.5), ("direct", 1e-6, 1e-6)):
        found, wanted = audio[f"{name}.wav"], NOISE * scale
        assert np.linalg.norm(found - wanted) < error * np.linalg.norm(wanted), name
    assert set(reasons) == {"lost.wav"} and reasons["lost.wav"].startswith("silent: its peak of")
    subtypes = {p.name.split("-")[0]: soundfile.info(p).subtype for p in (tmp_path / "out" / "audio").glob("*.flac")}
    assert subtypes == {"loud": "PCM_16", "whisper": "PCM_24", "faint": "PCM_24"}


def test_sound_above_what_16_khz_can_hold_and_silent_segments_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    time = np.arange(24_000) / 48_000
    soundfile.write(source / "bat.wav", 0.3 * np.sin(2 * np.pi * 15_000 * time), 48_000)
    soundfile.write(source / "half.wav", np.concatenate([np.zeros(8000), NOISE]), 16_000)
    rows = "".join(f"{name} {source}/{name}.wav\n" for name in ("bat", "half"))
    (source / "wav.scp").write_text(rows)
    (source / "segments").write_text("all bat 0 -1\nquiet half 0 0.5\nspoken half 0.5 1.0\n")
    audio, reasons = manifest(source, tmp_path / "out")
    assert list(audio) == [f"{source}/half.wav"] and np.abs(audio[f"{source}/half.wav"] - NOISE).max() < 1e-4
    assert reasons == {
        "all": "silent: all of its sound lies above 8 kHz", "quiet": "silent: nothing is heard in it at 16 bits",
    }  # fmt: skip


def test_a_recording_that_is_lost_while_it_is_joined_is_left_out_of_the_others(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for index in range(5):
        soundfile.write(source / f"{index}.wav", RNG.normal(0.0, 0.1, 8000), 16_000)
    soundfile.write(source / "bat.wav", 0.3 * np.sin(2 * np.pi * 15_000 * np.arange(24_000) / 48_000), 48_000)
    make_manifest(source, tmp_path / "out", options=Options(valid_percent=0, join=1.0))
    lines = (tmp_path / "out" / "parts.tsv").read_text().splitlines()[1:]
    assert sorted(line.split("\t")[3] for line in lines) == [f"{index}.wav" for index in range(5)]
    assert (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1:] == ["bat.wav\tsilent: all of its sound lies above 8 kHz"]
