"""Imports go one way: what stands lower never imports what stands higher (pyproject.toml, [tool.importlinter])."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .conftest import ROOT

LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def test_no_import_goes_up() -> None:
    done = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_root_holds_contracts_only() -> None:
    modules = {path.name for path in (ROOT / "hubert_eff").glob("*.py")}
    assert modules == {"__init__.py", "_moved.py", "cli.py", "config.py", "errors.py", "registry.py"}
