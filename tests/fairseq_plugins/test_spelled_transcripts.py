"""Files of letters (SPLIT.ltr) say nothing of the manifest they are for: its transcripts do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubert_eff.data.tsv import read_manifest
from hubert_eff.errors import UserError
from hubert_eff.recognition.transcripts import read_transcripts

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from ..helpers.finetuning import make_data  # noqa: E402

SAID = ["one two", "two", "no one", "ten", "two two", "two"]


def spell(data: Path, texts: list[str]) -> list[str]:
    (data / "train.ltr").write_text("".join(f"{' '.join(text.replace(' ', '|'))} |\n" for text in texts))
    return read_transcripts(read_manifest(data / "train.tsv"), data, "ltr")[0]


def test_letters_in_another_order_than_the_manifest_are_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": SAID})
    assert spell(data, SAID) == SAID
    corrected = ["one ten", "two", "no one", "two", "two two", "two"]  # another's words, in a single line
    assert spell(data, corrected) == corrected
    for order in (SAID[::-1], SAID[1:] + SAID[:1]):
        with pytest.raises(UserError, match="train.ltr, line 1, is the transcript of train.*.wav, not of train0.wav") as error:
            spell(data, order)
        assert "\n" not in str(error.value)
    (data / "parts.tsv").unlink()
    assert spell(data, SAID[::-1]) == SAID[::-1]  # nothing to compare with
