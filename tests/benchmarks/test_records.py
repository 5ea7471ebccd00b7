"""Kept figures of benchmarks: a line per run, two side by side, bad input in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from ..helpers.paths import ROOT


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("records", ROOT / "benchmarks" / "records.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def _entry(cpu: str, ms: float, ratio: float, what: str = "layer") -> dict[str, Any]:
    rows = [{"what": what, "sides": ["float", "one bit"], "ms": [ms * ratio, ms], "ratio": ratio}]
    return {
        "command": "python benchmarks/speed/one_bit.py",
        "commit": "abc1234",
        "date": "2026-01-01",
        "machine": {"cpu": cpu},
        "rows": rows,
    }


def test_a_script_is_run_and_its_figures_are_added(records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "speed").mkdir()
    script = "import sys, json; print(json.dumps({'machine': {'cpu': 'X'}, 'rows': [{'what': sys.argv[1], 'ms': [2, 1], 'ratio': 2}]}))"
    (tmp_path / "speed" / "mini.py").write_text(script)
    for word in ("first", "second"):
        file = records.keep("speed/mini.py", [word], tmp_path / "results")
    first, second = map(json.loads, file.read_text().splitlines())
    assert (
        file.name == "mini.jsonl" and first["command"] == "python benchmarks/speed/mini.py first" and second["rows"][0]["what"] == "second"
    )
    with pytest.raises(records.UserError, match="printed no rows"):
        (tmp_path / "speed" / "mini.py").write_text("print('hello')")
        records.keep("speed/mini.py", [], tmp_path / "results")
    with pytest.raises(records.UserError, match="is not a script of benchmarks: name one of speed/mini.py"):
        records.keep("speed/other.py", [])
    assert len(file.read_text().splitlines()) == 2


def test_two_results_side_by_side(records: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    entries = [_entry("A", 4.0, 2.0), _entry("A", 2.0, 3.0)]
    (tmp_path / "results" / "one_bit.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert records.main(["compare", "one_bit"]) == 0
    assert "| layer: float / one bit | 4 | 2 | 0.5 | 2 | 3 |" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(_entry("B", 8.0, 2.5)) + "\n")
    assert records.main(["compare", "one_bit", str(other)]) == 0
    said = capsys.readouterr().out
    assert "| 2 | 8 | – | 3 | 2.5 |" in said and "milliseconds do not compare" in said


def test_bad_input_is_one_line(records: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert records.main(["compare", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "results").mkdir()
    kept = tmp_path / "results" / "one_bit.jsonl"
    kept.write_text(json.dumps(_entry("A", 4.0, 2.0)) + "\n")
    assert "one_bit has 1 lines, there is no line -2" in refused("one_bit")
    assert "results are kept of: one_bit" in refused("layers")
    (tmp_path / "odd.jsonl").write_text(json.dumps(_entry("A", 4.0, 2.0, "model")) + "\n")
    assert "no row in common" in refused("one_bit", str(tmp_path / "odd.jsonl"))
    kept.write_text("{}\n")
    assert "line 1 is not a result that `records.py keep` wrote" in refused("one_bit")


def test_kept_results_can_be_read(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks" / "results"
    monkeypatch.setattr(records, "RESULTS", folder)
    for file in folder.glob("*.jsonl"):
        for entry in records.read(file.stem):
            assert entry["command"].startswith("python benchmarks/") and entry["machine"]["cpu"] and entry["rows"]
