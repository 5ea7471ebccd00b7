"""`locks`: a folder is one process's at a time; the other is named; nothing waits for a process that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.recipes.binarize import Binarization
from hubert_eff.recipes.pretrain import Pretraining
from hubert_eff.utils import locks
from hubert_eff.utils.locks import Lock, locked

from ..helpers.paths import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from hubert_eff.utils.locks import Lock
lock = Lock(Path(sys.argv[1]))
if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives its parent
    os.close(0), os.close(1), os.close(2), time.sleep(60), os._exit(0)
print("held", flush=True)
time.sleep(60)
"""
NAME = ".hubert-eff.lock"


def hold(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Another process that has a folder."""
    words = [sys.executable, "-c", HOLD, str(folder), *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.wait()


def test_the_other_process_is_named(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error, locked(tmp_path / "run"):
        raise AssertionError
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'run'} is in use by process {other.pid} on ") and "\n" not in said
    assert " since 20" in said and f"(kill {other.pid})" in said
    with locked(tmp_path / "run", "rank-1"):  # another part of the work
        pass


def test_a_kill_frees_the_folder_at_once(other: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other.kill()
    other.wait()
    assert os.listdir(tmp_path / "run") == [NAME]
    with locked(tmp_path / "run") as lock:
        assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    assert not capsys.readouterr().err and not os.listdir(tmp_path / "run")


def test_a_child_does_not_hold_the_folder_of_a_parent_that_was_killed(tmp_path: Path) -> None:
    process = hold(tmp_path / "run", "with a child")
    try:
        process.kill()
        process.wait()
        until = time.monotonic() + 20  # the child closes what it was born with when it first runs
        while True:
            try:
                with locked(tmp_path / "run"):
                    break
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
    finally:
        os.killpg(process.pid, 9)


def test_in_one_process_too_and_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b") as lock:
        assert lock.in_place
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "), locked(tmp_path / "a" / "b"):
            raise AssertionError
        child = os.fork()
        if not child:
            lock.release()  # not its own
            os._exit(0)
        os.waitpid(child, 0)
        assert lock.file.is_file()
    assert not os.listdir(tmp_path)
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    assert os.listdir(tmp_path / "a") == ["result"]


def test_a_folder_that_is_moved_or_removed_is_noticed(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert not lock.in_place and lock.moved_to() == tmp_path / "moved"
    (tmp_path / "run").mkdir()  # another of that name
    assert not lock.in_place
    with locked(tmp_path / "run"):
        assert not lock.in_place
    lock.release()
    assert not os.listdir(tmp_path / "moved")
    lock = Lock(tmp_path / "run")
    lock.file.unlink()
    assert lock.in_place  # a lock file that is swept away is no reason to stop
    (tmp_path / "run").rmdir()
    assert not lock.in_place and lock.moved_to() is None
    lock.release()


def foreign(folder: Path, **changes: object) -> Path:
    """The lock file of a process on another machine."""
    folder.mkdir(exist_ok=True)
    file = folder / NAME
    entry = {"pid": 1, "host": "far\x1b[2J", "host_id": "0123abcd", "since": "2024-01-01 00:00:00", "command": "fairseq-hydra-train"}
    file.write_text(json.dumps({**entry, **changes}))
    return file


@pytest.mark.parametrize("kernel", [True, False], ids=["with the kernel's lock", "without"])
def test_another_machine_is_watched_rather_than_believed(
    kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "WATCH", 0.4)
    if not kernel:
        monkeypatch.setattr(locks, "fcntl", None)
    file = foreign(tmp_path)
    os.utime(file, (time.time() + 1e6,) * 2)  # its clock does not matter
    with locked(tmp_path):
        assert "was last used by process 1 on far?[2J since 2024" in capsys.readouterr().err
        time.sleep(0.3)
    file = foreign(tmp_path)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"or remove {file} if you are sure that it has ended"), locked(tmp_path):
            raise AssertionError
    finally:
        stop.set()
        thread.join()
    assert file.is_file()


def test_without_the_kernels_lock_a_process_of_this_machine_counts_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "WATCH", 0.5)
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
        raise AssertionError
    ended = subprocess.Popen(["true"])
    ended.wait()
    foreign(tmp_path, host_id=locks.host_id(), pid=ended.pid)
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 0.4  # nothing to wait for


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"pid": "x"}', b'{"pid": null, "host_id": []}', b"{}" * 9999])
def test_a_damaged_lock_file_stops_nobody(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "WATCH", 0.1)
    (tmp_path / NAME).write_bytes(content)
    with locked(tmp_path):
        pass
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be|is a file"), locked(folder):
            raise AssertionError


# -- the commands that write to a folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["labels", "data", "--features", "mfcc"], ""),
        (["labels", "data", "--features", "mfcc", "--nshard", "4", "--rank", "2"], "rank-2-of-4"),
        (["corpus", "superb"], ""),
        (["demo"], ""),
    ],
)
def test_a_command_leaves_the_folder_of_another_alone(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out", part):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"hubert-eff {words[0]}: {tmp_path / 'out'} is in use by process {os.getpid()} on ")
        assert os.listdir(tmp_path / "out") == [f".hubert-eff{'-' * bool(part)}{part}.lock"]
    assert not os.listdir(tmp_path)


def test_parts_of_the_same_labels_are_made_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path, "rank-0-of-4"):
        assert main(["labels", "none", "--features", "mfcc", "--nshard", "4", "--rank", "1", "--out", str(tmp_path)]) == 2
        assert "none is not a folder" in capsys.readouterr().err  # no word of the other job


def test_a_demo_corpus_appears_as_a_whole_and_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("espeakng_loader")
    inner: list[int] = []

    def second(*_: object) -> dict[str, object]:
        inner.append(main(["corpus", "demo", "--out", str(tmp_path / "corpus")]))
        inner.append(len(list(tmp_path.glob("corpus"))))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hubert_eff.data.synthetic.sentences._write", second)
        assert main(["corpus", "demo", "--out", str(tmp_path / "corpus")]) == 130
    said = capsys.readouterr().err.splitlines()
    assert inner == [2, 0] and f"is in use by process {os.getpid()}" in said[0] and said[1:] == ["hubert-eff corpus: interrupted"]
    assert not os.listdir(tmp_path)


def test_recipes_have_their_folder_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "speech").mkdir()
    monkeypatch.setattr(Pretraining, "check", lambda _self: None)
    monkeypatch.setattr(Binarization, "check", lambda _self: None)
    with locked(tmp_path / "out"):
        for recipe in (Pretraining(tmp_path / "speech", tmp_path / "out", "debug"), Binarization(tmp_path, tmp_path, tmp_path / "out")):
            with pytest.raises(UserError, match="is in use by process"):
                recipe.run()
        assert os.listdir(tmp_path / "out") == [NAME]


# -- stopped by a terminal -----------------------------------------------------------------------------------------------

STEP = """
import signal, sys, time
from hubert_eff import cli
from hubert_eff.recipes import base as steps
if sys.argv[1] == "child":
    signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(130)))
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored for what it starts in the background
steps.INTERRUPT_SECONDS = 0.5
module = type(sys)("step")
module.add_arguments = lambda parser: None
module.run = lambda args: steps.run_command(["python", "-c", open(sys.argv[2]).read(), "child"])
cli._module = lambda name: module
sys.exit(cli.main(["demo"]))
"""


@pytest.mark.parametrize("to_group", [True, False])
def test_a_step_that_is_interrupted_saves_and_one_line_says_so(to_group: bool, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(STEP)
    words = [sys.executable, "-c", STEP, "parent", str(tmp_path / "step.py")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines() == ["saved", "hubert-eff demo: interrupted"]
