"""The README: its Python prints what stands there, and its tables say what the code does. `test_docs` runs its commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff import cli, edge
from hubert_eff.errors import UserError
from hubert_eff.exporting.huggingface import is_native
from hubert_eff.layers.norm import NoNorm

from .helpers.pages import BLOCK, page
from .helpers.paths import ROOT

README = page("README")
SCRIPTS = [body for run, language, body in BLOCK.findall(README) if run and language == "python"]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    lines = [line for line in README.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 165


def test_figures_of_claims_stand_in_the_ledger() -> None:
    """All but the share of the most frequent label and the lengths of audio, in words of the claims."""
    ledger = page("results")
    claims = README.split("\n- **Fast")[1].split("\n## Install")[0]
    assert all(figure in ledger for figure in re.findall(r"\b\d+(?:\.\d+)?x|\b\d\d\.\d(?=%)|\b\d+ ms", claims))
    assert all(line[2:].strip("`").split()[1] in ledger for line in claims.splitlines() if line.startswith("  `python"))


def test_the_python_prints_what_stands_there(tmp_path: Path) -> None:
    printed = next(body for _, language, body in BLOCK.findall(README) if language == "text")
    done = subprocess.run([sys.executable, "-c", SCRIPTS[0]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == printed, done.stderr


def test_the_new_encoder_works() -> None:
    """The lines of the README are from the module of the tutorial, which runs."""
    (shown,) = (body for _, language, body in BLOCK.findall(README) if language == "python" and "@register_encoder" in body)
    (module,) = (body for run, language, body in BLOCK.findall(page("tutorials/new-encoder")) if run and language == "python")
    assert shown in module
    sizes = "import hubert_eff\nfor n in 'mixer-debug', 'mixer-debug+w1a1': print(hubert_eff.profile(n, seconds=1.0).storage_mb['file'])"
    done = subprocess.run([sys.executable, "-c", f"{module}\n{sizes}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, one_bit = map(float, done.stdout.split())
    assert 0 < one_bit < whole


def test_parameters_and_configurations_of_models() -> None:
    listed = re.findall(r"\| `([a-z0-9-]+)` \| ([\d,]+) \|", page("encoders"))
    for preset, parameters, *_, configuration in rows("Models"):
        assert (preset, parameters) in listed
        assert (ROOT / "configs" / f"{configuration}.yaml").is_file()


@pytest.mark.long
def test_costs_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    table = {row[0]: row[2:5] for row in rows("Models")}
    assert cli.main(["list", *table, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert [f"{row[key]:.1f}" for key in ("gflop", "mb", "one_bit_mb")] == table[row["preset"]]


def said(action: Callable[[], object]) -> str:
    """yes, or no where it is refused."""
    try:
        action()
    except UserError:
        return "no"
    return "yes"


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_what_works_with_what(encoder: str) -> None:
    """ONNX and one bit are tested for every encoder in tests/exporting and tests/quant, and only read here."""
    (row,) = (row for row in rows("What works with what") if row[0] == encoder)
    _, chunks, one_bit, onnx, no_norms, compiles, rewritten, native = row
    preset = "zipformer-s" if encoder == "zipformer" else f"{encoder}-debug"  # the debug size has fewer rates
    multiple = hubert_eff.build(preset, streaming=True).encoder.chunk_multiple
    assert chunks == ("any" if multiple == 1 else f"multiples of {multiple}")
    assert one_bit == onnx == "yes"
    model = hubert_eff.build(f"{encoder}-debug").eval()
    parts = hubert_eff.fuse(model).encoder.layers.modules()
    norms = [part for part in parts if type(part).__name__.endswith("Norm") and not isinstance(part, NoNorm)]
    assert no_norms == ("no" if norms else "yes")
    assert compiles == said(lambda: hubert_eff.build(f"{encoder}-debug", compile_blocks=True))
    assert rewritten == said(lambda: edge.rewrite(model))
    assert native == ("yes" if is_native(hubert_eff.build(f"{encoder}-debug").eval()) else "no")
