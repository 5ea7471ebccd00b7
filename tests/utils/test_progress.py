"""Progress in a log: lines appear during a long step too, and no time is promised where a job may stop early."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from hubert_eff.utils import progress as module
from hubert_eff.utils.progress import progress


@pytest.fixture
def last_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Wait for a line with a text, and return it."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.01)

    def waited(text: str) -> str:
        for _ in range(3000):
            found = [line for line in capsys.readouterr().err.splitlines() if text in line]
            if found:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(f"no line with {text}")

    return waited


def test_a_line_comes_before_the_first_step_ends(last_line: Callable[[str], str]) -> None:
    with progress("shards", 4) as advance:
        assert last_line("shards").startswith("shards: 0 of 4, ")
        advance(1)
        assert last_line("1 of 4, about").endswith(" s left")


def test_no_time_left_is_promised_where_a_job_may_stop_early(last_line: Callable[[str], str]) -> None:
    with progress("passes", 100, at_most=True) as advance:
        advance(1)
        assert last_line("1 of at most 100, ").endswith(" s so far")


def test_no_line_comes_after_the_end(last_line: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress("shards", 4):
        raise KeyError
    capsys.readouterr()
    time.sleep(0.05)
    assert not capsys.readouterr().err
