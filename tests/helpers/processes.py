"""`fairseq-hydra-train` in processes forked from one that has imported fairseq: its imports take longer than most of the runs in tests.

A run is otherwise as from a shell: the command's own entry point, a process group, an exit code, signals and outputs of its own. The
plug-in is not imported in advance. The README's commands, the demo and the recipes start the program itself.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context, set_start_method
from pathlib import Path
from subprocess import CompletedProcess

import torch

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["torch._dynamo", "fairseq_cli.hydra_train"])


def _train(arguments: Sequence[str], files: Sequence[Path]) -> None:
    from fairseq_cli.hydra_train import cli_main

    os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # not that of this process
    sys.argv = ["fairseq-hydra-train", *arguments]
    cli_main()


class Training:
    """A run that has been started. Its outputs lie in files, so that it never waits for a reader."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._process = _forks.Process(target=_train, args=(arguments, self._files))
        self._process.start()

    def wait_for(self, seen: Callable[[str], object], timeout: float = 300) -> None:
        """Wait until a line of stdout is what is waited for."""
        end = time.monotonic() + timeout
        while self._process.is_alive() and time.monotonic() < end:
            lines = self._files[0].read_text(encoding="utf-8").splitlines(keepends=True)
            if any(seen(line) for line in lines if line.endswith("\n")):
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError(self.end().stderr)

    def send(self, number: int, to_group: bool = False) -> None:
        """Send a signal to the process, or to all of its group."""
        assert self._process.pid is not None
        (os.killpg if to_group else os.kill)(self._process.pid, number)

    def kill(self) -> None:
        """Kill it with all that it started, as far as they are there."""
        if self._process.is_alive():
            self.send(signal.SIGKILL, to_group=True)

    def end(self, timeout: float = 300) -> CompletedProcess[str]:
        """Wait for its end; exit code (as of `subprocess`) and outputs."""
        self._process.join(timeout)
        late = self._process.is_alive()
        self.kill()
        self._process.join()
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        assert not late, f"no end after {timeout} s\n{out}\n{err}"
        assert self._process.exitcode is not None
        return CompletedProcess(self._process.name, self._process.exitcode, out, err)
