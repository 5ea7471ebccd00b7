"""Table 2 in miniature: its figures of results that are known, what it refuses, and the whole way at a toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_json

from ..helpers.benchmarks import scripts
from ..helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "learning" / "table2_mini.py"
# share of right answers of each model's forms: float, W1A1, untrained
KNOWN = {
    "transformer": (0.9, 0.8, 0.5), "sparseformer-dn": (0.8, 0.7, 0.5), "sparseformer-sw": (0.8, 0.6, 0.4),
    "conformer": (0.9, 0.5, 0.5), "squeezeformer": (0.8, 0.5, 0.2),
}  # fmt: skip


@pytest.fixture
def modules() -> Iterator[list[Any]]:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    with scripts("learning", "table2_mini", "table2_figures", "figure") as found:
        found[1].SECONDS = 1.0  # of audio, for the cost
        yield found


def _finish(bench: Any, shares: dict[str, tuple[float, float, float]], missing: str = "") -> None:
    """Leave behind what commands that have succeeded would, with these shares of right answers in every task; of seed N, N - 1% less."""
    for chains in bench.rounds():
        for step in (step for chain in chains for step in chain):
            write_json(bench._step_record(step), {"title": step.title, "command": step.shown, "seconds": 1.0})
    for cell in bench.cells:
        share = shares[cell.model][("float", "w1a1", "untrained").index(cell.form)] - 0.01 * (cell.seed - 1)
        right = np.arange(200) < round(200 * share)
        for task in cell.tasks:
            if task == missing:
                continue
            error = task in ("pr", "asr")
            rows = [[f"{i:03d}", float(value != error), 1.0] for i, value in enumerate(right)]
            folder = bench.folder(cell) / "superb" / task
            key = "per" if task == "pr" else "wer" if task == "asr" else "accuracy"
            figure = 1 - share if error else share
            write_json(folder / "result.json", {"task": task, key: figure, "steps": 10, "learning_rate": 0.01})
            write_json(folder / "utterances.json", rows)
        if cell.form != "untrained":
            valid = {
                "epoch": 1, "valid_loss": "4.1", "valid_num_updates": "600", "valid_correct_m_0": "0.21", "valid_majority_m_0": "0.1",
                "valid_code_ppl_0": "20", "valid_label_ppl_0": "40",
            }  # fmt: skip
            bench.folder(cell).mkdir(parents=True, exist_ok=True)
            (bench.folder(cell) / "train.log").write_text(f"[2026-01-01 00:00:00,000][valid][INFO] - {json.dumps(valid)}\n")
    write_json(bench.out / "recipe.json", {"settings": bench.settings})


def test_figures_of_known_results(modules: list[Any], tmp_path: Path) -> None:
    table2_mini, figures, figure = modules
    bench = table2_mini.Table2Mini(tmp_path, seeds=3)
    _finish(bench, KNOWN)
    found = bench.results()
    losses = {name: loss["mean"]["value"] for name, loss in found["losses"].items()}
    assert losses == pytest.approx({"transformer": 10, "sparseformer-dn": 10, "sparseformer-sw": 20, "conformer": 40, "squeezeformer": 30})
    assert {name: loss["share"]["value"] for name, loss in found["losses"].items()} == pytest.approx(
        {"transformer": 25, "sparseformer-dn": 100 / 3, "sparseformer-sw": 50, "conformer": 100, "squeezeformer": 50}, abs=1e-3
    )
    order = found["order"]
    assert order["difference"]["value"] == pytest.approx(35 - 40 / 3, abs=1e-3) and order["difference"]["low"] > 0
    assert (order["pairs"], order["pairs_of_the_claim"], order["pairs_of_the_claim_in_the_paper"]) == (6, 6, 4)
    # Table 2 of the paper: Conformer-S loses 3.50, 27.13, 11.97, 27.71 and 23.15 points on these tasks
    assert found["paper"]["losses"]["conformer"]["mean"] == pytest.approx(18.69, abs=0.01)
    assert order["paper_difference"] == pytest.approx(3.51, abs=0.01)
    ranks = {name: row["mean_rank"] for name, row in found["table"]["w1a1"].items()}
    assert ranks == {"transformer": 1, "sparseformer-dn": 2, "sparseformer-sw": 3, "conformer": 4.5, "squeezeformer": 4.5}
    repeated = found["repeated"]
    assert repeated["seeds"] == [1, 2, 3] and repeated["losses"]["conformer"] == pytest.approx([40, 40, 40])
    assert found["sentence"].startswith("The paper's order shows") and "over 3 seeds" in found["sentence"]
    page = (tmp_path / "table2_mini.md").read_text()
    assert found["sentence"] in page and "| conformer | Conformer-S |" in page
    model = found["models"]["sparseformer-dn"]
    assert 300_000 < model["parameters"] < 500_000 and len(model["states"]) == 7 and model["bytes"]["w1a1"] < model["bytes"]["float"] / 3

    for theme in figure.THEMES:
        figure.draw(found, theme).savefig(tmp_path / f"{theme}.svg")
        assert ElementTree.parse(tmp_path / f"{theme}.svg").getroot().tag.endswith("svg")
    paper = {line.name: line for line in figure.theirs(found)}
    assert paper["Sparseformer-DN-S"].bits[0] == pytest.approx(107.91 + 10.70) and paper["Conformer-S"].whole[0] == pytest.approx(329.39)


def test_the_order_is_said_as_it_is(modules: list[Any], tmp_path: Path) -> None:
    table2_mini, *_ = modules
    pair = ("transformer", "conformer")
    for number, (ours, theirs, said) in enumerate(
        (((0.9, 0.5, 0.1), (0.8, 0.7, 0.2), "is reversed"), ((0.8, 0.7, 0.6),) * 2 + ("does not show",))
    ):
        bench = table2_mini.Table2Mini(tmp_path / str(number), models=pair)
        _finish(bench, dict(zip(pair, (ours, theirs))))
        assert bench.results()["sentence"].startswith(f"The paper's order {said}")


def test_parameters_are_between_three_and_five_hundred_thousand(modules: list[Any], tmp_path: Path) -> None:
    bench = modules[0].Table2Mini(tmp_path)
    for name, mini in modules[0].MODELS.items():
        model = bench.build(name)
        assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 500_000, name
        assert 3 <= len(model.encoder.layers) <= 6 and model.config.normalize and mini.row in modules[2].PAPER_TABLE


def test_bad_input_is_one_line(modules: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table2_mini, *_ = modules

    def refused(*words: str) -> str:
        assert table2_mini.main(["--out", str(tmp_path), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    _finish(table2_mini.Table2Mini(tmp_path, seeds=2), KNOWN, missing="pr")
    assert "with updates=2000, not 7: take another --out" in refused("--updates", "7")
    assert "holds seeds 1 to 2, --seeds is 1: give 2 or more" in refused("--seeds", "1")
    assert "has no result of pr: run the command without --tables" in refused("--seeds", "2", "--tables")
    assert "holds results of asr, ic, sid, which --tasks leaves out" in refused("--seeds", "2", "--tasks", "ks,pr")
    assert "unknown SUPERB task 'kws'" in refused("--tasks", "ks,kws")
    assert "unknown model 'bert'" in refused("--models", "bert")
    assert "--tasks asv: its figure is not a share of right answers" in refused("--tasks", "asv")
    assert "--updates 0 must be above 0" in refused("--updates", "0")
    with pytest.raises(UserError, match="name each once"):
        table2_mini.Table2Mini(tmp_path, tasks=("ks", "ks"))


@pytest.mark.long
def test_the_whole_way_at_a_toy_size_and_a_second_run_that_does_nothing(tmp_path: Path) -> None:
    pytest.importorskip("s3prl", reason="S3PRL is not installed: pip install 'hubert-eff[superb]'")
    words = [
        sys.executable, str(SCRIPT), "--out", str(tmp_path), "--models", "sparseformer-sw", "--tasks", "ks", "--updates", "3",
        "--minutes", "0.5", "--superb-minutes", "0.2", "--batch-seconds", "4", "--head-steps", "2",
    ]  # fmt: skip
    first = subprocess.run(words, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "9 of 9 steps to run" in first.stderr and "| sparseformer-sw | W1A1 |" in first.stdout
    assert "Models of one kind only" in first.stdout
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0 and "0 of 9 steps to run" in again.stderr and again.stdout == first.stdout
