"""fairseq-hydra-train at one bit in chunks: what comes out streams, from its checkpoint and from a packed file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.streaming.stream import StreamingModel

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from ..helpers.packed import differing  # noqa: E402
from ..helpers.pretraining import logged, make_data, run  # noqa: E402
from ..helpers.streams import cut_at_random, fed, reference  # noqa: E402


@pytest.mark.long
def test_a_one_bit_model_trains_in_chunks_and_streams(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [0.8 + 0.1 * (i % 5) for i in range(12)], "valid": [1.0, 0.9]})
    overrides = (
        "task.normalize=false", "model.streaming=true", "model.chunk_sizes='8,16,0'", "model.left_chunks='1,-1'", "model.quant=w1a1",
        "model.quant_policy=paper", "optimization.max_update=6",
    )  # fmt: skip
    done = run(data, tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr
    assert len(logged(done.stdout)) == 6
    model = hubert_eff.load(tmp_path / "run" / "checkpoint_last.pt").eval()
    started = [m for m in model.modules() if hasattr(m, "initialized")]
    assert started and all(bool(m.initialized) for m in started)
    hubert_eff.export(model, tmp_path / "packed.safetensors")
    packed, wav = hubert_eff.load(tmp_path / "packed.safetensors"), torch.randn(1, 20_000)
    simulated, bits = (fed(StreamingModel(m, 16, 1), cut_at_random(wav, 5_000)) for m in (model, packed))
    assert differing([bits], [simulated]) == 0
    double = model.double()
    stream = fed(StreamingModel(double, 16, 1), [wav])
    torch.testing.assert_close(stream, reference(double, wav.double(), 16, 1), rtol=0, atol=1e-9)
