"""Training curves: what is read out of fairseq's logs of both formats, and what is drawn."""

from __future__ import annotations

import json

import pytest

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.reports.training_log import LOG, draw_curves, read_log

HEAD = "[2026-01-01 00:00:00,000]"
SIMPLE = f"""\
{HEAD}[fairseq_cli.train][INFO] - {{'common': {{'seed': 1}}}}
{HEAD}[train_inner][INFO] - epoch 001:     10 / 20 loss=6.1, correct_m_0=0.05, majority_m_0=0.06, num_updates=10, lr=0.001, gnorm=1.5
{HEAD}[train_inner][INFO] - epoch 001:     20 / 20 loss=5.9, correct_m_0=0.10, majority_m_0=0.06, num_updates=20, lr=0.002, gnorm=nan
{HEAD}[valid][INFO] - epoch 001 | valid on 'valid' subset | loss 5.8 | correct_m_0 0.125 | majority_m_0 0.0625 | num_updates 20
{HEAD}[train][INFO] - epoch 001 | loss 6 | correct_m_0 0.07 | num_updates 20 | lr 0.002
{HEAD}[train_inner][INFO] - epoch 001:     20 / 20 loss=5.5, correct_m_0=0.11, majority_m_0=0.06, num_updates=20, lr=0.002, gnorm=2
{HEAD}[valid][INFO] - epoch 002 | valid on 'valid' subset | loss 5.9 | correct_m_0 0.130 | majority_m_0 0.0625 | num_updates 40
"""


def as_json() -> str:
    entries = [
        ("train_inner", {"epoch": 1, "update": 0.5, "loss": "6.1", "correct_m_0": "0.05", "num_updates": "10", "lr": "0.001"}),
        ("train_inner", {"epoch": 1, "update": 1.0, "loss": "5.5", "correct_m_0": "0.11", "num_updates": "20", "lr": "0.002"}),
        ("valid", {"valid_loss": "5.8", "valid_correct_m_0": "0.125", "valid_majority_m_0": "0.0625", "valid_num_updates": "20"}),
        ("train", {"epoch": 1, "train_loss": "9", "train_num_updates": "20"}),
    ]
    return "".join(f"{HEAD}[{name}][INFO] - {json.dumps(entry)}\n" for name, entry in entries)


def test_both_formats_and_a_restart(tmp_path):
    for text in (SIMPLE, as_json()):
        (tmp_path / LOG).write_text(text)
        log = read_log(tmp_path / LOG, "run")
        assert [(r["num_updates"], r["loss"]) for r in log.train] == [(10, 6.1), (20, 5.5)]  # repeated after the restart
        assert log.best["num_updates"] == 20 and log.best["correct_m_0"] == 0.125
        assert "best validation at 20, loss 5.800, masked accuracy 12.5% (most frequent label: 6.2%)" in str(log)


def test_the_best_of_a_recognizer_is_the_one_with_fewest_word_errors(tmp_path):
    records = ((1, 2, 80), (2, 3, 70))
    lines = [f"epoch 001 | valid on 'valid' subset | loss {loss} | wer {wer} | num_updates {n}" for n, loss, wer in records]
    (tmp_path / LOG).write_text("\n".join(lines))
    log = read_log(tmp_path / LOG)
    assert log.best["num_updates"] == 2 and "WER 70.0%" in str(log)


def test_a_log_without_records(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / LOG)
    (tmp_path / LOG).write_text("nothing yet\n{broken num_updates}\n")
    with pytest.raises(UserError, match="no record of training yet"):
        read_log(tmp_path / LOG)
    (tmp_path / LOG).write_text(SIMPLE.splitlines()[1])
    log = read_log(tmp_path / LOG)
    assert "no validation yet" in str(log)
    (tmp_path / LOG).write_text(SIMPLE.replace("correct_m_0 0.125", "correct_m_0 0.05"))
    assert "masked accuracy 5.0% (most frequent label: 6.2%), no better than always predicting the most" in str(read_log(tmp_path / LOG))
    (tmp_path / LOG).write_text(SIMPLE.splitlines()[1])
    log = read_log(tmp_path / LOG)
    with pytest.raises(UserError, match="no validation yet"):
        _ = log.best


def test_report_of_a_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from hubert_eff.reports import table1

    monkeypatch.setattr(table1, "PAPER_TABLE", table1.PAPER_TABLE[1:2])
    run, refused = tmp_path / "runs" / "run", tmp_path / "runs" / "refused"
    for folder, text in ((run, SIMPLE), (refused, "nothing yet\n")):
        folder.mkdir(parents=True)
        (folder / LOG).write_text(text)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "masked accuracy 12.5%" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Training</h2>" in page and f"curves of {run}" in page and f"Left out: {refused / LOG} holds no record" in page
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert len(found["train"]) == 2 and len(found["valid"]) == 2
    for kind in ("svg", "png"):
        assert (tmp_path / "out" / f"training-1.{kind}").stat().st_size > 1000
    log = read_log(run / LOG, "run")
    titles = [axis.get_title() for axis in draw_curves([log]).axes if axis.axison]
    assert titles == ["loss, bits per frame", "masked accuracy, %", "norm of the gradient", "learning rate"]  # of what was logged
    limits = {axis.get_xlim() for axis in draw_curves([log]).axes if axis.axison}
    assert len(limits) == 1 and limits.pop() == pytest.approx((0.0, 41.2))  # one x axis
    loss = draw_curves([log, log]).axes[0]
    assert [list(line.get_ydata()) for line in loss.lines] == [[6.1, 5.5], [5.8, 5.9]] * 2
    assert "curves of all runs" not in page
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / LOG).write_text(SIMPLE)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "both")]) == 0
    assert "curves of all runs" in (tmp_path / "both" / "report.html").read_text()
    assert (tmp_path / "both" / "training-together.png").stat().st_size > 1000
