"""The common part of the demo and the recipes: settings, the order of steps, resuming, dry runs, command lines.

A recipe lists its steps; here they are run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from ..data.lines import read_json
from ..errors import StepFailed, UserError, unknown
from ..reports.training_log import read_log
from ..utils.configurations import plugin_dir
from ..utils.files import check_writable, config_dir, replacing, writable, write_json
from ..utils.locks import locked
from ..utils.signals import STEP

TRAIN = "fairseq-hydra-train"
CONSOLE = "hydra.job_logging.handlers.console.class=hubert_eff.reports.console.Console"
INTERRUPT_SECONDS = 2.0  # an interrupted command is asked to stop after this time


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the figures."""
    print(text, file=sys.stderr, flush=True)


def command_line(*words: object) -> list[str]:
    """A command line; the first word is a program beside this Python, or `python`."""
    name, *rest = [str(w) for w in words]
    program = Path(sys.executable) if name == "python" else Path(sys.executable).parent / name
    if not program.exists():
        raise UserError(f"{name} is not installed beside {sys.executable}: pip install 'hubert-eff[all]', then hubert-eff doctor")
    return [str(program), *rest]


def path_overrides(paths: Mapping[str, str | Path]) -> list[str]:
    """KEY=PATH for fairseq-hydra-train, quoted if a path has characters with a meaning in hydra.

    Raises `UserError` for a path that hydra cannot be given: with control characters, not in UTF-8, or with `${`, which it would replace.
    """
    return [f"{key}={_quoted(str(path))}" for key, path in paths.items()]


def _quoted(text: str) -> str:
    if "${" in text or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise UserError(f"{text!r}: training cannot be given a path with control characters, with bytes that are not UTF-8, or with ${{")
    if re.fullmatch(r"[\w/.-]+", text, re.ASCII):
        return text
    doubled = re.sub(r"\\+(?='|$)", lambda match: 2 * match[0], text)  # elsewhere a backslash stands for itself
    return "'" + doubled.replace("'", "\\'") + "'"


