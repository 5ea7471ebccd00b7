"""`50 updates; best at 80`: what a log says of resumed runs, of several runs, and of validations after the last record of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubert_eff.analysis.plots import distinct_colors
from hubert_eff.reports.training_log import TrainingLog, draw_curves, read_log


def inner(update: float, loss: float) -> str:
    return f"[train_inner][INFO] - epoch 001:     10 / 20 loss={loss}, num_updates={update}, lr=0.001"


def valid(update: int, loss: float, subset: str = "valid") -> str:
    return f"[{subset}][INFO] - epoch 001 | valid on '{subset}' subset | loss {loss} | num_updates {update}"


def means(update: int) -> str:
    return f"[train][INFO] - epoch 001 | loss 6 | num_updates {update} | lr 0.002"


def loaded(update: int) -> str:
    return f"[fairseq.trainer][INFO] - Loaded checkpoint /runs/checkpoint_last.pt (epoch 2 @ {update} updates)"


FRESH = "[fairseq.trainer][INFO] - No existing checkpoint found /runs/checkpoint_last.pt"


@pytest.mark.parametrize(
    "lines, updates, train, validated, best",
    [
        ([inner(50, 5), valid(80, 4)], 80, [50], [80], 80),  # a validation after the last record
        ([inner(50, 5), valid(50, 4), means(97)], 97, [50], [50], 50),  # the end of an epoch
        ([inner(50, 5), inner(80, 4), valid(80, 1), loaded(50), inner(60, 4), valid(60, 3)], 60, [50, 60], [60], 60),  # killed, resumed
        ([inner(50, 5), inner(80, 4), valid(80, 1), inner(60, 4), valid(60, 3)], 60, [50, 60], [60], 60),  # the same, nothing said
        ([inner(5, 9), inner(50, 5), valid(50, 1), FRESH, inner(10, 7), valid(20, 6)], 20, [10], [20], 20),  # another run
        ([inner(50, 5), valid(50, 1), loaded(0), inner(10, 7), valid(20, 6)], 20, [10], [20], 20),  # fine-tuning from a checkpoint
        ([inner(50, 5), valid(50, 3), loaded(50)], 50, [50], [50], 50),  # nothing was left to do
        ([inner(50, 5), valid(50, 3, "a"), valid(50, 1, "b"), valid(80, 4, "a"), valid(80, 0, "b")], 80, [50], [50, 80], 50),
        ([valid(20, 3), valid(10, 4)], 10, [], [10], 10),
        ([inner(float("nan"), 1), inner(float("inf"), 1), inner(-1, 1), inner(5, 2), "x" * 10**6, inner(9, 3)], 9, [5, 9], [], 0),
    ],
)  # fmt: skip
def test_updates(tmp_path: Path, lines: list[str], updates: int, train: list[int], validated: list[int], best: int) -> None:
    file = tmp_path / "hydra_train.log"
    file.write_text("\n".join(lines) + "\n")
    log = read_log(file, "run")
    assert log.updates == updates and [r["num_updates"] for r in log.train] == train and [r["num_updates"] for r in log.valid] == validated
    assert str(log).startswith(f"run: {updates} updates" + (f"; best validation at {best}," if best else ", no validation yet"))


def test_json_of_a_validation_set_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "hydra_train.log"
    file.write_text('[dev_other][INFO] - {"epoch": 1, "dev_other_loss": "4", "dev_other_num_updates": "30"}\n')
    assert read_log(file).valid == [{"epoch": 1.0, "loss": 4.0, "num_updates": 30.0}]


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    records = [{"num_updates": 1.0, "loss": float("nan")}, {"num_updates": 2.0, "loss": 5.0}]
    assert TrainingLog("run", valid=records, updates=2).best["num_updates"] == 2.0


@pytest.mark.parametrize("count", [1, 11, 13, 40, 200])
def test_colors_do_not_repeat(count: int) -> None:
    colors = distinct_colors(count)
    assert len(set(colors)) == count and all(len(color) == 7 and color.startswith("#") for color in colors)


def test_curves_of_many_runs_are_told_apart() -> None:
    pytest.importorskip("matplotlib")
    runs = [TrainingLog(f"_run $x_{i}", [{"num_updates": 1.0, "loss": 1.0 + i}]) for i in range(15)]
    axis = draw_curves(runs).axes[0]
    assert len({line.get_color() for line in axis.lines}) == len(axis.get_legend().get_texts()) == 15
