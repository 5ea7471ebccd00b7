"""Pre-training that goes on from another model: of other classes, of Hugging Face."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.exporting.huggingface import export_folder

from ..helpers.finetuning import TEXTS
from ..helpers.finetuning import make_data as make_texts
from ..helpers.finetuning import make_task as make_finetuning

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from ..helpers.pretraining import make_data, make_task, run  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"train": [1.0, 1.2, 0.9], "valid": [0.8]})


def folder(path: Path, **keys: Any) -> Path:
    """A Transformer as Hugging Face has it: transformers' own tests of it are tests/exporting/test_huggingface.py."""
    export_folder(hubert_eff.build("transformer-debug", **{"normalize": True, **keys}).eval(), path)
    return path


def started(data: Path, *changes: str, config: str = "transformer_debug") -> Any:
    task, cfg = make_task(data, *changes, config=config)
    return task.build_model(cfg.model)


def test_a_folder_of_hugging_face_starts_a_run(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder(tmp_path / "hf")
    with caplog.at_level(logging.INFO):
        model = started(data, f"task.init_from={source}")
    lines = [record.message for record in caplog.records if record.message.startswith("task.init_from=")]
    theirs = hubert_eff.load(source).state_dict()
    same = [name for name, tensor in model.state_dict().items() if name in theirs and torch.equal(tensor, theirs[name])]
    numbers = sum(theirs[name].numel() for name in same)
    classes = model.num_classes[0]
    assert lines == [
        f"task.init_from={source}: {len(same)} tensors ({numbers:,} numbers) are taken over, codebooks of [{classes}] classes are new "
        "(the source has none); the optimizer begins anew"
    ]
    assert {"mask_emb", "layer_norm.weight", "encoder.pos_conv.0.weight_g"} <= set(same) and "final_proj.weight" not in same


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", normalize=False)
    with pytest.raises(UserError, match="task.init_from=.*hf: the source has another normalize: set task.normalize=false"):
        started(data, f"task.init_from={source}")
    started(data, f"task.init_from={source}", "task.normalize=false")
    with pytest.raises(UserError, match="task.new_codebooks=true applies to task.init_from, which is not set"):
        started(data, "task.new_codebooks=true")
    with pytest.raises(UserError, match="model.normalize_eps=1e-07: fairseq normalizes its batches with 1e-5"):
        started(data, "model.normalize_eps=1e-7")
    with pytest.raises(UserError, match="task.init_from=.*: it holds no config.json"):
        started(data, f"task.init_from={data}")


def test_fine_tuning_starts_from_a_folder(tmp_path: Path) -> None:
    texts, source = make_texts(tmp_path / "texts", {"train": TEXTS, "valid": ["one ten"]}), folder(tmp_path / "hf")
    task, cfg = make_finetuning("debug", f"task.data={texts}", f"model.w2v_path={source}")
    model = task.build_model(cfg.model)
    theirs = hubert_eff.load(source).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.hubert.state_dict().items() if not name.startswith("final_proj"))


@pytest.mark.long
def test_a_run_goes_on_from_a_folder_of_hugging_face(data: Path, tmp_path: Path) -> None:
    """As a user runs it, through fairseq-hydra-train; a run that is resumed goes on with its own weights, or not at all."""
    source = folder(tmp_path / "hf")
    words = (f"task.init_from={source}", "encoder=transformer_debug", "checkpoint.save_interval_updates=2")
    done = run(data, tmp_path / "run", *words, "optimization.max_update=4")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "task.init_from=" in line and "taken over" in line]
    assert len(said) == 1 and said[0].endswith("classes are new (the source has none); the optimizer begins anew")
    resumed = run(data, tmp_path / "run", *words, "optimization.max_update=5")
    assert resumed.returncode == 0 and '"num_updates": "5"' in resumed.stdout and '"num_updates": "4"' not in resumed.stdout
    folder(tmp_path / "hf")  # other weights
    refused = run(data, tmp_path / "run", *words, "optimization.max_update=6")
    assert refused.returncode == 2 and "task.init_from" in refused.stderr