def quiet_environment() -> dict[str, str]:
    """The environment for training. Small models such as the debug ones gain nothing from threads, which spin if cores are shared."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", STEP: "1"}


def readable(words: Sequence[object]) -> tuple[object, ...]:
    """The words of a command; of a training run with the log that can be read, unless they choose one: `hydra_train.log` keeps all."""
    trains = words[0] == TRAIN and not any("job_logging" in str(word) for word in words)
    return (*words, CONSOLE) if trains else tuple(words)


def run_command(words: Sequence[object], stdout: Path | None = None) -> int:
    """Run a command and return its exit code; it receives stop signals, so that a training run saves.

    Its output goes to stderr, or into a file that appears once the command has succeeded.
    """
    if stdout is not None:
        with replacing(stdout) as draft, draft.open("wb") as file:
            code = _run(words, file)
            if code:
                raise StepFailed(shlex.join(map(str, words)), code)
        return code
    return _run(words, sys.stderr)


def _run(words: Sequence[object], output: IO[Any]) -> int:
    child = subprocess.Popen(command_line(*readable(words)), env=quiet_environment(), stdout=output)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:  # a terminal has sent it to the command as well, which may be saving
        with suppress(subprocess.TimeoutExpired):
            child.wait(INTERRUPT_SECONDS)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.terminate()
            child.wait()
    return code if code >= 0 else 128 - code


@dataclass(frozen=True)
class Step:
    """A command of a recipe.

    `result`: a file that it leaves behind, without which it is run again though it has succeeded before; `stdout`: the one that takes what
    it prints.
    """

    title: str
    words: tuple[object, ...]
    result: Path | None = None
    stdout: Path | None = None

    @property
    def shown(self) -> str:
        """The command in shell syntax."""
        return shlex.join(map(str, self.words)) + (f" > {shlex.quote(str(self.stdout))}" if self.stdout else "")


class Recipe(ABC):
    """Steps, one after the other, in a folder that is this recipe's alone. A step that has succeeded is not run again.

    The folder keeps `recipe.json`, the settings that decide the results (one that its version did not know yet counts as None), and for
    every step that has succeeded `steps/HASH.json`, by the words of its command. A stage is some steps of the list: to let one follow
    another, append its steps, which take the files of those before.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()  # fields that decide the results: a folder holds those of one set of them
    LATER: ClassVar[tuple[str, ...]] = ()  # those of them, None by default, of a stage that a folder may get later
    out: Path

    @abstractmethod
    def steps(self) -> Iterable[Step]:
        """The steps in order; `run` takes each when those before it have ended, so that it may depend on what they found.

        Raises `UserError` for a path that a command cannot be given.
        """

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """The figures after all steps have succeeded."""

    def check(self) -> None:
        """Raise `UserError` for faults that would otherwise appear in a later step. Changes nothing."""
        check_writable(self.out)
        self._check_settings()
        for step in self.steps():
            command_line(*step.words)

    def prepare(self) -> None:  # noqa: B027 - not every recipe needs it
        """Write what steps read, and refuse a run where only a dry run can be had."""

    def plan(self) -> list[dict[str, Any]]:
        """Check everything and return the steps: title, command, and whether each is done."""
        self.check()
        done = self._done_before()
        return [
            {"title": step.title, "command": [str(word) for word in step.words], "done": self._is_done(step, done)} for step in self.steps()
        ]

    def run(self) -> dict[str, Any]:
        """Run the steps that have not succeeded, and return the figures.

        Raises `UserError` for bad input, and if `out` holds a recipe with other settings or is in use, and `StepFailed`.
        """
        self.check()
        with locked(self.out):
            self._check_settings()  # another process may have begun meanwhile
            self.prepare()
            self._write_settings()
            done = self._done_before()
            for step in self.steps():
                self._run(step, done)
            return self.results()

    # -- what the folder keeps ---------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as `recipe.json` holds them: plain values, paths as text."""
        found = {name: getattr(self, name) for name in self.SETTINGS}
        return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]

    @property
    def _record(self) -> Path:
        return self.out / "recipe.json"

    def _read_record(self) -> dict[str, Any]:
        """What `recipe.json` holds: dicts of settings and, in those of earlier versions, of the stages that are done."""
        if not self._record.exists():
            return {"settings": {}, "done": {}}
        hint = "move it away, and run the recipe with the settings of before"
        found = {"done": {}, **read_json(self._record, hint)}
        if not isinstance(found.get("settings"), dict) or not isinstance(found["done"], dict):
            raise UserError(f"{self._record} holds no settings of a recipe: {hint}")
        return found

    def _check_settings(self) -> None:
        before = self._read_record()["settings"]
        for key, value in self.settings.items() if before else ():
            if before.get(key) != value and not (key in self.LATER and None in (value, before.get(key))):
                raise UserError(f"{self._record} belongs to a recipe with {key}={before.get(key)}, not {value}: take another --out")

    def _write_settings(self) -> None:
        """Keep the settings in `recipe.json`, with those of a stage that the folder did not have yet."""
        record = self._read_record()
        later = {key: self.settings[key] for key in self.LATER if self.settings[key] is not None}
        settings = {**(record["settings"] or self.settings), **later}
        if settings != record["settings"]:
            write_json(self._record, {"settings": settings, **({"done": record["done"]} if record["done"] else {})})

    def _done_before(self) -> set[str]:
        """Titles of the steps that an earlier version of the recipe wrote down as done."""
        return set(self._read_record()["done"])

    def _step_record(self, step: Step) -> Path:
        return self.out / "steps" / f"{hashlib.sha256(step.shown.encode()).hexdigest()[:16]}.json"

    def _is_done(self, step: Step, before: Container[str]) -> bool:
        known = step.title in before or self._step_record(step).is_file()
        return known and (step.result is None or step.result.is_file())

    def _run(self, step: Step, before: Container[str]) -> None:
        done = self._is_done(step, before)
        say(f"\n== {step.title}{' (done before)' if done else ''}\n$ {step.shown}")
        if done:
            return
        if step.result is not None:
            writable(step.result.parent)
        start = time.monotonic()
        code = run_command(step.words, step.stdout) if step.stdout else run_command(step.words)
        if code:
            raise StepFailed(step.title, code)
        seconds = round(time.monotonic() - start, 1)
        write_json(self._step_record(step), {"title": step.title, "command": step.shown, "seconds": seconds})

    def seconds(self, step: Step) -> float:
        """The seconds that a successful step took."""
        record = self._step_record(step)
        hint = "delete it, and the step is run again"
        seconds = read_json(record, hint).get("seconds")
        if not isinstance(seconds, (int, float)):
            raise UserError(f"{record} does not say how long the step took: {hint}")
        return float(seconds)


