"""Shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
import fairseq_plugins  # noqa: E402, F401

from ..helpers.pretraining import make_data  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"train": [1.0, 2.0, 1.5, 2.0, 2.0], "valid": [1.0]})
