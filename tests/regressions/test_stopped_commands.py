"""SIGINT and SIGTERM: tracebacks from imports, libraries and worker processes; files of hundreds of MB were left of a `run`."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from hubert_eff import cli
from hubert_eff.models.hubert import HubertModel
from hubert_eff.utils.signals import STEP, held
from hubert_eff.utils.workers import in_order
from superb_tasks.running.launch import exit_code

SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As of a program in the foreground: one that a shell starts in the background ignores SIGINT."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


def stop(number: int = signal.SIGINT) -> int:
    os.kill(os.getpid(), number)
    return 0


def swallow() -> None:
    """As libraries do whose own code is interrupted."""
    try:
        stop()
    except KeyboardInterrupt:
        raise ImportError("a library was interrupted") from None


def from_c() -> int:
    called = []
    with held():
        ctypes.CFUNCTYPE(ctypes.c_int)(lambda: called.append(stop()) or len(called))()
        assert called  # the callback was not broken off
    return 0


def given(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    monkeypatch.setattr(cli, "_module", lambda _: SimpleNamespace(add_arguments=lambda _: None, run=lambda _: run() or 0))


@pytest.mark.parametrize("number", SIGNALS)
def test_one_line_and_the_exit_code(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, word = SIGNALS[signal.Signals(number)]
    given(monkeypatch, lambda: stop(number))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"hubert-eff doctor: {word}\n"
    monkeypatch.setenv(STEP, "1")  # the command that runs this one says it
    assert cli.main(["doctor"]) == code and capsys.readouterr().err == ""


def test_launchers_of_s3prl(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("launcher", lambda _: stop(signal.SIGTERM), []) == 143
    assert capsys.readouterr().err == "launcher: terminated\n"


@pytest.mark.parametrize("run", [swallow, from_c], ids=["a library fails of it", "a callback from C"])
def test_whatever_becomes_of_the_interrupt(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    given(monkeypatch, run)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "hubert-eff doctor: interrupted\n"


def test_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_module", lambda _: swallow())
    assert cli.main(["run", "--help"]) == 130
    assert capsys.readouterr().err == "hubert-eff run: interrupted\n"


@pytest.mark.parametrize("seconds", [0.5, 21], ids=["in one piece", "in windows"])
def test_nothing_is_left_of_a_run(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(round(16_000 * seconds), 0.1), 16_000)
    calls, states = [], HubertModel.hidden_states

    def stopped(*arguments: object) -> object:
        calls.append(len(os.listdir(tmp_path)))
        if len(calls) == 2 or seconds < 20:
            stop(signal.SIGTERM)
        return states(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(HubertModel, "hidden_states", stopped)
    words = ["transformer-debug", str(tmp_path / "a.wav"), "--out", str(tmp_path / "f.npz"), "--window", "20"]
    assert cli.main(["run", *words]) == 143
    assert calls and os.listdir(tmp_path) == ["a.wav"]


def test_worker_processes_leave_an_interrupt_to_the_command() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        [blocked] = in_order(pool, partial(signal.pthread_sigmask, signal.SIG_BLOCK), [[]], 1)
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_messages_do_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "transformer-debug", "a\x1b[2J\n\udcff\u202e.wav", "--out", "f.npz"]) == 2
    assert cli.main(["run", "\x1b]0;title\x07\n"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and all(c.isprintable() or c == "\n" for c in said) and "a\\x1b[2J\\n\\udcff\\u202e.wav" in said
