"""A run's save_dir: its last checkpoint deleted, the folder moved or in use by another run; stopped by SIGINT at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hubert_eff.checkpoints.load import newest_checkpoint
from hubert_eff.errors import UserError
from hubert_eff.utils.locks import Lock

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import checkpoint_utils  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from fairseq_plugins.runtime import saving, stopping  # noqa: E402

from ..helpers.pretraining import logged, make_data, run, start, update_made  # noqa: E402


def checkpoint(file: Path, update: int, **more: Any) -> None:
    history = {"optimizer_history": [{"num_updates": update}], "extra_state": {"train_iterator": {"epoch": 1}}}
    torch.save({"model": {"w": torch.zeros(3)}, **history, **more}, file)


def test_the_newest_whole_checkpoint_is_found_under_whatever_name(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / "checkpoint_mean.pt")
    assert newest_checkpoint(tmp_path) is None  # no run can go on from it
    for name, update in (("checkpoint_1_8", 8), ("checkpoint_2_12", 12), ("checkpoint_best", 20), ("checkpoint3", 16)):
        checkpoint(tmp_path / f"{name}.pt", update)
    assert newest_checkpoint(tmp_path) == (20, tmp_path / "checkpoint_best.pt")
    (tmp_path / "checkpoint_best.pt").write_bytes((tmp_path / "checkpoint_best.pt").read_bytes()[:700])
    assert newest_checkpoint(tmp_path) == (16, tmp_path / "checkpoint3.pt")
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint_2_12.pt.*none of which can be read: move them away"):
        newest_checkpoint(tmp_path)


def test_a_run_without_its_last_checkpoint_goes_on_from_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, Any]] = []
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint", lambda cfg, *_: taken.append((cfg.restore_file, cfg.finetune_from_model)))
    saving.go_on_from_newest()
    trainer = SimpleNamespace(checkpoint_suffix="")

    def load(restore: str = "checkpoint_last.pt") -> tuple[str, Any]:
        values = {"save_dir": str(tmp_path), "restore_file": restore, "finetune_from_model": "start.pt"}
        checkpoint_utils.load_checkpoint(OmegaConf.create(values), trainer)
        return taken[-1]

    assert load() == ("checkpoint_last.pt", "start.pt")  # a first start
    checkpoint(tmp_path / "checkpoint_1_4.pt", 4)
    assert load() == (str(tmp_path / "checkpoint_1_4.pt"), None)
    checkpoint(tmp_path / "checkpoint_last.pt", 6)
    assert load() == ("checkpoint_last.pt", "start.pt")
    assert load(str(tmp_path / "checkpoint_1_4.pt"))[0] == str(tmp_path / "checkpoint_1_4.pt")
    with pytest.raises(UserError, match=r"checkpoint.restore_file=typo.pt is not there"):
        load("typo.pt")


def test_a_moved_save_dir_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(tmp_path / "run")
    saved = []
    monkeypatch.setattr(saving, "_lock", lock)
    monkeypatch.setattr(saving, "_saved", (-1, None))
    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", lambda *_: saved.append(1))
    saving.keep_save_dir()
    trainer = SimpleNamespace(get_num_updates=lambda: 7)
    checkpoint_utils.save_checkpoint(None, trainer, None, None)
    (tmp_path / "run").rename(tmp_path / "moved")
    for there, said in (("moved", f"was moved to {tmp_path / 'moved'}"), ("", "was removed")):
        if not there:
            shutil.rmtree(tmp_path / "moved")
        with pytest.raises(SystemExit) as ended:
            checkpoint_utils.save_checkpoint(None, trainer, None, None)
        line = capsys.readouterr().err
        assert ended.value.code == 1 and said in line and "stopped at update 7" in line and line.count("\n") == 1
    assert saved == [1] and not os.listdir(tmp_path)
    lock.release()


# -- SIGINT --------------------------------------------------------------------------------------------------------------


def interrupted(when: str, folder: Path) -> tuple[int, str, str]:
    """Exit code and outputs of a process that is sent SIGINT."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for number, name in enumerate(("out", "err"), start=1):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
            stopping.leave_on_interrupt()
            if when != "start-up":
                stopping.listen()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the terminal and a launcher
            worker = os.fork()
            if not worker:  # what loads data is still needed
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(0)
            if when == "twice":
                time.sleep(2 * stopping.AGAIN)
                os.kill(os.getpid(), signal.SIGINT)
            os.write(1, f"{os.waitpid(worker, 0)[1]} {stopping.requested()}".encode())
            code = 0
        except SystemExit as ended:
            code = int(str(ended.code))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, (folder / "out").read_text(), (folder / "err").read_text()


