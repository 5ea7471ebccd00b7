"""docs/encoders.md names every preset, with the parameters that it has."""

from __future__ import annotations

import re

import pytest

import hubert_eff

from .helpers.paths import ROOT

PAGE = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
PARAMETERS = {name: int(count.replace(",", "")) for name, count in re.findall(r"\| `([a-z0-9-]+)` \| ([\d,]+) \|", PAGE)}


def test_every_preset_of_a_paper_is_listed() -> None:
    assert set(PARAMETERS) == {name for name in hubert_eff.list_presets() if not name.endswith("-debug")}


def test_every_encoder_is_in_the_tables_of_learning() -> None:
    tables = re.findall(r"\| encoder \| parameters \| updates per second .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    assert len(tables) == 2
    for table in tables:
        assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == hubert_eff.list_encoders()


@pytest.mark.long
@pytest.mark.parametrize("preset", sorted(PARAMETERS))
def test_parameters_are_right(preset: str) -> None:
    assert hubert_eff.profile(preset, seconds=1.0).params == PARAMETERS[preset]
