"""The benchmark of training on a GPU: its restated fairseq is fairseq, and it runs; what it measures needs a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.layers import compiling

from ..helpers.paths import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's module; its neighbors can be imported too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "speed"))
    import train_gpu

    yield train_gpu
    compiling.BACKEND = "inductor"
    compiling.compiled_call.cache_clear()
    for path in (ROOT / "benchmarks" / "speed").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("preset", ["transformer-debug", "conformer-debug"])
@pytest.mark.parametrize("extractor", ["default", "layer_norm"])
def test_restated_model_has_the_loss_and_gradients_of_fairseqs(preset: str, extractor: str, bench: Any) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    import sides
    import stock
    from restated import RestatedHubert, restated_loss

    keys = {"extractor_mode": extractor, "conv_bias": extractor == "layer_norm", "final_dim": 32, "required_seq_len_multiple": 2}
    ours = hubert_eff.build(preset, num_classes=(sides.CLASSES,), label_rate=50.0, **keys, **sides.NO_DROPOUT)
    real = stock.stock_model(ours.config, sides.CLASSES, preset.startswith("conformer"))
    restated = RestatedHubert(ours.config, sides.CLASSES, preset.startswith("conformer"))
    restated.load_state_dict(real.state_dict())  # which needs the same names and shapes
    samples, frames = 5440, 16  # one frame is cut, for want of a label
    padding = torch.zeros(2, samples, dtype=torch.bool)
    padding[1, 4000:] = True
    sample = {
        "id": torch.arange(2),
        "net_input": {"source": 0.1 * torch.randn(2, samples), "padding_mask": padding},
        "target_list": [torch.randint(sides.CLASSES, (2, frames - 1))],
    }
    restated.masks = torch.rand(2, frames - 1) < 0.5
    stock.use_masks(restated.masks)
    found = sides.difference(sides.gradients(real, stock.stock_loss, sample), sides.gradients(restated, restated_loss, sample))
    assert max(found.values()) < 1e-5
    assert sides.has_fairseq()


def test_loss_without_fairseq_is_the_criterions(bench: Any) -> None:
    criterion = pytest.importorskip("fairseq_plugins.criterions.hubert_eff", reason="fairseq is not installed").HubertEffCriterion
    import sides

    model = hubert_eff.build("transformer-debug", num_classes=(sides.CLASSES,), **sides.NO_DROPOUT)
    sample = sides.make_sample(argparse.Namespace(device=torch.device("cpu")), 2, 5440, padding=True)
    losses = sides.plain_loss, criterion(None, 1.0, 0.0, [sides.PENALTY])
    assert max(sides.difference(*(sides.gradients(model, loss, sample) for loss in losses)).values()) < 1e-6


@pytest.mark.parametrize("half", [False, True])
def test_restated_update_is_fairseqs(half: bool, bench: Any) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    from fairseq.optim import FP16Optimizer, build_optimizer
    from restated import RestatedAdam, Update
    from sides import ADAM

    from ..helpers.pretraining import fairseq_config

    real, restated = (torch.nn.Linear(7, 5, dtype=torch.bfloat16 if half else torch.float32) for _ in range(2))
    restated.load_state_dict(real.state_dict())
    keys = ("optimizer.adam_betas='(0.9,0.98)'", "optimizer.adam_eps=1e-6", "optimizer.weight_decay=0.01", "optimization.lr=[0.0005]")
    cfg = fairseq_config("optimizer._name=adam", *keys, f"common.bf16={str(half).lower()}")
    params = list(real.parameters())
    optimizer = FP16Optimizer.build_optimizer(cfg, params) if half else build_optimizer(cfg.optimizer, params)
    update = Update(restated, lambda tensors: RestatedAdam(tensors, **ADAM), clip=0.5)
    for _ in range(3):
        x = torch.randn(11, 7, dtype=params[0].dtype)
        optimizer.zero_grad()
        optimizer.backward(real(x).float().square().sum())
        optimizer.multiply_grads(1 / 11)
        optimizer.clip_grad_norm(0.5)
        optimizer.step()
        update.zero_grad()
        restated(x).float().square().sum().backward()
        update.step(11)
    for a, b in zip(real.parameters(), restated.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_without_a_gpu_nothing_is_measured(bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == bench.main(["--device", "cpu"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("not measured: no CUDA device") and "--debug" in second


@pytest.mark.long
def test_smoke_run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sides.has_fairseq", lambda: False)
    assert bench.main(["--device", "cpu", "--debug", "--only", "conformer", "sparse", "--out", str(tmp_path / "gpu.json")]) == 0
    assert "faster than fairseq (restated)" in capsys.readouterr().out
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["gpu"] == "none: a smoke test, no measurement"
    assert [row["side"] for row in result["rows"]] == 2 * ["fairseq (restated)", "eager", "+ fused", "+ compiled"]
    assert all(row["peer"] == "fairseq (restated)" and row["mfu"] is None for row in result["rows"])
    assert all(max(errors.values()) < 2e-3 for errors in result["relative_difference"].values())
