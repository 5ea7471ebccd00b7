"""`hubert-eff train` and `list`: the command of fairseq that they stand for, what they refuse, and what a run prints."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.exporting.safetensors import export
from hubert_eff.profiling.cost import file_storage
from hubert_eff.reports.console import Console
from hubert_eff.utils.configurations import config_dir, plugin_dir

DATA = ["task.data=data", "task.label_dir=labels"]


def line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["sparseformer_dn_s", "pretrain/sparseformer_dn_s", "sparseformer-dn-s"])
def test_a_configuration_by_any_of_its_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", name, *DATA, "optim=scaled_adam", "--dry-run"]) == 0
    program, *words = line(capsys)
    assert program == "fairseq-hydra-train"
    assert words[:4] == ["--config-dir", str(config_dir() / "pretrain"), "--config-name", "sparseformer_dn_s"]
    assert f"common.user_dir={plugin_dir()}" in words and words[5:8] == [*DATA, "optim=scaled_adam"]


def test_a_preset_whose_configuration_has_another_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "conformer-debug", *DATA, "--dry-run"]) == 0
    assert line(capsys)[4] == "debug"


def test_keys_that_fairseq_has_and_the_configuration_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fairseq")
    assert main(["train", "debug", *DATA, "common.bf16=true", "distributed_training.distributed_port=29500", "--dry-run"]) == 0
    assert line(capsys)[-3:-1] == ["common.bf16=true", "distributed_training.distributed_port=29500"]
    assert main(["train", "debug", *DATA, "common.bf61=true", "--dry-run"]) == 2
    assert "common.bf61" in capsys.readouterr().err


def test_a_plug_in_of_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", *DATA, "common.user_dir=mine", "--dry-run"]) == 0
    assert [word for word in line(capsys) if word.startswith("common.user_dir=")] == ["common.user_dir=mine"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sparseformer-debg", *DATA], "did you mean 'sparseformer_debug'?"),
        (["debug"], "debug needs task.data=... task.label_dir=..."),
        (["debug", *DATA, "optm=adam"], "did you mean 'optim'?"),
        (["debug", *DATA, "model.encoder_layer=3"], "did you mean 'model.encoder_layers'?"),
        (["debug", *DATA, "model._name=hubert_conformr"], "unknown model._name 'hubert_conformr' - did you mean 'hubert_conformer'?"),
        (["debug", *DATA, "model._name=hubert_mixer"], "HUBERT_EFF_IMPORT=MODULE"),
        (["finetune/debug", "task.data=data", "model.w2v_path=x.pt", "model._name=hubert_eff_ct"], "did you mean 'hubert_eff_ctc'?"),
    ],
)
def test_a_wrong_start_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_half_precision_without_a_gpu_is_refused_before_fairseq_starts(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("hubert_eff.commands.train.os.execve", lambda *_: pytest.fail("fairseq was started"))
    assert main(["train", "conformer_s", *DATA]) == 2
    assert "common.fp16=true needs a GPU" in capsys.readouterr().err


def test_an_unknown_model_of_a_printed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "debug", "model._name=hubert_mixer"]) == 2
    assert "unknown model._name 'hubert_mixer'" in capsys.readouterr().err
    assert main(["config", "debug", "model._name=hubert_mixer", "common.user_dir=mine"]) == 0  # which may register it


@pytest.mark.parametrize(
    ("arguments", "said"), [(["trainx"], "did you mean train?"), (["train", "debug", "--dry-rum"], "did you mean --dry-run?")]
)
def test_nearest_command_and_option(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-name", "sparseformer-debg"], "did you mean 'sparseformer_debug'?"),
        (["--config-name", "debug", *DATA], "hubert-eff train"),
        (["--config-name", "debug", *DATA, "optm=adam"], "did you mean 'optim'?"),
    ],
)
def test_fairseq_hydra_train_started_wrong_is_one_line(words: list[str], said: str) -> None:
    pytest.importorskip("fairseq")
    command = [sys.executable, "-W", "ignore", "-m", "fairseq_cli.hydra_train", "--config-dir", str(config_dir() / "pretrain"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "conformer-d*", "sparseformer-debug", "--json"]) == 0
    small, sparse = json.loads(capsys.readouterr().out)
    assert small["preset"] == "conformer-debug" and small["parameters"] == 192_832 and "pretrain/debug" in small["configurations"]
    export(hubert_eff.build("conformer-debug+w1a1"), tmp_path / "model.safetensors")
    assert small["one_bit_mb"] * 1e6 == file_storage(hubert_eff.load(tmp_path / "model.safetensors"))
    assert sparse["preset"] == "sparseformer-debug" and 0 < sparse["one_bit_mb"] < sparse["mb"]
    assert main(["list", "sparseformer-debug"]) == 0
    assert "pretrain/sparseformer_debug" in capsys.readouterr().out
    assert main(["list", "nothing-*"]) == 2
    assert "no preset is named nothing-*" in capsys.readouterr().err


def test_a_console_that_can_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))  # seconds: one line of figures in three is due
    monkeypatch.setattr("hubert_eff.reports.console.time.monotonic", lambda: float(next(clock)))
    handler = Console(sys.stdout)

    def log(name: str, message: object, level: int = logging.INFO) -> None:
        handler.handle(logging.LogRecord(name, level, "", 0, message, (), None))

    log("fairseq_cli.train", {"optimization": {"max_update": 750}})
    log("fairseq_cli.train", "FairseqHubertConformer(\n  (layers) ...")
    log("fairseq_cli.train", "num. shared model params: 196,288 (num. trained: 196,288)")
    for update in range(3, 33, 3):
        log("train", f"epoch 001 | loss 6.09 | correct_m_0 0.2 | majority_m_0 0.08 | num_updates {update} | lr 1e-05")
    log("valid", "epoch 010 | valid on 'valid' subset | loss 5.7 | correct_m_0 0.07 | majority_m_0 0.25 | num_updates 30 | best_loss 5.7")
    log("fairseq_plugins.data.checks", "a file\nis missing", logging.WARNING)
    log("fairseq_cli.train", "done training in 96.8 seconds")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "196,288 parameters" and lines[-1] == "done training in 96.8 seconds"
    assert lines[-2] == "warning: a file\\nis missing"
    assert lines[-3].startswith("valid at update 30, loss 5.7, masked accuracy 7.0% (most frequent label 25.0%), no better than")
    figures = lines[1:-3]
    assert 1 < len(figures) < 8 and all("of 750" in text and "masked accuracy 20.0%" in text for text in figures)
    assert " left" in figures[-1]