@pytest.mark.parametrize(
    ("when", "code", "printed", "said"),
    [
        ("start-up", 130, "", ["interrupted before the first update"]),
        ("training", 0, "0 2", ["interrupted: the run saves the current update and ends"]),
        ("twice", 130, "", ["interrupted: the run saves", "interrupted twice: left at once"]),
    ],
)
def test_sigint_is_one_line(when: str, code: int, printed: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", ModuleType("fairseq_cli.train"))  # a training run
    ended, out, err = interrupted(when, tmp_path)
    lines = err.splitlines()
    assert (ended, out) == (code, printed) and len(lines) == len(said), err
    assert all(line.startswith(f"fairseq-hydra-train: {start}") for line, start in zip(lines, said))


@pytest.mark.parametrize(("moment", "saves"), [("update", 1), ("validation", 1), ("save", 1), ("update, no_save", 0)])
def test_a_stop_saves_once_whenever_it_comes(
    moment: str, saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, saved = [0], []
    cfg = SimpleNamespace(checkpoint=None)
    trainer = SimpleNamespace(get_num_updates=lambda: 7, is_data_parallel_master=True)

    def save(*_: Any) -> str | None:
        saved.extend([1] * saves)
        return "run/checkpoint_last.pt" if saves else None

    def validate_and_save(cfg: Any, trainer: Any, *_: Any) -> None:
        if moment == "validation":
            asked[0] = signal.SIGINT
            raise stopping.StopRequested
        asked[0] = signal.SIGINT
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, None, None)

    training = ModuleType("fairseq_cli.train")
    training.validate_and_save = validate_and_save  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", training)
    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", save)
    monkeypatch.setattr(stopping, "requested", lambda: asked[0])
    monkeypatch.setattr(saving, "_saved", (-1, None))
    monkeypatch.setattr(saving, "_lock", None)
    saving.keep_save_dir()
    saving.save_on_signals()
    if moment.startswith("update"):
        asked[0] = signal.SIGINT
    with pytest.raises(SystemExit) as ended, caplog.at_level("INFO"):
        training.validate_and_save(cfg, trainer, None, None)  # type: ignore[attr-defined]
    assert ended.value.code == 130 and len(saved) == saves
    kept = "saved run/checkpoint_last.pt; the same command resumes from there" if saves else "saved nothing, as the checkpoint section asks"
    assert f"SIGINT at update 7: {kept}" in caplog.text


@pytest.mark.long
def test_runs_of_one_save_dir(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [0.8 + 0.1 * (i % 5) for i in range(12)], "valid": [1.0, 0.9]})
    args = (data, tmp_path / "run", "optimization.max_update=100000", "checkpoint.save_interval_updates=3")  # 4 updates per epoch
    first = start(*args)
    first.wait_for(update_made(5))
    pid = json.loads((tmp_path / "run" / ".hubert-eff.lock").read_text())["pid"]
    second = run(*args)
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("fairseq-hydra-train: ")]
    assert second.returncode == 2 and f"{tmp_path / 'run'} is in use by process {pid} on " in line
    assert "Traceback" not in second.stdout + second.stderr
    first.kill()  # SIGKILL: it goes on at once
    before = max(logged(first.end().stdout))
    (tmp_path / "run" / "checkpoint_last.pt").unlink()
    third = start(*args)
    third.wait_for(lambda line: "resuming from its newest checkpoint" in line)
    third.wait_for(lambda line: "[train_inner]" in line)
    (tmp_path / "run").rename(tmp_path / "moved")
    done = third.end()
    assert done.returncode == 1 and 3 < min(logged(done.stdout)) <= before + 1
    assert f"was moved to {tmp_path / 'moved'}" in done.stderr and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
    fourth = start(data, tmp_path / "moved", *args[2:])
    fourth.wait_for(lambda line: "[train_inner]" in line)
    fourth.send(signal.SIGINT, to_group=True)
    done = fourth.end()
    assert done.returncode == 130 and "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "SIGINT at update" in line]
    assert f"SIGINT at update {max(logged(done.stdout))}: saved {tmp_path / 'moved' / 'checkpoint_'}" in line
    assert not (tmp_path / "moved" / ".hubert-eff.lock").exists()
