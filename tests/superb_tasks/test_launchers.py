"""The two launchers: what they refuse and say, and (long) both of S3PRL's routes from data to test accuracy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hubert_eff
from hubert_eff.exporting.safetensors import export
from superb_tasks import main as superb_main
from superb_tasks import run_downstream
from superb_tasks.data.generators.speech_commands import folders, make_keywords

from ..helpers.paths import ROOT  # noqa: E402

pytest.importorskip("s3prl")
DATARC = "config.downstream_expert.datarc"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("keywords")
    make_keywords(out, per_word=8, speakers=6)
    return out


def superb_ks(data: Path, *more: str) -> list[str]:
    root, test_root = folders(data)
    return ["SuperbKS", "--build_upstream.name", "hubert_eff", "--prepare_data.gsc1", str(root),
            "--prepare_data.gsc1_test", str(test_root), *more]  # fmt: skip


def speech_commands(data: Path, *more: str, **runner: int) -> list[str]:
    root, test_root = folders(data)
    override = [f"{DATARC}.speech_commands_root={root}", f"{DATARC}.speech_commands_test_root='{test_root}'"]
    override += [f"config.runner.{key}={value}" for key, value in runner.items()]
    return ["-m", "train", "-u", "hubert_eff", "-d", "speech_commands", "-o", ",,".join(override), *more]


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of an error, after exit code 2."""
    assert code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("module", ["main", "run_downstream"])
def test_missing_data_is_named_before_anything_heavy_is_imported(module, tmp_path):
    arguments = {
        "main": superb_ks(tmp_path, "--target_dir", str(tmp_path / "out")),
        "run_downstream": speech_commands(tmp_path, "-p", str(tmp_path / "out")),
    }[module]
    code = (
        f"import sys; from superb_tasks.{module} import main; code = main({arguments!r})\n"
        "assert not {'torch', 's3prl', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    result = python("-c", code, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"superb_tasks\.\w+: .*: no folder at '.*speech_commands_v0\.01'\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_main_refuses_in_one_line(data, tmp_path, capsys):
    target = ("--target_dir", str(tmp_path / "out"))
    junk = tmp_path / "model.pt"
    junk.write_bytes(b"junk")
    assert "name the problem first" in refused(capsys, superb_main.main([]))
    assert "--prepare_data.gsc1 DIR" in refused(capsys, superb_main.main(["SuperbKS", *target]))
    assert "no upstream given" in refused(capsys, superb_main.main(superb_ks(data, *target)))
    source = "--build_upstream.path_or_url"
    assert "is not a checkpoint" in refused(capsys, superb_main.main(superb_ks(data, *target, source, str(junk))))
    assert "conformer-debug" in refused(capsys, superb_main.main(superb_ks(data, *target, source, "conformer-bug")))
    assert "absent.yaml" in refused(capsys, superb_main.main(superb_ks(data, *target, "--config", "absent.yaml")))
    assert "did you mean 'SuperbKS'" in refused(capsys, superb_main.main(["SuperbKW"]))
    assert not (tmp_path / "out").exists()


def test_settings_may_stand_in_a_yaml_file(data, tmp_path, capsys):
    root, _ = folders(data)
    config = tmp_path / "ks.yaml"
    config.write_text(yaml.safe_dump({"prepare_data": {"gsc1": str(root), "gsc1_test": str(tmp_path / "absent")}}))
    message = refused(capsys, superb_main.main(["SuperbKS", "--config", str(config)]))
    assert "--prepare_data.gsc1_test: no folder" in message


def test_run_downstream_refuses_in_one_line(data, tmp_path, capsys):
    target = ("-p", str(tmp_path / "out"))
    junk = tmp_path / "states-1.ckpt"
    junk.write_bytes(b"junk")

    def message(*arguments: str) -> str:
        return refused(capsys, run_downstream.main(arguments))

    assert "speech_commands_v0.01" in message("-m", "train", "-u", "hubert_eff", "-k", "x", "-d", "speech_commands", *target)
    assert "did you mean 'speech_commands'" in message("-m", "train", "-u", "hubert_eff", "-d", "speech_comands", *target)
    assert "no checkpoint at" in message(*speech_commands(data, "-k", "absent/model.pt", *target))
    assert "no such experiment" in message("-m", "evaluate", "-e", str(tmp_path / "absent.ckpt"))
    assert "is not a checkpoint of run_downstream" in message("-m", "evaluate", "-e", str(junk))
    assert "is not a checkpoint of run_downstream" in message("-m", "evaluate", "-e", str(tmp_path))
    junk.unlink()
    assert "holds no states-*.ckpt" in message("-m", "evaluate", "-e", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_default_config_has_the_settings_of_superb():
    config = yaml.safe_load((run_downstream.CONFIGS / "speech_commands.yaml").read_text())
    assert config["runner"]["total_steps"] == 200_000
    assert config["optimizer"] == {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-4}
    expert = config["downstream_expert"]
    assert expert["datarc"]["batch_size"] == 32
    assert expert["modelrc"] == {"projector_dim": 256, "select": "UtteranceLevel", "UtteranceLevel": {"pooling": "MeanPooling"}}


@pytest.mark.long
def test_superb_ks_from_data_to_accuracy(data, tmp_path):
    arguments = superb_ks(data, "--build_upstream.path_or_url", "conformer-debug", "--target_dir", str(tmp_path / "out"),
                          "--cache_dir", str(tmp_path / "cache"), "--num_workers", "0", "--train.total_steps", "4",
                          "--train.eval_step", "2", "--train.save_step", "2")  # fmt: skip
    log = python("-m", "superb_tasks.main", *arguments).stderr
    metrics = yaml.safe_load((tmp_path / "out" / "evaluate" / "valid_best" / "test" / "result.yaml").read_text())
    assert 0 <= metrics["accuracy"] <= 1
    assert f"'accuracy': {metrics['accuracy']}" in log
    assert "deprecated" not in log


@pytest.mark.long
def test_run_downstream_from_data_to_accuracy(data, tmp_path):
    export(hubert_eff.build("conformer-debug"), tmp_path / "model.safetensors")
    steps = {"total_steps": 4, "eval_step": 2, "save_step": 2, "log_step": 2}
    trained = python("-m", "superb_tasks.run_downstream", "-k", str(tmp_path / "model.safetensors"), "-p", str(tmp_path / "out"),
                     *speech_commands(data, **steps))  # fmt: skip
    accuracies = re.findall(r"test acc: (\S+)", trained.stdout)
    assert len(accuracies) == 2
    tested = python("-m", "superb_tasks.run_downstream", "-m", "evaluate", "-e", str(tmp_path / "out"))  # states-4.ckpt
    assert re.findall(r"test acc: (\S+)", tested.stdout) == accuracies[-1:]
