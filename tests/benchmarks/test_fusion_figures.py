"""FusionFormer's figures from runs: what is measured in depth, what a run that diverged counts as, the whole way at toy size."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

import hubert_eff
from hubert_eff.analysis.layer_trends import Record
from hubert_eff.errors import StepFailed, UserError
from hubert_eff.recipes.base import Step
from hubert_eff.utils.files import write_json, write_text

from ..helpers.benchmarks import scripts

STOPPED = "stopped at update 21: the loss is inf (utterances 3, 1). The last checkpoint is untouched"


@pytest.fixture
def figures() -> Iterator[Any]:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'hubert-eff[plot]'")
    with scripts("learning", "fusion_figures") as (module,):
        yield module


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "speech").mkdir()
    for index in range(12):
        sf.write(tmp_path / "speech" / f"{index}.wav", (0.1 * generator.standard_normal(16_000)).astype(np.float32), 16_000)
    return tmp_path / "speech"


@pytest.mark.parametrize("preset", ["conformer-debug", "fusionformer-debug"])
def test_depth_is_of_inputs_weights_and_outputs(figures: Any, preset: str, tmp_path: Path) -> None:
    model = hubert_eff.build(preset, **({"pos_enc_type": "abs"} if preset.startswith("conformer") else {})).eval()
    with torch.no_grad():
        model.encoder.layers[1].ffn1.w_1.weight.mul_(10.0)
    hubert_eff.export(model, tmp_path / "model.safetensors")
    wav = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    found = figures.variances(tmp_path / "model.safetensors", [wav])
    assert set(found) == {f"{block} {name}" for block in (1, 2) for name in figures.LAYERS}

    layer = model.encoder.layers[1].ffn1.w_1
    seen = []
    with torch.no_grad(), layer.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].var(), output.var()))):
        states, _ = model.hidden_states(wav)
    row = found["2 ffn1.w_1"]
    assert row["weight"] == pytest.approx(float(layer.weight.detach().var()), rel=0.01)
    assert row["weight"] > 20 * found["1 ffn1.w_1"]["weight"]
    assert (row["input"], row["output"]) == pytest.approx([float(value) for value in seen[0]], rel=0.01)
    queries = model.encoder.layers[0].self_attn.qkv_proj.weight[:64] if preset.startswith("fusion") else None
    if queries is not None:
        assert found["1 self_attn.q_proj"]["weight"] == pytest.approx(float(queries.detach().var()), rel=0.01)
        assert found["1 ffn1.w_1"]["input"] == pytest.approx(float(states[0].var()), rel=0.01)  # no norm stands in front of it


def _finish(figures: Any, bench: Any, model: str, variances: list[float], losses: list[float]) -> None:
    """Leave behind what a run that has ended would."""
    step = bench.training(model)
    write_json(bench._step_record(step), {"title": step.title, "command": step.shown, "seconds": 1.0, "commit": "abc1234"})
    layers = [f"encoder.layers.{block}.{name}" for block in range(2) for name in figures.LAYERS]
    records = [Record(25 * i, dict.fromkeys(layers, (0.5, value, 0.0)), 1.0, "batch") for i, value in enumerate(variances)]
    write_text(bench.folder(model) / figures.FILE, "".join(f"{record.line()}\n" for record in records))
    lines = [f'[train_inner][INFO] - {{"loss": "{loss}", "num_updates": "{10 * (i + 1)}"}}\n' for i, loss in enumerate(losses)]
    valid = '[valid][INFO] - {"valid_loss": "3", "valid_correct_m_0": "0.25", "valid_majority_m_0": "0.07", "valid_num_updates": "20"}\n'
    write_text(bench.out / f"{model}.log", "".join([*lines, valid]))
    write_text(bench.log_of(step), f"fairseq-hydra-train: {STOPPED}\n" if model == "none" else "")


def test_figures_of_runs_that_are_known(figures: Any, tmp_path: Path) -> None:
    bench = figures.FusionFigures(tmp_path / "speech", tmp_path / "out", layers=2)
    with pytest.raises(UserError, match="has finished: run the command without --tables"):
        bench.write(tmp_path / "page")
    _finish(figures, bench, "none", [1.0, 1e6], [6.0, 7.5])
    _finish(figures, bench, "fusion", [1.0, 1.25], [6.0, 3.5])
    values = bench.write(tmp_path / "page")
    assert json.loads((tmp_path / "page" / "fusion.json").read_text()) == values
    assert list(values["models"]) == ["none", "fusion"] and values["settings"]["speech"] == "speech"
    rows = {line.split(" | ")[0]: line for line in figures.page(values).splitlines() if line.startswith("| ")}
    assert "| no norm | 20 | 7.50 | 25.0 (7.0) | 1e+06 to 1e+06 | 1e+06 | update 25: " in rows["| no norm"]
    assert rows["| no norm"].endswith("update 21: the loss is inf |")
    assert rows["| FusionFormer"].endswith("| 1.2 to 1.2 | 1.2 | none | no |")
    pictures = {name: (tmp_path / "page" / f"fusion-{name}.svg").read_text() for name in ("curves", "trends", "depth")}
    assert all(text.startswith("<?xml") and 'width="576pt"' in text for text in pictures.values())  # 800 px
    bench.write(tmp_path / "again")  # the same figures give the same files
    assert {name: (tmp_path / "again" / f"fusion-{name}.svg").read_text() for name in pictures} == pictures


def test_only_a_run_that_is_not_finite_may_fail(figures: Any, tmp_path: Path) -> None:
    bench = figures.FusionFigures(tmp_path / "speech", tmp_path / "out", layers=2, processes=1)

    def start(text: str, code: int) -> None:
        bench.log_of(Step("a run", ())).unlink(missing_ok=True)
        step = Step("a run", ("python", "-c", f"import sys; print({text!r}); sys.exit({code})"))
        bench._round([deque([step])])

    start(STOPPED, 1)
    start("done", 0)
    with pytest.raises(StepFailed):
        start("stopped: no room left", 1)
    with pytest.raises(StepFailed):
        start(STOPPED, 2)


@pytest.mark.long
def test_the_whole_way_at_toy_size(
    figures: Any, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MODELS", {name: figures.MODELS[name] for name in ("none", "fusion")})
    out = tmp_path / "out"
    sizes = ["--layers", "2", "--updates", "10", "--batch-seconds", "4", "--clusters", "4", "--every", "5"]
    assert figures.main([str(speech), "--out", str(out), *sizes]) == 0
    printed = capsys.readouterr()
    assert "4 of 4 steps to run" in printed.err
    rows = re.findall(r"^\| (.+?) \| 10 \| \d", printed.out, re.MULTILINE)
    assert rows == [title for title, *_ in figures.MODELS.values()]
    values = json.loads((out / "fusion.json").read_text())
    for found in values["models"].values():
        assert found["trends"]["updates"] == [0, 5] and len(found["depth"]) == 2 * len(figures.LAYERS) and found["valid"]
    assert figures.main([str(speech), "--out", str(out), *sizes]) == 0
    assert "0 of 4 steps to run" in capsys.readouterr().err
    assert figures.main([str(speech), "--out", str(out), *sizes, "--layers", "3"]) == 2
