"""Running SUPERB's tasks: what is refused before work starts, S3PRL's checkpoints, and (long) all ten from data to result."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml

import hubert_eff
from hubert_eff.cli import main as cli
from hubert_eff.errors import UserError
from hubert_eff.exporting.safetensors import export
from superb_tasks import register, run_downstream
from superb_tasks.data import layouts
from superb_tasks.data.prepare import prepare
from superb_tasks.results import significance
from superb_tasks.running import runner
from superb_tasks.running.runner import Request, settings_of
from superb_tasks.running.settings import of_upstream
from superb_tasks.tasks import TASKS

pytest.importorskip("s3prl")
pytest.importorskip("espeakng_loader")


@pytest.fixture
def data(superb_data) -> Path:
    return superb_data


def command(data: Path, out: Path, *arguments: object) -> list[str]:
    return ["superb", "run", *map(str, ("--data", data, "--out", out, "--small", "--device", "cpu", "--json", *arguments))]


def superb(data: Path, out: Path, *arguments: object) -> list[dict]:
    """The results of a run on the CPU, in this process: importing S3PRL takes longer than three steps."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli(command(data, out, *arguments)) == 0
    return json.loads(printed.getvalue())["results"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error, after exit code 2."""
    assert cli(["superb", "run", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_bad_input_is_refused_before_work_starts(data, tmp_path, capsys):
    given = ("--task", "ks", "--data", data, "--out", tmp_path / "out", "--upstream")
    junk = tmp_path / "model.pt"
    junk.write_bytes(b"junk")
    assert "did you mean 'conformer-debug'" in refused(capsys, *given, "conformer-debu")
    assert "is not a checkpoint" in refused(capsys, *given, junk)
    assert "no checkpoint at" in refused(capsys, *given, "absent/model.pt")
    assert "one step or more" in refused(capsys, *given, "conformer-debug", "--steps", 0)
    assert "above zero" in refused(capsys, *given, "conformer-debug", "--lr", -1)
    assert "leave out --lr" in refused(capsys, *given, "conformer-debug", "--lr", 1, "--lr-sweep")
    assert "--device tpu9" in refused(capsys, *given, "conformer-debug", "--device", "tpu9")
    assert "unknown SUPERB task 'kws'" in refused(capsys, *given, "conformer-debug", "--task", "kws")
    assert "no folder at" in refused(capsys, *given, "conformer-debug", "--data", tmp_path / "absent")
    assert "S3PRL has no upstream 'fbnk': did you mean fbank" in refused(capsys, *given, "s3prl:fbnk")
    assert "did you mean s3prl:fbank?" in refused(capsys, *given, "fbank")
    assert "did you mean s3prl:hubert_base?" in refused(capsys, *given, "hubert_base")
    torch.save({"cfg": {"model": {"_name": "hubert"}, "task": {"sample_rate": 8000}}, "model": {}}, junk)
    assert "trained on audio of 8000 Hz" in refused(capsys, *given, junk)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "ks").mkdir(parents=True)
    (tmp_path / "out" / "ks" / "notes.txt").touch()
    assert "holds other files" in refused(capsys, *given, "conformer-debug")
    assert [file.name for file in (tmp_path / "out" / "ks").iterdir()] == ["notes.txt"]


def test_a_missing_bridge_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "superb_tasks.tasks", None)
    assert cli(["superb", "list"]) == 2
    assert "pip install 'hubert-eff[superb]'" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "every"), [(300, 75), (3, 1), (7, 7), (10, 5)])
def test_validation_falls_on_the_last_step(steps, every):
    settings = settings_of(TASKS["ks"], Request("conformer-debug", Path(), steps=steps, device="cpu"))
    assert settings["runner"]["total_steps"] == steps
    assert {settings["runner"][key] for key in ("eval_step", "save_step", "log_step")} == {every}
    assert settings["runner"]["eval_dataloaders"] == ["dev"]
    assert settings["downstream_expert"]["datarc"]["num_workers"] == 0


def test_small_runs_are_short_unless_told_otherwise():
    request = Request("conformer-debug", Path(), small=True, device="cpu")
    runners = {name: settings_of(task, request)["runner"] for name, task in TASKS.items()}
    steps = {name: runner.get("total_steps", 0) for name, runner in runners.items()}
    assert steps["qbe"] == 0 and all(80 <= count <= 400 for name, count in steps.items() if name != "qbe")
    told = settings_of(TASKS["er"], Request("conformer-debug", Path(), steps=12, small=True, device="cpu"))
    assert told["runner"]["total_steps"] == 12 and told["runner"]["eval_step"] == 3


def test_superbs_own_steps_and_rate_are_the_default():
    settings = settings_of(TASKS["asr"], Request("conformer-debug", Path(), device="cuda"))
    assert settings == {**TASKS["asr"].settings(), "runner": {**TASKS["asr"].settings()["runner"], "eval_dataloaders": ["dev-clean"]}}


@pytest.mark.parametrize("name", TASKS)
def test_every_path_of_the_settings_exists(data, tmp_path, name):
    config = prepare(TASKS[name], TASKS[name].settings(), data, tmp_path / "prepared")
    text = yaml.safe_dump(config, width=1000)
    paths = [Path(word.strip("'\"")) for word in text.split() if "/" in word]
    assert paths and all(path.is_absolute() and path.exists() for path in paths)


def test_sessions_are_folds_without_a_shared_voice(data, tmp_path):
    prepare(TASKS["er"], TASKS["er"].settings(), data, tmp_path / "Session9")  # a folder above may be named like a session
    for session in layouts.SESSIONS:
        lists = {
            split: json.loads((tmp_path / "Session9" / session / f"{split}_meta_data.json").read_text())["meta_data"]
            for split in ("train", "test")
        }
        assert {entry["path"].split("/")[0] for entry in lists["test"]} == {session}
        assert session not in {entry["path"].split("/")[0] for entry in lists["train"]}
        assert all((data / "IEMOCAP" / entry["path"]).is_file() for split in lists.values() for entry in split)


def test_a_cut_off_checkpoint_is_passed_over(tmp_path):
    torch.save({"Step": 1}, tmp_path / "states-1.ckpt")
    torch.save({"Step": 10}, tmp_path / "states-10.ckpt")
    (tmp_path / "states-11.ckpt").write_bytes((tmp_path / "states-10.ckpt").read_bytes()[:50])
    found = runner._checkpoints(tmp_path)
    assert [file.name for file in found] == ["states-1.ckpt", "states-10.ckpt", "states-11.ckpt"]
    assert [runner._readable(file) for file in found] == [True, True, False]


def test_phonemes_in_three_steps(data, tmp_path):
    """One task in everyday tests, the rest in the long one: it constructs, trains three steps, evaluates, and is not repeated."""
    export(hubert_eff.build("conformer-debug"), tmp_path / "model.safetensors")
    arguments = ("--task", "pr", "--upstream", tmp_path / "model.safetensors", "--steps", 3)
    [result] = superb(data, tmp_path / "out", *arguments)
    assert result["task"] == "pr" and result["steps"] == 3 and result["learning_rate"] == 1e-2 and 0 < result["per"] <= 2
    assert result["sha256"] and set(result["versions"]) >= {"torch", "s3prl", "hubert-eff"}
    assert result == json.loads((tmp_path / "out" / "pr" / "result.json").read_text())
    assert (tmp_path / "out" / "pr" / result["checkpoints"][0]).is_file()
    assert not result["superb_settings"]  # on generated data, with fewer steps
    rows = json.loads((tmp_path / "out" / "pr" / "utterances.json").read_text())
    assert sum(row[1] for row in rows) / sum(row[2] for row in rows) == pytest.approx(result["per"])
    # done, so it is read: in this process, which has no time to train
    [again] = runner.run_tasks("pr", Request(str(tmp_path / "model.safetensors"), data, 3, small=True, device="cpu"), tmp_path / "out")
    assert again == result


@pytest.mark.long
def test_every_task_constructs_trains_three_steps_and_evaluates(data, tmp_path):
    run = superb(data, tmp_path / "out", "--task", "all", "--upstream", "conformer-debug", "--steps", 3)
    results = {result["task"]: result for result in run}
    assert list(results) == list(TASKS)
    for name, result in results.items():
        assert result["upstream"] == "conformer-debug" and result["data_sha256"]
        assert 0 <= result[TASKS[name].key] <= 2
        assert (tmp_path / "out" / name / "result.json").is_file()
    assert len(results["er"]["folds"]) == 5 and results["er"]["accuracy"] == pytest.approx(np.mean(results["er"]["folds"]))
    assert results["asv"]["chosen_on"] == "test" and results["qbe"]["layer"] in (0, 1, 2)
    assert (tmp_path / "out" / "asv" / "lr-0.001" / "test_predict.txt").is_file()
    for name, result in results.items():  # utterance by utterance it is the same figure
        if name != "qbe":
            rows = json.loads((tmp_path / "out" / name / "utterances.json").read_text())
            # S3PRL interpolates the rate at which misses and false alarms are equally many, and takes the mean over folds
            tolerance = {"asv": 0.02, "er": 0.05}.get(name, 1e-6)
            assert significance.figure(name, rows) == pytest.approx(result[TASKS[name].key], abs=tolerance), name
    # the scored turns are those of S3PRL's own count of frames, here the lowest over thresholds
    assert results["sd"]["der"] < results["sd"]["frame_der"] + 0.1
    assert list((tmp_path / "out" / "sd" / "lr-0.01" / "scoring" / "predictions").glob("*.h5"))


@pytest.mark.long
def test_s3prls_own_features_are_upstreams_too(data, tmp_path):
    results = superb(data, tmp_path / "out", "--task", "ks,qbe", "--upstream", "s3prl:mfcc", "--steps", 3, "--cache", tmp_path / "cache")
    assert [(result["upstream"], result["cache"]) for result in results] == [("s3prl:mfcc", False)] * 2
    assert 0 <= results[0]["accuracy"] <= 1 and results[1]["layer"] == 0


class Published(torch.nn.Module):
    """An upstream as S3PRL's hub builds those that it downloads."""

    def __init__(self, ckpt=None, model_config=None, refresh=False):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def get_downsample_rates(self, key):
        return 320

    def forward(self, wavs):
        frames = torch.nn.utils.rnn.pad_sequence([wav[: len(wav) // 320 * 320].view(-1, 320)[:, :8] for wav in wavs], batch_first=True)
        return {"hidden_states": [frames * self.scale, frames + self.scale]}


def test_a_published_model_of_s3prl_is_an_upstream(monkeypatch, capsys):
    register()
    from s3prl import hub

    def unreachable():
        raise OSError("no network")

    monkeypatch.setattr(hub, "toy", Published, raising=False)
    monkeypatch.setattr(hub, "away", unreachable, raising=False)
    assert of_upstream("s3prl:toy")["code"].startswith("s3prl:toy of s3prl ") and len(runner._states("s3prl:toy")) == 2
    with pytest.raises(UserError, match=r"S3PRL cannot build s3prl:away \(OSError: no network\): its weights must be in .*s3prl/download"):
        of_upstream("s3prl:away")


@pytest.mark.long
def test_a_published_model_of_s3prl_runs(data, tmp_path, monkeypatch):
    register()
    from s3prl import hub

    monkeypatch.setattr(hub, "toy", Published, raising=False)
    results = superb(data, tmp_path / "out", "--task", "ks", "qbe", "--upstream", "s3prl:toy", "--steps", 3)
    assert 0 <= results[0]["accuracy"] <= 1 and len(results[1]["tried"]) == 2


@pytest.mark.long
def test_the_sweep_takes_the_rate_that_validates_best(data, tmp_path):
    [result] = superb(data, tmp_path / "out", "--task", "sid", "--upstream", "conformer-debug@3", "--steps", 2, "--lr-sweep")
    assert set(result["tried"]) == {"0.1", "0.01", "0.001", "0.0001", "1e-05", "1e-06", "1e-07"}
    assert result["tried"][f"{result['learning_rate']:g}"] == max(result["tried"].values())
    assert result["chosen_on"] == "validation" and f"lr-{result['learning_rate']:g}" in result["checkpoints"][0]


@pytest.mark.long
def test_a_killed_run_goes_on_and_results_repeat(data, tmp_path):
    arguments = ("--task", "ks", "--upstream", "conformer-debug", "--steps", 24)
    [first] = superb(data, tmp_path / "a", *arguments)
    [second] = superb(data, tmp_path / "b", *arguments)
    assert first == second
    process = subprocess.Popen(
        [sys.executable, "-m", "hubert_eff.cli", *command(data, tmp_path / "c", *arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = tmp_path / "c" / "ks" / "lr-0.01"
    while process.poll() is None and not list(folder.glob("states-*.ckpt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c" / "ks" / "result.json").exists()
    [third] = superb(data, tmp_path / "c", *arguments)
    assert all(third[key] == first[key] for key in ("steps", "utterances", "chance", "data_sha256"))
    # other settings begin anew
    [fourth] = superb(data, tmp_path / "c", "--task", "ks", "--upstream", "conformer-debug", "--steps", 4)
    assert fourth["steps"] == 4 and not (folder / "states-24.ckpt").exists()


def test_a_stopped_run_says_how_it_resumes(data, tmp_path, monkeypatch, capsys):
    def stopped(task, request, settings, place):
        (place / "lr-0.01").mkdir(parents=True)
        torch.save({"Step": 8}, place / "lr-0.01" / "states-8.ckpt")
        (place / "lr-0.01" / "states-9.ckpt").write_bytes(b"cut off")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_task", stopped)
    assert cli(command(data, tmp_path / "out", "--task", "ks", "--upstream", "conformer-debug")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "hubert-eff superb: interrupted; the same command resumes ks from ks/lr-0.01/states-8.ckpt"


@pytest.mark.long
def test_the_head_learns_what_the_features_hold(data, tmp_path):
    """Even an untrained extractor tells tones apart: each keyword is a tone here."""
    from superb_tasks.data.generators.speech_commands import KEYWORDS, folders

    shutil.copytree(data, tmp_path / "tones")
    rng = np.random.default_rng(0)
    for folder in folders(tmp_path / "tones"):
        for file in sorted(folder.glob("[a-z]*/*.wav")) + sorted(folder.glob("_unknown_/*.wav")):
            word = file.parent.name
            hertz = 200 * 1.4 ** KEYWORDS.index(word) if word in KEYWORDS else rng.uniform(6500, 7500)
            tone = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000 + rng.uniform(0, 6))
            sf.write(file, 0.3 * tone + 0.01 * rng.standard_normal(16000), 16000)
    [result] = superb(tmp_path / "tones", tmp_path / "out", "--task", "ks", "--upstream", "conformer-debug", "--steps", 100)
    assert result["accuracy"] > 0.8 > 2 * result["chance"]


@pytest.mark.long
def test_an_experiment_goes_on_in_run_downstream(data, tmp_path, capsys):
    """What the runner wrote is a plain experiment of S3PRL's."""
    [result] = superb(data, tmp_path / "out", "--task", "sid", "--upstream", "conformer-debug", "--steps", 4)
    capsys.readouterr()
    assert run_downstream.main(["-m", "evaluate", "-e", str(tmp_path / "out" / "sid" / result["checkpoints"][0]), "--device", "cpu"]) == 0
    assert f"test acc: {result['accuracy']}" in capsys.readouterr().out


def test_user_errors_of_a_request():
    for arguments in ({"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"learning_rate": 1.0, "sweep": True}):
        with pytest.raises(UserError):
            Request("conformer-debug", Path(), **arguments)


@pytest.mark.long
def test_a_cache_gives_the_figures_of_a_run_without(data, tmp_path):
    arguments = ("--upstream", "conformer-debug", "--steps", 4)
    [plain] = superb(data, tmp_path / "a", "--task", "pr", *arguments)
    for out in ("b", "c"):
        [cached] = superb(data, tmp_path / out, "--task", "pr", *arguments, "--cache", tmp_path / "cache")
        assert cached["cache"] and cached["loss"] == pytest.approx(plain["loss"], rel=1e-2)
    [folder] = (tmp_path / "cache").glob("*/*")
    assert folder.name.startswith("LibriSpeech-") and list(folder.rglob("*.npy"))


def test_a_log_gets_lines_in_place_of_bars(monkeypatch, capsys):
    pytest.importorskip("s3prl")
    from s3prl.downstream import runner

    from superb_tasks.running import progress

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    bars = runner.tqdm
    with progress.lines_for_bars(runner):
        bar = runner.tqdm(total=3, desc="overall", dynamic_ncols=True, file=sys.stderr, mininterval=0)
        for _ in runner.tqdm([1, 2, 3], desc="train", file=sys.stderr, mininterval=0):
            bar.update(1)  # S3PRL counts its updates by the bar
        assert bar.n == 3
        bar.close()
    assert runner.tqdm is bars
    said = capsys.readouterr().err
    assert [line.partition(",")[0] for line in said.splitlines()] == ["-- update 1 of 3", "-- update 2 of 3"]
    assert "\r" not in said
