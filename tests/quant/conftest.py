"""Shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hubert_eff.kernels import loader

from ..helpers.packed import runs


@pytest.fixture(params=[kernel for kernel in loader.KERNELS if kernel != loader.TORCH])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every kernel that runs here, forced."""
    if not runs(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    monkeypatch.setenv(loader.VARIABLE, request.param)
    yield request.param
