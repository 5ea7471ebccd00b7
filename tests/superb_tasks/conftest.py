"""Shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("espeakng_loader")


@pytest.fixture
def data(superb_data) -> Path:
    return superb_data
