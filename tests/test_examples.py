"""examples/: every script runs offline, and its README has one row for each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers.paths import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
LONG = ("02_binarize_and_export.py", "06_onnx.py", "07_huggingface.py")  # more than 10 s; two of them compile kernels first
PACKAGES = {"06_onnx.py": ("onnx", "onnxruntime"), "07_huggingface.py": ("transformers",)}
MARKED = [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in SCRIPTS]


@pytest.mark.parametrize("name", MARKED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package, reason="an optional package of this example is not installed")
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(FOLDER / name)]
    done = subprocess.run(script, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout and not list(tmp_path.iterdir())


def test_the_readme_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert rows == [(name, name) for name in SCRIPTS]
    assert [name[:2] for name in SCRIPTS] == [f"{number:02}" for number in range(1, len(SCRIPTS) + 1)]
