"""Recipes whose steps run side by side: rounds of chains of commands, as many chains at once as there are processes.

A round begins when the one before has ended; the steps of a chain run one after the other. As with every recipe of the package, a step that
has succeeded is not run again, so that the same command goes on where it was stopped, and a folder holds one set of settings.
"""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from reporting import commit

from hubert_eff.data.lines import read_json
from hubert_eff.errors import StepFailed, UserError
from hubert_eff.recipes.base import Recipe, Step, command_line, quiet_environment, say
from hubert_eff.utils.files import config_dir, writable, write_json
from hubert_eff.utils.locks import locked
from hubert_eff.utils.signals import say_stopped, stoppable

Chain = list[Step]
POLL = 0.1  # seconds
PATIENCE = 60.0  # seconds in which a command that was asked to stop may save
SHOWN = 8  # lines of the log of a step that failed


@dataclass
class Running:
    """A command at work, its log, and the steps of its chain that follow."""

    step: Step
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    rest: deque[Step]
    start: float = field(default_factory=time.monotonic)


class SideBySide(Recipe):
    """A `Recipe` of rounds of chains; `processes`: commands that run at once. Logs stand in `out/logs`."""

    processes: int = 2

    @abstractmethod
    def rounds(self) -> list[list[Chain]]:
        """The rounds in order, of chains with the most wanted first."""

    def accepts(self, step: Step, code: int) -> bool:
        """Whether a step that has ended with this exit code has succeeded."""
        return code == 0

    def steps(self) -> list[Step]:
        """All steps in order."""
        return [step for chains in self.rounds() for chain in chains for step in chain]

    def run(self) -> dict[str, Any]:
        """Run the steps that have not succeeded; the figures.

        Raises `UserError` for bad input, and if `out` holds other settings or is in use, and `StepFailed`. What is at work when one step
        fails, or when the run is stopped (see `main_of`), is stopped, too, and goes on the next time.
        """
        self.check()
        with locked(self.out):
            self._check_settings()
            self.prepare()
            self._write_settings()
            left = sum(not self._is_done(step, ()) for step in self.steps())
            say(f"{left} of {len(self.steps())} steps to run, {self.processes} at a time")
            for chains in self.rounds():
                self._round([deque(step for step in chain if not self._is_done(step, ())) for chain in chains])
            return self.results()

    def _step_record(self, step: Step) -> Path:
        """By the words of the command, but for where the checkout and `out` are: either may be moved, or another checkout go on."""
        words = step.shown.replace(str(config_dir().parent), "CHECKOUT").replace(str(self.out), "OUT")
        return self.out / "steps" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"

    def log_of(self, step: Step) -> Path:
        """Where a step's output goes."""
        return self.out / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', step.title.lower()).strip('-')}.log"

    def commits(self) -> list[str]:
        """Of the code that has run the steps."""
        found = {read_json(file, "delete it").get("commit") for file in (self.out / "steps").glob("*.json")}
        return sorted(str(name) for name in found if name)

    def _round(self, chains: list[deque[Step]]) -> None:
        waiting, running = deque(chain for chain in chains if chain), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    running.append(self._start(waiting.popleft()))
                time.sleep(POLL)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    self._finish(run)
                    if run.rest:
                        running.append(self._start(run.rest))
        finally:
            _stop(running)

    def _start(self, chain: deque[Step]) -> Running:
        step = chain.popleft()
        log = self.log_of(step)
        writable(log.parent)
        stream = log.open("ab")
        say(f"{time.strftime('%H:%M:%S')} {step.title}")
        words = command_line(*step.words)
        process = subprocess.Popen(words, env=quiet_environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        return Running(step, process, stream, chain)

    def _finish(self, run: Running) -> None:
        run.log.close()
        if not self.accepts(run.step, run.process.returncode):
            lines = self.log_of(run.step).read_text(encoding="utf-8", errors="replace").splitlines()
            say("\n".join(lines[-SHOWN:]))
            code = run.process.returncode
            raise StepFailed(run.step.title, code if code > 0 else 128 - code)
        seconds = round(time.monotonic() - run.start, 1)
        record = {"title": run.step.title, "command": run.step.shown, "seconds": seconds, "commit": commit()}
        write_json(self._step_record(run.step), record)
        say(f"{time.strftime('%H:%M:%S')} {run.step.title}: done in {seconds:.0f} s")


def _stop(running: list[Running]) -> None:
    """Ask what is at work to stop, and wait for it: a training run saves."""
    for run in running:
        run.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    for run in running:
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(max(0.1, end - time.monotonic()))
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        run.log.close()


def main_of(program: str, work: Callable[[], object]) -> int:
    """Run `work()`: 0 when done, 2 with one line for bad input, a step's own code where one failed, 130 or 143 when stopped."""
    with stoppable() as received:
        try:
            work()
        except UserError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        except StepFailed as error:
            print(f"{program}: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            return say_stopped(program, received)
    return 0
