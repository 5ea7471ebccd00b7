"""Imports go one way: what stands lower never imports what stands higher (pyproject.toml, [tool.importlinter])."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .helpers.paths import ROOT

LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def test_no_import_goes_up() -> None:
    done = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_root_holds_contracts_only() -> None:
    modules = {path.name for path in (ROOT / "hubert_eff").glob("*.py")}
    assert modules == {"__init__.py", "_moved.py", "cli.py", "config.py", "errors.py", "hf.py", "registry.py"}


def test_no_test_imports_another() -> None:
    """What several tests need stands in tests/helpers, or is a fixture in a conftest.py."""
    imports = re.compile(r"^\s*(?:from|import)\s+[\w.]*\btest_\w+", re.MULTILINE)
    assert not {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))}
