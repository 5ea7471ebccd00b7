"""Encoders that are registered elsewhere: modules in $HUBERT_EFF_IMPORT, and the entry points of installed packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubert_eff.encoders.registry import import_others
from hubert_eff.errors import UserError

from ..helpers.pages import BLOCK, page


def test_a_module_that_is_not_installed(tmp_path: Path) -> None:
    """The tutorial's module in a folder: a command knows its encoder with the variable, and says without it what to do."""
    (module,) = (body for run, language, body in BLOCK.findall(page("tutorials/new-encoder")) if run and language == "python")
    (tmp_path / "mixer_enc.py").write_text(module)
    start = f"import sys; sys.path.append({str(tmp_path)!r}); from hubert_eff.cli import main; sys.exit(main(['profile', 'mixer-debug']))"

    def profile(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **variables}
        return subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True, check=False)

    known, unknown = profile(HUBERT_EFF_IMPORT="mixer_enc"), profile()
    assert known.returncode == 0 and "mixer-debug" in known.stdout, known.stderr
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1 and "HUBERT_EFF_IMPORT=MODULE" in unknown.stderr


def test_a_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBERT_EFF_IMPORT", "os, no_such_module")
    with pytest.raises(UserError, match="HUBERT_EFF_IMPORT=no_such_module cannot be imported.*put the module's folder into PYTHONPATH"):
        import_others()


def test_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "mixers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mixers\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hubert_eff.encoders]\nmixer = mixer_of_a_package\n")
    (tmp_path / "mixer_of_a_package.py").write_text("raise RuntimeError('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="encoder 'mixer'.*it was imported.*update or uninstall its package"):
        import_others()
