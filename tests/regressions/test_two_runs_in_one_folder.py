"""`locks`: a folder is one process's at a time; the other is named; nothing waits for a process that is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubert_eff import locks
from hubert_eff.errors import UserError
from hubert_eff.locks import Lock, locked

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from hubert_eff.locks import Lock
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
        with locked(tmp_path / "run"):
            pass
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
        with pytest.raises(UserError, match=f"if it is sure to have ended, remove {file}"), locked(tmp_path):
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
