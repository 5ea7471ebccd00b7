"""Copies, checkpoints that are damaged, and signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.file_io import PathManager  # noqa: E402

import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.runtime import stopping  # noqa: E402

# -- patches -------------------------------------------------------------------------------------------------------------


def test_a_copy_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_text("new"), target.write_text("old")

    def killed(src: Any, dst: Any) -> None:
        Path(dst).write_bytes(b"n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.link", mock.Mock(side_effect=OSError))  # where the file system has no links
        patched.setattr("shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_text() == "old"
    assert PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_text() == "new" and not list(tmp_path.glob("*.tmp*"))


BAD_CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "text": (lambda p: p.write_text("no checkpoint\n"), "is not a checkpoint"),
    "empty": (lambda p: p.write_bytes(b""), "is not a checkpoint"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "is not a checkpoint"),
    "other zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "is not a checkpoint"),
    "tensor": (lambda p: torch.save(torch.zeros(3), p), "is not a checkpoint"),
    "other content": (lambda p: torch.save({"weights": {"a": torch.zeros(3)}}, p), "is not a checkpoint"),
    "truncated": (lambda p: (torch.save({"model": torch.zeros(9999)}, p), p.write_bytes(p.read_bytes()[:9999])), "is truncated"),
    "pickled code": (lambda p: torch.save({"model": os.getcwd}, p), "holds pickled code"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    write, message = BAD_CHECKPOINTS[case]
    write(tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match=f"checkpoint_last.pt .*{message}.*checkpoint.restore_file=FILE") as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_missing_or_unreadable_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "absent.pt"))


def _asked_by(number: int, answers: Any) -> None:
    stopping.listen()
    before = stopping.requested()
    os.kill(os.getpid(), number)
    answers.put((before, stopping.requested()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])  # SIGINT is how a spawned rank sees the death of its parent
def test_signals_only_ask_for_a_stop(number: int) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_asked_by, args=(number, answers))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and answers.get() == (0, number)
