"""Shared by all tests: fixed seeds, where the real recordings are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from .helpers.paths import FSDD

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else every process that compiles a model starts a pool of others


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two longest begin the halves that two workers are given, so that neither waits for the other's at the end."""
    longest = [item for item in items if item.name in ("test_commands_run", "test_demo")]
    rest = [item for item in items if item not in longest]
    half = len(rest) // 2
    items[:] = [*longest[:1], *rest[:half], *longest[1:], *rest[half:]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fsdd() -> Path:
    """The Free Spoken Digit Dataset; the test is skipped where it is absent."""
    if not FSDD.is_dir():
        pytest.skip(f"real recordings (Free Spoken Digit Dataset) are not at {FSDD}; $FSDD names their folder")
    return FSDD


@pytest.fixture(scope="session")
def superb_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated data of all ten SUPERB tasks, as small as they are; made once for all workers. A test that changes them copies them."""
    from filelock import FileLock

    from superb_tasks.data.corpus import make_superb

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "superb.lock"):
        make_superb(folder / "superb", minutes=0.2, seed=3)  # what is there is kept
    return folder / "superb"


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, lines of progress would stand among the errors that tests read."""
    monkeypatch.setattr("hubert_eff.utils.progress.LINE_SECONDS", 3600.0)
