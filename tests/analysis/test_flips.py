"""Reversals of time over a split and over the checkpoints of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hubert_eff import cli
from hubert_eff.analysis.flips import FEWEST, Flips, checkpoints_of, over_utterances, table
from hubert_eff.errors import UserError

from ..helpers.recognizers import make, save


def flips(turned: int, in_order: int, unclear: int) -> Flips:
    ends = {"input": 0.9, "0": 0.8, "1": -0.7}
    return Flips(turned + in_order + unclear, turned, in_order, unclear, {1: turned}, ends, {"decoder block 1": -0.6})


def test_the_verdict_is_that_of_most_utterances() -> None:
    assert [flips(*counts).verdict for counts in ((3, 1, 1), (1, 3, 1), (1, 1, 2))] == ["reversed", "in order", "unclear"]
    said = table([(100, flips(0, 1, 5)), (200, flips(4, 1, 0))])
    assert "time is reversed from update 200 on, by block 1 (4)" in said and "+0.90" in said and "-0.60" in said
    assert "no checkpoint reverses time" in table([(100, flips(1, 4, 0))])


def test_utterances_are_counted_and_short_ones_passed_over() -> None:
    model = make(decoder_layers=1, decoder="lstm").eval()
    wavs = [torch.randn(1, 9_000) for _ in range(3)]
    found = over_utterances(model, zip(wavs, ([1, 2, 3, 4], [2, 3, 4], [1, 2])), "attention")
    assert found.utterances == 2 == found.turned + found.in_order + found.unclear
    assert set(found.places) == {"input", "0", "1", "2"} and list(found.cross_attention) == ["decoder block 1"]
    with pytest.raises(UserError, match=f"no utterance has {FEWEST} letters"):
        over_utterances(model, zip(wavs, ([1, 2],)), "attention")


def test_a_folder_of_checkpoints_is_checked_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, updates in (("checkpoint_1_30.pt", 30), ("checkpoint_last.pt", 30), ("checkpoint_1_4.pt", 4)):
        content = torch.load(save(make(decoder_layers=1), folder / name))
        torch.save({**content, "optimizer_history": [{"num_updates": updates}]}, folder / name)
    assert [(updates, file.name) for updates, file in checkpoints_of(folder)] == [(4, "checkpoint_1_4.pt"), (30, "checkpoint_1_30.pt")]
    soundfile.write(tmp_path / "0.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    (tmp_path / "valid.tsv").write_text(f"{tmp_path}\n0.wav\t9000\n")
    (tmp_path / "parts.tsv").write_text("utterance\tstart\tend\tsource\ttranscript\n0.wav\t0\t1\t0.wav\tabc\n")
    arguments = ["align", str(folder), "--manifest", str(tmp_path), "--check-flip"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "flips.json").read_text())
    assert [row["updates"] for row in found["checkpoints"]] == [4, 30] and found["checkpoints"][0]["utterances"] == 1
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "4"
    (tmp_path / "empty").mkdir()
    for bad, message in (
        ([str(tmp_path / "empty"), "--manifest", str(tmp_path), "--check-flip"], "holds no checkpoint"),
        ([str(folder), "--manifest", str(tmp_path)], "--manifest goes with --check-flip"),
        ([str(folder), "--check-flip"], "name a recording and what is said in it"),
    ):
        assert cli.main(["align", *bad]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
