"""Numbers that are not samples are named where they come in: by `manifest`, by what reads its files later, by models and by streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.data.audio import Checked, read_mono
from hubert_eff.errors import UserError
from hubert_eff.labels import make as targets
from hubert_eff.models.hubert import HubertModel
from hubert_eff.streaming.stream import StreamingModel

NOISE = np.random.default_rng(0).normal(0.0, 0.1, 8000).clip(-1, 1)
WAV = torch.from_numpy(np.stack([NOISE, NOISE[::-1]])).float()


def spoilt(value: float, dtype: str = "float64") -> np.ndarray:
    """Noise with one sample changed."""
    samples = NOISE.astype(dtype)
    samples[77] = value
    return samples


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e38, "not audio: samples of up to 1e+38, which must be within -1 and 1"), (-1e10, "not audio: samples of up to 1e+10"),
        (np.nan, "NaN or infinite samples"), (-np.inf, "NaN or infinite samples"), (1e300, "NaN or infinite samples"),
    ],
)  # fmt: skip
def test_a_manifest_leaves_them_out(value: float, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "bad.wav", spoilt(value), 16_000, subtype="DOUBLE")
    soundfile.write(tmp_path / "bad2.wav", np.stack([spoilt(value), -spoilt(value)], 1), 8000, subtype="DOUBLE")
    soundfile.write(tmp_path / "good.wav", NOISE, 16_000)
    assert main(["manifest", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    rows = (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == ["bad.wav", "bad2.wav"] and all(reason in row for row in rows)


def test_floats_beyond_full_scale_are_scaled_where_they_would_be_used_as_they_lie(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 3.0), ("c", 32_768.0)):
        soundfile.write(tmp_path / f"{name}.wav", NOISE / np.abs(NOISE).max() * scale, 16_000, subtype="FLOAT")
    assert main(["manifest", str(tmp_path), "--out", str(tmp_path / "out"), "--valid-percent", "0"]) == 0
    root, *lines = (tmp_path / "out" / "train.tsv").read_text().splitlines()
    audio = [soundfile.read(Path(root) / line.split("\t")[0])[0] for line in lines]
    assert len(audio) == 3 and all(np.abs(a - NOISE / np.abs(NOISE).max()).max() < 1e-4 for a in audio)


@pytest.mark.parametrize("value", [1e38, np.nan])
def test_later_readers_name_the_file(value: float, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", spoilt(value), 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"a.wav holds samples that are not finite or not audio: make the manifest again"):
        targets.read_audio(tmp_path / "a.wav", 8000)  # `labels`, for manifests that other programs write
    with pytest.raises(UserError, match=r"a.wav: it has changed since it was checked"):
        list(read_mono(tmp_path / "a.wav", Checked(16_000, 1, 9000, 0.5, 0.01)))


@pytest.fixture(scope="module")
def model() -> HubertModel:
    return hubert_eff.build("conformer-debug", streaming=True).eval()


WRONG = {
    "int16": ((WAV * 32_768).short(), r"float samples in \[-1, 1\], not torch.int16: .* wav.float\(\) / 32768"),
    "int64": (WAV.long(), "float samples.*not torch.int64"),
    "uint8": (WAV.byte(), "float samples.*not torch.uint8"),
    "bool": (WAV > 0, "float samples.*not torch.bool"),
    "complex": (WAV.to(torch.complex64), "float samples.*not torch.complex64"),
    "float8": (WAV.to(torch.float8_e4m3fn), "float samples.*not torch.float8_e4m3fn"),
    "sparse": (WAV[:1].to_sparse(), "dense tensor"),
    "numpy": (WAV.numpy(), "must be a tensor.*not a ndarray"),
    "1-D": (WAV[0], r"\(8000,\)"),
    "channels": (WAV[None], r"\(1, 2, 8000\)"),
    "NaN": (torch.from_numpy(spoilt(np.nan))[None], r"1 samples are not finite, the first \(sample 77 of .*\) is nan"),
    "infinite": (torch.from_numpy(spoilt(-np.inf))[None].bfloat16(), r"1 samples are not finite, the first \(sample 77 of .*\) is -inf"),
    "1e38": (torch.from_numpy(spoilt(1e38))[None], r"1 samples are not audio, the first \(sample 77 of .*\) is 1e\+38"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_models_and_streams_refuse_other_audio(kind: str, model: HubertModel) -> None:
    wav, said = WRONG[kind]
    one = wav[:1] if torch.is_tensor(wav) and wav.dim() == 2 and not wav.is_sparse else wav
    for call in (model.hidden_states, StreamingModel(model).feed):
        with pytest.raises(UserError, match=said):
            call(one)  # type: ignore[operator]
    if not (torch.is_tensor(wav) and wav.dtype in (torch.float32, torch.float64, torch.bfloat16)):
        with pytest.raises(UserError, match=said):
            model(wav, features_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(dtype: torch.dtype, model: HubertModel) -> None:
    with torch.no_grad():
        found, wanted = (model.hidden_states(wav)[0][-1] for wav in (WAV.to(dtype), WAV.to(dtype).float()))
        assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_padding_is_bool_and_at_the_end_and_may_hold_anything(model: HubertModel) -> None:
    padding = torch.zeros_like(WAV, dtype=torch.bool)
    padding[1, 5000:] = True
    for mask, said in (
        (padding.int(), "bool tensor, True for padding, not torch.int32"), (padding[:, 1:], "must have the shape"),
        (padding.flip(1), "padding must stand at the end of a row, but row 1"), (padding.numpy(), "not a ndarray"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            model.hidden_states(WAV, mask)  # type: ignore[arg-type]
    filled = WAV.masked_fill(padding, float("nan"))
    for any_model in (model, hubert_eff.build("conformer-debug", normalize=True).eval()):
        with torch.no_grad():
            for one, other in zip(any_model.hidden_states(WAV, padding)[0], any_model.hidden_states(filled, padding)[0]):
                assert torch.equal(one, other) and bool(one.isfinite().all())
