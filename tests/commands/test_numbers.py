"""Numbers out of bounds on the command line are one line, before a command looks at anything else."""

from __future__ import annotations

import pytest

from hubert_eff.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench none --threads 0", "argument --threads: 0 must be at least 1"),
        ("bench none --batch 1 0", "argument --batch: 0 must be at least 1"),
        ("trends none --blocks 1", "argument --blocks: 1 must be at least 2"),
        ("profile none --depth -1", "argument --depth: -1 must be at least 0"),
        ("recipe none --config debug --out x --gpus two", "argument --gpus: 'two' is not a whole number"),
        ("recipe none --config debug --out x --updates 5 0", "argument --updates: 0 must be at least 1"),
        ("recipe none --config debug --out x --fit-hours nan", "argument --fit-hours: nan must be above 0"),
        ("recipe none --config debug --out x --mfu 1.5", "argument --mfu: 1.5 must be above 0 and at most 1"),
        ("recipe none --config debug --out x --valid-percent 1,5", "argument --valid-percent: '1,5' is not a number"),
    ],
)
def test_they_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"hubert-eff {words.split()[0]}: {message} (--help lists the options)\n"
