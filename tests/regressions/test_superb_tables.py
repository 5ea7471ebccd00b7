"""Lines of SUPERB's tables that are malformed are named; they are no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubert_eff.errors import UserError
from superb_tasks.data import layouts


@pytest.mark.parametrize("line", ["u r 0", "u r 0 1 1", "u r 1 0", "u r 0 nan", "u r x 1", "u r 0 \u00b2", "u r -1 1"])
def test_segments_of_diarization(line: str, tmp_path: Path) -> None:
    (tmp_path / "utt2spk").write_text("t s\nu s\n")
    (tmp_path / "segments").write_text(f"t r 0 1.5\n{line}\n")
    with pytest.raises(UserError, match="segments: 'u' is not followed by"):
        list(layouts.segments(tmp_path))


@pytest.mark.parametrize(
    ("row", "said"), [("x" * 131_073 + ",a,b,c", "cannot be read as a table"), ("1.wav,a,b", "row 2"), ("1.wav,a,b,c,d", "row 2")]
)
def test_tables_of_fluent_speech_commands(row: str, said: str, tmp_path: Path) -> None:
    table = tmp_path / layouts.FLUENT / "data" / "train_data.csv"
    table.parent.mkdir(parents=True)
    table.write_text(f"path,action,object,location\n{row}\n")
    with pytest.raises(UserError, match=f"train_data.csv.*{said}"):
        layouts.check_commands(tmp_path)
