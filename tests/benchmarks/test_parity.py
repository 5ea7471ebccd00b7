"""The table of parity with other libraries."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torchaudio")
pytest.importorskip("s3prl")


@pytest.mark.long
def test_every_row_is_within_rounding(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from benchmarks.reliability import parity

    monkeypatch.setattr("sys.argv", ["parity.py", "--json"])
    assert parity.main() == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["way"] for row in rows} == {"in", "out"} and len(rows) == 15
    assert all(row["difference"] < 1e-5 < row["largest"] for row in rows), rows
