"""Recipes of chains that run side by side: order, what is done stays done, failures, and a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hubert_eff.errors import StepFailed, UserError
from hubert_eff.recipes.base import Step

from ..helpers.benchmarks import scripts
from ..helpers.paths import ROOT


@pytest.fixture
def side_by_side() -> Iterator[Any]:
    with scripts("learning", "side_by_side") as (module,):
        yield module


def _recipe(module: Any, out: Path, rounds: list[list[list[Step]]], pace: int = 1) -> Any:
    @dataclass
    class Chains(module.SideBySide):  # type: ignore[misc, name-defined]
        SETTINGS = ("pace",)

        out: Path
        pace: int
        listed: list[list[list[Step]]] = field(default_factory=list)

        def rounds(self) -> list[list[list[Step]]]:
            return self.listed

        def results(self) -> dict[str, Any]:
            return {"done": len(list((self.out / "steps").glob("*.json")))}

    return Chains(out, pace, rounds)


def _note(log: Path, word: str, code: int = 0) -> Step:
    text = f"import sys; open({str(log)!r}, 'a').write({word + chr(10)!r}); print('said', {word!r}); sys.exit({code})"
    return Step(f"write {word}", ("python", "-c", text))


def test_chains_keep_their_order_and_what_is_done_is_not_repeated(side_by_side: Any, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    rounds = [[[_note(log, "a1"), _note(log, "a2")], [_note(log, "b1")]], [[_note(log, "c1")]]]
    assert _recipe(side_by_side, out, rounds).run() == {"done": 4}
    words = log.read_text().split()
    assert sorted(words[:3]) == ["a1", "a2", "b1"] and words.index("a1") < words.index("a2") and words[3:] == ["c1"]
    assert _recipe(side_by_side, out, rounds).run() == {"done": 4}
    assert log.read_text().split() == words
    assert "said a1" in (out / "logs" / "write-a1.log").read_text()
    with pytest.raises(UserError, match="with pace=1, not 2: take another --out"):
        _recipe(side_by_side, out, rounds, pace=2).run()


def test_a_failed_step_ends_the_run_and_the_next_goes_on_there(
    side_by_side: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    broken = [[[_note(log, "first"), _note(log, "second", 3), _note(log, "third")]]]
    with pytest.raises(StepFailed) as failed:
        _recipe(side_by_side, out, broken).run()
    assert failed.value.code == 3 and "said second" in capsys.readouterr().err
    mended = [[[_note(log, "first"), _note(log, "second"), _note(log, "third")]]]
    assert _recipe(side_by_side, out, mended).run() == {"done": 3}
    assert log.read_text().split() == ["first", "second", "second", "third"]


SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from side_by_side import SideBySide, main_of
from hubert_eff.recipes.base import Step

@dataclass
class Slow(SideBySide):
    out: Path
    def rounds(self):
        wait = "import time, pathlib; pathlib.Path(%r).touch(); time.sleep(60)" % str(self.out / "begun")
        return [[[Step("quick", ("python", "-c", "pass")), Step("slow", ("python", "-c", wait))]]]
    def results(self):
        return {}

sys.exit(main_of("slow.py", Slow(Path(sys.argv[2])).run))
"""


def test_a_stop_reaches_what_is_at_work(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(ROOT / "benchmarks" / "learning"), str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and said.splitlines()[-1] == "slow.py: terminated"
    assert len(list((tmp_path / "steps").glob("*.json"))) == 1  # `quick`
    assert not list(tmp_path.glob("*.lock"))
