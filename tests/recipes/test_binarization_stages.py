"""Options of the stages W32A32 -> W1A2 -> W1A1: who teaches, and one learning-rate schedule over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.recipes.binarize import Binarization

from ..helpers.checkpoints import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the recipe looks for before it starts."""
    for name in ("train.tsv", "valid.tsv", "dict.km.txt"):
        (tmp_path / name).write_text("x\n")
    return tmp_path


def words(folder: Path, **keys: Any) -> list[list[str]]:
    recipe = Binarization(folder, folder, folder / "out", **keys)
    return [step["command"] for step in recipe.plan()]


def test_the_float_model_can_teach_all_stages(folder: Path) -> None:
    out = folder.resolve() / "out"
    before = words(folder)
    assert f"criterion.teacher={out / 'w1a2' / 'checkpoint_best.pt'}" in before[2] and not any("init_from" in w for w in before[2])
    _, second, third = words(folder, taught_by_float=True)
    for command in (second, third):
        assert f"criterion.teacher={out / 'float' / 'checkpoint_best.pt'}" in command
    assert f"task.init_from={out / 'w1a2' / 'checkpoint_best.pt'}" in third and not any("init_from" in w for w in second)
    keys = {"label_rate": 100.0, "normalize": True}
    source = checkpoint(hubert_eff.build("conformer-debug", (7,), **keys), folder / "float.pt")
    _, last = words(folder, taught_by_float=True, teacher=source)
    assert f"criterion.teacher={source}" in last and f"task.init_from={out / 'w1a2' / 'checkpoint_best.pt'}" in last
    half = checkpoint(hubert_eff.build("conformer-debug", (7,), quant="w1a2", **keys), folder / "half.pt")
    with pytest.raises(UserError, match=r"--taught-by-float: --teacher .*half.pt is w1a2, not float"):
        words(folder, taught_by_float=True, teacher=half)


def test_stages_can_share_one_schedule(folder: Path) -> None:
    first, second, third = words(folder, one_schedule=True, updates=[60, 30, 30], overrides=["optimization.lr=[0.005]"])
    assert first[-1] == "lr_scheduler.total_num_update=120"
    for command, left, warmup in ((second, 60, 0), (third, 30, 0)):
        for group in ("default", "scales"):
            assert f"optimizer.groups.{group}.lr_scheduler.total_num_update={left}" in command
            assert f"optimizer.groups.{group}.lr_scheduler.warmup_updates={warmup}" in command
        rates = [float(word[len("optimization.lr=[") : -1]) for word in command if word.startswith("optimization.lr=")]
        assert rates == [0.005, pytest.approx(0.005 * (left / 100) ** 0.5)]  # the last one counts
    with pytest.raises(UserError, match="starts at update 10 of 50, within a warm-up of 20 updates"):
        words(folder, one_schedule=True, updates=[10, 20, 20])