# -- for the lists of steps ----------------------------------------------------------------------------------------------


def training(kind: str, config: str, paths: Mapping[str, str | Path], *overrides: str) -> tuple[object, ...]:
    """The words of a training run of the configuration KIND/CONFIG: keys with a path, then other overrides."""
    plugin = {"common.user_dir": plugin_dir()}
    keys = (*path_overrides({**plugin, **paths}), *overrides)
    return (TRAIN, "--config-dir", config_dir() / kind, "--config-name", config, *keys)


def check_model(written: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Raise `UserError`, with the nearest name, if overrides choose a model that is not registered.

    A plug-in of the user's own, `common.user_dir`, may register further models, so that any name is accepted with it.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in overrides}
    if "model._name" not in keys or "common.user_dir" in keys:  # the configurations themselves are right
        return
    from ..checkpoints.load import FINE_TUNED
    from ..encoders.registry import list_encoders, unregistered

    name, fine_tuned = written["model"]["_name"], "w2v_path" in written["model"]
    known = FINE_TUNED if fine_tuned else [f"hubert_{encoder}" for encoder in list_encoders()]
    if name not in known:
        raise unknown("model._name", name, known) if fine_tuned else unregistered("model._name", name, known)


def check_keys(overrides: Sequence[str], decided: Container[str], example: str) -> None:
    """Raise `UserError` for an override of `--set` that is none, or that sets what the recipe decides itself."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected SECTION.KEY=VALUE, such as {example}, or GROUP=MEMBER")
        if key.lstrip("+~") in decided:
            raise UserError(f"--set {override}: the recipe decides {key.lstrip('+~')} itself")


def plan_text(plan: Sequence[Mapping[str, Any]]) -> str:
    """The steps of `Recipe.plan` in shell syntax, each under its title."""
    return "\n".join(f"# {step['title']}{' (done before)' if step['done'] else ''}\n{shlex.join(step['command'])}\n" for step in plan)


def figures(*words: object) -> Any:
    """The JSON that a command prints. Raises `StepFailed` if the command fails."""
    done = subprocess.run(command_line(*words, "--json"), check=False, stdout=subprocess.PIPE, text=True, env={**os.environ, STEP: "1"})
    if done.returncode:
        raise StepFailed(shlex.join(map(str, words)), done.returncode)
    return json.loads(done.stdout)


def best_validation(log: Path) -> dict[str, float]:
    """The figures of the validation with the lowest loss, which `checkpoint_best.pt` comes from, out of fairseq's log."""
    try:
        best = read_log(log).best
    except UserError as error:
        raise UserError(f"{error}: delete the folder {log.parent} and run the command again") from error
    names = {
        "updates": "num_updates", "loss": "loss", "accuracy": "correct_m_0", "majority": "majority_m_0",
        "code perplexity": "code_ppl_0", "label perplexity": "label_ppl_0",
    }  # fmt: skip
    return {name: best[key] for name, key in names.items()}
