"""The demo's steps and figures, without running the commands (`test_demo` runs them)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hubert_eff.cli import main
from hubert_eff.errors import StepFailed
from hubert_eff.recipes import base, demo

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")


def test_it_runs_every_step_once_and_collects_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    out = tmp_path / "demo"

    def run(words: Sequence[object], stdout: Path | None = None) -> int:
        ran.append([str(word) for word in words])
        if ran[-1][0] == "fairseq-hydra-train":
            figures = "loss 1.5 | correct_m_0 0.4 | majority_m_0 0.1 | code_ppl_0 9 | label_ppl_0 10 | num_updates 5"
            log = next(word.partition("=")[2] for word in ran[-1] if word.startswith("common.log_file="))
            Path(log).write_text(f"valid: epoch 001 | valid on 'valid' subset | {figures}\n")
        if "superb" in ran[-1] and "run" in ran[-1]:
            folder = Path(ran[-1][ran[-1].index("--out") + 1]) / "ks"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"accuracy": 0.5, "chance": 0.25}))
        if stdout is not None:
            clusters = int(ran[-1][ran[-1].index("--clusters") + 1])
            rows = [{"layer": layer, "all": {"pnmi": pnmi + clusters / 1000}} for layer, pnmi in enumerate((0.3, 0.5, 0.4))]
            stdout.write_text(json.dumps({"layers": rows}))
        return 0

    def figures(*words: object) -> dict[str, object]:
        if words[1] == "profile":
            return {"params_without_labels": 3, "storage_mb": {"file": 1.0}, "macs": 1e9, "gflop": 2.0}
        return {"splits": {"valid": {"pnmi": 0.2, "phone_purity": 0.3}}}

    monkeypatch.setattr(base, "run_command", run)
    monkeypatch.setattr(demo, "figures", figures)
    assert main(["demo", "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(ran) == 13 == len(results["seconds"]) and results["valid"]["accuracy"] == 0.4
    # the second labels are of what was found best, the second model differs from the first in its labels alone
    assert results["chosen"] == {"layer": 1, "clusters": 100}
    assert set(results["labels"]) == {"mfcc", "layer 1", "mfcc, 100 classes"}
    (labels,) = (words for words in ran if words[1] == "labels" and "--layer" in words)
    assert labels[labels.index("--layer") + 1] == "1" and labels[labels.index("--clusters") + 1] == "100"
    first, second = (words for words in ran if words[0] == "fairseq-hydra-train")
    assert [word.partition("=")[0] for word in second if word not in first] == [
        "task.label_dir", "checkpoint.save_dir", "common.log_file", "task.label_rate"
    ]  # fmt: skip
    assert results["keyword spotting"]["untrained"]["accuracy"] == 0.5 and json.loads((out / "summary.json").read_text()) == results
    assert main(["demo", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert len(ran) == 13 and said.err.count("(done before)") == 13 and "40.0% (most frequent label: 10.0%)" in said.out
    assert not (out / "recipe.json").exists()  # there are no settings
    (out / "train.log").unlink()
    assert main(["demo", "--out", str(out)]) == 2
    assert f"delete the folder {out} and run the command again" in capsys.readouterr().err


def test_what_a_step_prints_is_kept_once_it_has_succeeded(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    step = base.Step("say", ("python", "-c", "print('{}')"), stdout=file)
    assert step.shown.endswith(f"> {file}")
    assert base.run_command(step.words, step.stdout) == 0 and file.read_text() == "{}\n"
    with pytest.raises(StepFailed, match="exit code 3"):
        base.run_command(("python", "-c", "print('half'); raise SystemExit(3)"), file)
    assert file.read_text() == "{}\n" and list(tmp_path.iterdir()) == [file]


def test_a_training_step_prints_the_log_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(base, "command_line", lambda *words: started.append([*map(str, words)]) or [sys.executable, "-c", ""])
    words = base.training("pretrain", "debug", {"task.data": tmp_path})
    step = base.Step("Train", words)
    assert base.run_command(words) == base.run_command(("hubert-eff", "manifest")) == 0
    assert base.run_command((*words, "hydra/job_logging=disabled")) == 0
    assert started[0] == [*map(str, words), "hydra.job_logging.handlers.console.class=hubert_eff.reports.console.Console"]
    assert "Console" not in step.shown  # by which a folder knows what is done
    assert started[1] == ["hubert-eff", "manifest"] and started[2][-1] == "hydra/job_logging=disabled"
