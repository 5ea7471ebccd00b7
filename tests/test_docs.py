"""README and docs/: options exist, links lead somewhere, marked blocks run; docs/encoders.md names every preset, with its parameters."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff import cli
from hubert_eff.encoders.registry import get_encoder
from hubert_eff.recipes import base as steps

from .helpers.pages import BLOCK, TRAINING, anchors, commands, links, page, pages, run_block
from .helpers.paths import FSDD, ROOT

PAGE = page("encoders")
PARAMETERS = {name: int(count.replace(",", "")) for name, count in re.findall(r"\| `([a-z0-9-]+)` \| ([\d,]+) \|", PAGE)}


def test_every_preset_of_a_paper_is_listed() -> None:
    assert set(PARAMETERS) == {name for name in hubert_eff.list_presets() if not name.endswith("-debug")}


def test_every_encoder_is_in_the_tables_of_learning() -> None:
    tables = re.findall(r"\| encoder \| parameters \| updates per second .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    assert len(tables) == 2
    for table in tables:
        assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == hubert_eff.list_encoders()


@pytest.mark.long
@pytest.mark.parametrize("preset", sorted(PARAMETERS))
def test_parameters_are_right(preset: str) -> None:
    assert hubert_eff.profile(preset, seconds=1.0).params == PARAMETERS[preset]


def test_what_is_shipped_is_listed_with_its_needs() -> None:
    section = page("export").partition("## What you ship")[2].partition("\n## ")[0]
    for option in ("--out", "--onnx", "--pt2", "--hf", "--edge", "bf16", "fp16", "int8", "+w1a1"):
        assert re.search(rf"^\| [^|]*{re.escape(option)}", section, re.MULTILINE), option
    for text in (section, page("limits")):
        assert re.search("needs Python, torch and, for its kernels, a C\\+\\+\\s+compiler on the device", text)


@pytest.mark.parametrize("name", pages())
def test_options_exist(name: str) -> None:
    """Also of commands that are not run here: the LibriSpeech recipe."""
    for line in commands(page(name)):
        if line.startswith("hubert-eff "):
            words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "0"), comments=True)[1:]
            cli._parser(words[0]).parse_args(words)


@pytest.mark.parametrize("name", pages())
def test_scripts_and_their_options_exist(name: str) -> None:
    """Of `python benchmarks/...`, in blocks and in sentences."""
    shared = (ROOT / "benchmarks" / "speed" / "harness.py").read_text(encoding="utf-8")
    for script, words in re.findall(r"python (benchmarks/[\w/]+\.py)([^`\n]*)", page(name).replace("\\\n", " ")):
        source = shared + (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z][\w-]*", words):
            assert f'"{option}"' in source, f"{script} {option}"


@pytest.mark.parametrize("name", pages())
def test_links_lead_somewhere(name: str) -> None:
    folder = ROOT if name == "README" else (ROOT / "docs" / name).parent
    text = page(name)
    for target in links(text):
        assert not target or target.startswith("https://") or (folder / target).exists(), target
    for path, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
        there = (folder / path).read_text(encoding="utf-8") if path else text
        assert anchor in anchors(there), f"{path}#{anchor}"


def test_configurations_and_targets_exist() -> None:
    lines = [line for name in pages() for line in commands(page(name))]
    names = {Path(word).name for line in lines for word in re.findall(r"--config-name (\w+)", line)}
    names |= {word.split("/")[-1] for line in lines for word in re.findall(r"^hubert-eff train (\S+)", line) if "$" not in word}
    assert names and all(list((ROOT / "configs").glob(f"*/{name}.yaml")) for name in names)
    targets = {word for line in lines for word in re.findall(r"^make ([a-z-]+)", line)}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "env"} <= targets and all(f"\n{target}:" in makefile for target in targets)


def test_trainings_are_composed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `hubert-eff train` of the pages, as far as `--dry-run` goes: groups, keys and their values."""
    pytest.importorskip("hydra", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    lines = {line for name in pages() for line in commands(page(name)) if line.startswith("hubert-eff train") and "$" not in line}
    lines = {line for line in lines if "hubert_mixer" not in line}  # which a command knows only with $HUBERT_EFF_IMPORT
    assert lines
    for line in sorted(lines):
        assert cli.main([*shlex.split(line)[1:], "--dry-run"]) == 0, f"{line}: {capsys.readouterr().err}"


def test_generated_pages_are_whole() -> None:
    pytest.importorskip("mkdocs", reason="the site's packages are not installed: pip install 'hubert-eff[docs]'")
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None and spec.loader is not None
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    for name in cli.COMMANDS:
        assert f"\n### hubert-eff {name}\n\n" in generated.commands()
    assert "\n#### hubert-eff superb run\n" in generated.commands() and "| `--json` |" in generated.commands()
    assert all(f"\n## {path.name}\n\n" in generated.examples() for path in (ROOT / "examples").glob("*.py"))
    for name in hubert_eff.list_encoders():
        assert all(f"\n| `{field.name}` |" in generated.keys() for field in dataclasses.fields(get_encoder(name).config))


def test_nothing_is_left_to_fill_in() -> None:
    assert {mark for name in pages() for mark in re.findall(r"<!-- (.*?) -->", page(name))} == {"run"}


@pytest.mark.long
def test_commands_run(tmp_path: Path) -> None:
    """All marked blocks of README and docs/, in order; on the Free Spoken Digit Dataset where it is at hand.

    docs/export.md has its own test.

    As they stand, but for the length of the pre-training: that a run of full length learns is what `test_demo` shows.
    """
    for name in ("configs", "fairseq_plugins"):
        (tmp_path / name).symlink_to(ROOT / name)
    recordings = FSDD
    if not recordings.is_dir():
        recordings = tmp_path / "recordings"
        assert cli.main(["corpus", "demo", "--out", str(recordings), "--minutes", "10", "--speakers", "24"]) == 0
    done: set[str] = set()
    for name in pages():
        for run, language, body in BLOCK.findall(page(name)):
            if run and body not in done and name != "export":
                done.add(body)
                if name == "tutorials/new-encoder" and language == "python":  # which the reader saves under this name
                    (tmp_path / "plug").mkdir()
                    (tmp_path / "plug" / "mixer_enc.py").write_text(body)
                run_block(language, body.replace(TRAINING, f"{TRAINING} optimization.max_update=40"), tmp_path, FSDD=str(recordings))
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
