"""Commands one after the other, each kept when it has succeeded: what a demo and the recipes are made of."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import StepFailed, UserError
from ..reports.training_log import read_log
from ..utils.files import write_json
from ..utils.signals import STEP

INTERRUPT_SECONDS = 2.0  # after which a command that was interrupted is asked to stop


def plugin_dir() -> Path:
    """The folder to give fairseq as `common.user_dir`."""
    spec = importlib.util.find_spec("fairseq_plugins")
    if spec is None or spec.origin is None:
        raise UserError("the package fairseq_plugins is not installed: pip install 'hubert-eff[all]'")
    return Path(spec.origin).parent


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for the figures."""
    print(text, file=sys.stderr, flush=True)


def command_line(*words: object) -> list[str]:
    """A command line; the first word is a program beside this Python, or `python`."""
    name, *rest = [str(w) for w in words]
    program = Path(sys.executable) if name == "python" else Path(sys.executable).parent / name
    if not program.exists():
        raise UserError(f"{name} is not installed beside {sys.executable}: pip install 'hubert-eff[all]', then hubert-eff doctor")
    return [str(program), *rest]


def path_overrides(paths: Mapping[str, str | Path]) -> list[str]:
    """KEY=PATH for fairseq-hydra-train, quoted where a path holds what means something to hydra.

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
    """For commands that train: models as small as the debug ones gain nothing from threads, which spin when other work shares the cores."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", STEP: "1"}


def run_command(words: Sequence[object]) -> int:
    """Run a command, its output on stderr; a stop is handed on to it, so that a training run saves. Its exit code."""
    child = subprocess.Popen(command_line(*words), env=quiet_environment(), stdout=sys.stderr)
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


class Steps:
    """Runs commands for one folder, and remembers there which have succeeded."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()

    def record(self, *words: object) -> Path:
        """Where it is remembered that a command has succeeded with just these words."""
        return self.out / "steps" / f"{hashlib.sha256(shlex.join(map(str, words)).encode()).hexdigest()[:16]}.json"

    def done(self, *words: object) -> bool:
        """Whether it has."""
        return self.record(*words).is_file()

    def step(self, title: str, *words: object) -> float:
        """Run a command unless it has succeeded before with the same words; returns its seconds. Raises `StepFailed`."""
        shown, record = shlex.join(map(str, words)), self.record(*words)
        if record.is_file():
            say(f"\n== {title} (done before)\n$ {shown}")
            return float(json.loads(record.read_text())["seconds"])
        say(f"\n== {title}\n$ {shown}")
        start = time.monotonic()
        code = run_command(words)
        if code:
            raise StepFailed(title, code)
        seconds = time.monotonic() - start
        write_json(record, {"title": title, "command": shown, "seconds": round(seconds, 1)})
        return seconds

    def figures(self, *words: object) -> Any:
        """The JSON that a command prints. Raises `StepFailed`."""
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
