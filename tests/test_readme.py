"""The README's commands are run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hubert_eff import cli
from hubert_eff.recipes import base as steps

from .helpers.paths import FSDD, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PRETRAINING = "fairseq-hydra-train --config-dir configs/pretrain --config-name debug"
BLOCK = re.compile(r"(<!-- run -->\n)?```(\w*)\n(.*?)```", re.S)


def commands() -> list[str]:
    """Every command line of the README, continued lines joined."""
    text = "\n".join(body for _, language, body in BLOCK.findall(README) if language in ("", "bash"))
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("hubert-eff")])
def test_options_exist(line: str) -> None:
    """Also of commands that are not run here: the LibriSpeech recipe."""
    words = shlex.split(line)[1:]
    cli._parser(words[0]).parse_args(words)


def test_configurations_exist() -> None:
    names = {Path(word).name for line in commands() for word in re.findall(r"--config-name (\S+)", line)}
    assert names and all(list((ROOT / "configs").glob(f"*/{name}.yaml")) for name in names)
    assert all(target in (ROOT / "Makefile").read_text() for target in ("demo:", "test:", "test-long:"))


def test_the_new_encoder_works() -> None:
    code = next(body for run, language, body in BLOCK.findall(README) if run and language == "python" and "register_encoder" in body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_nothing_is_left_to_fill_in() -> None:
    assert set(re.findall(r"<!-- (.*?) -->", README)) == {"run"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.long
def test_commands_run(tmp_path: Path) -> None:
    """All marked blocks, in order, at the top of a checkout; on the Free Spoken Digit Dataset where it is at hand.

    As they stand, but for the length of the pre-training: that a run of full length learns is what `test_demo` shows.
    """
    for name in ("configs", "fairseq_plugins"):
        (tmp_path / name).symlink_to(ROOT / name)
    recordings = FSDD
    if not recordings.is_dir():
        recordings = tmp_path / "recordings"
        assert cli.main(["corpus", "demo", "--out", str(recordings), "--minutes", "10", "--speakers", "24"]) == 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FSDD": str(recordings)}
    for run, language, body in BLOCK.findall(README):
        if run:
            body = body.replace(PRETRAINING, f"{PRETRAINING} optimization.max_update=40")
            program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            done = subprocess.run([*program, body], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{body}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert steps.best_validation(tmp_path / "runs" / "digits" / "pretrain" / "hydra_train.log")["updates"] == 40


@pytest.mark.long
def test_demo(tmp_path: Path) -> None:
    """`hubert-eff demo` learns; when it is done, it repeats nothing and prints its figures as JSON."""
    command = [str(Path(sys.executable).parent / "hubert-eff"), "demo", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stderr.count("(done before)") in (12, 13), again.stderr[-3000:]
    results = json.loads(again.stdout)
    valid, spotting = results["valid"], results["keyword spotting"]
    assert valid["accuracy"] > 1.5 * valid["majority"]
    assert spotting["pretrained"]["accuracy"] > spotting["untrained"]["accuracy"] + 0.1
    assert "masked accuracy" in first.stdout and f"{valid['accuracy']:.1%}" in first.stdout
