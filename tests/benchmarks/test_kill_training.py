"""benchmarks/reliability/kill_training.py, by which training is killed at random moments: it finds nothing, and it would find something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.checkpoints.load import read_fairseq

from ..helpers.paths import ROOT  # noqa: E402

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

BENCHMARKS = ROOT / "benchmarks" / "reliability"


@pytest.fixture
def kill_training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kill_training

    return kill_training


@pytest.mark.long
def test_three_kills_lose_nothing(kill_training: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kill_training.torture(tmp_path, kills=3, updates=12, seed=1)
    assert result.faults == []
    assert len(result.kills) == 3 and all(0 <= kill.lost <= kill_training.INTERVAL for kill in result.kills)
    assert result.compared >= 12
    kill_training.show(result)
    assert "nothing saved was lost" in capsys.readouterr().out
    # a weight that is another by one bit would be found
    content = read_fairseq(tmp_path / "whole" / "checkpoint_last.pt")["model"]
    changed = {**content, "mask_emb": torch.nextafter(content["mask_emb"], torch.tensor(1e9))}
    assert kill_training.differences(content, changed) == ["/mask_emb"]


def test_it_finds_truncated_and_lost_checkpoints_and_other_figures(kill_training: Any, tmp_path: Path) -> None:
    model = hubert_eff.build("transformer-debug", num_classes=[9])
    cfg = {"model": {"_name": "hubert_transformer", **model.config.to_dict()}}
    saved = {"model": model.state_dict(), "cfg": cfg, "optimizer_history": [{"num_updates": 4}]}
    torch.save(saved, tmp_path / "checkpoint_last.pt")
    faults: list[str] = []
    assert kill_training.check(tmp_path, 4, faults) == 4 and faults == []
    assert kill_training.check(tmp_path, 6, faults) == 4 and "is of update 4, but 6 was saved" in faults.pop()
    (tmp_path / "checkpoint_1_6.pt").write_bytes((tmp_path / "checkpoint_last.pt").read_bytes()[:50_000])
    kill_training.check(tmp_path, 4, faults)
    assert len(faults) == 1 and "checkpoint_1_6.pt is not a checkpoint" in faults[0]
    whole, cut = '[train_inner][INFO] - {"num_updates": "3", "loss": "2.4", "wall": "1"}', '[train_inner][INFO] - {"num_updates": "4'
    (tmp_path / "log").write_text(f"{whole}\n{cut}")
    assert kill_training.logged(tmp_path / "log") == {3: {"num_updates": "3", "loss": "2.4"}}
