"""What is trained is exported: a mean of N checkpoints takes as many as there are, and says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.cli import main


@pytest.mark.parametrize("numbered", [2, 0])
def test_the_mean_is_of_those_that_are_there(numbered: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where saves fall on the end of an epoch, fairseq keeps them under no number but that of checkpoint_last.pt."""
    model = hubert_eff.build("fusionformer-debug")
    content = {"cfg": {"model": {**model.config.to_dict(), "_name": "hubert_fusionformer"}, "task": {}}}
    files = [*(f"checkpoint_{n}_{4 * n}.pt" for n in range(1, numbered + 1)), "checkpoint_last.pt"]
    for number, name in enumerate(files, start=1):
        state = {key: torch.full_like(value, number) if value.is_floating_point() else value for key, value in model.state_dict().items()}
        torch.save({**content, "model": state, "optimizer_history": [{"num_updates": 4 * number}]}, tmp_path / name)
    out = tmp_path / "mean.safetensors"
    assert main(["export", str(tmp_path), "--average", "5", "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    there = f"the mean of {', '.join(files)}" if numbered else "1 checkpoint of different updates, not 5: checkpoint_last.pt is exported"
    assert f"{tmp_path} holds {len(files)} checkpoint" in said.err and there in said.err
    assert "to keep more, train with checkpoint.save_interval_updates=N checkpoint.keep_interval_updates=5" in said.err
    assert json.loads(said.out)["file"] == str(out)
    weights = [value for value in hubert_eff.load(out).state_dict().values() if value.is_floating_point()]
    assert weights and all(torch.equal(w, torch.full_like(w, (len(files) + 1) / 2)) for w in weights)
