"""A recipe goes on from what earlier versions wrote down, a damaged record is one line, and a dry run leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.recipes import base
from hubert_eff.recipes.base import Recipe, Step
from hubert_eff.recipes.binarize import Binarization
from hubert_eff.recipes.pretrain import Pretraining

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

FIGURES = {"updates": 5.0, "loss": 1.5, "accuracy": 0.4, "majority": 0.1, "code perplexity": 9.0, "label perplexity": 10.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What binarization looks for before it starts."""
    for name in ("train.tsv", "valid.tsv", "dict.km.txt"):
        (tmp_path / name).write_text("x\n")
    return tmp_path


def train(words: Sequence[object]) -> int:
    """Stands in for a training run of a stage."""
    (target,) = [Path(str(word).partition("=")[2]) for word in words if str(word).startswith("checkpoint.save_dir=")]
    leave(target)
    return 0


def leave(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "checkpoint_best.pt").touch()
    figures = "loss 1.5 | correct_m_0 0.4 | majority_m_0 0.1 | code_ppl_0 9 | label_ppl_0 10 | num_updates 5"
    (target / "train.log").write_text(f"valid: epoch 001 | valid on 'valid' subset | {figures}\n")


def test_stages_that_an_earlier_version_wrote_down(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept the figures of each stage in recipe.json, and all settings, `out` among them."""
    out, ran = data / "out", []
    for stage in ("float", "w1a2"):
        leave(out / stage)
    settings = {
        "data": str(data), "labels": str(data), "out": str(out), "config": "debug", "teacher": None, "updates": [3, 2, 1],
        "policy": "default", "overrides": [],
    }  # fmt: skip
    done = {stage: {**FIGURES, "checkpoint": str(out / stage / "checkpoint_best.pt")} for stage in ("float", "w1a2")}
    (out / "recipe.json").write_text(json.dumps({"settings": settings, "done": done}))
    monkeypatch.setattr(base, "run_command", lambda words: ran.append(words) or train(words))
    assert [step["done"] for step in Binarization(data, data, out, updates=[3, 2, 1]).plan()] == [True, True, False]
    figures = Binarization(data, data, out, updates=[3, 2, 1]).run()
    assert (
        len(ran) == 1 and "model.quant=w1a1" in ran[0] and figures["float"] == done["float"] and list(figures) == ["float", "w1a2", "w1a1"]
    )
    assert Binarization(data, data, out, updates=[3, 2, 1]).run() == figures and len(ran) == 1
    (out / "w1a2" / "checkpoint_best.pt").unlink()
    Binarization(data, data, out, updates=[3, 2, 1]).run()
    assert len(ran) == 2 and "model.quant=w1a2" in ran[1]
    with pytest.raises(UserError, match="belongs to a recipe with updates=.3, 2, 1., not .3, 2, 2.: take another --out"):
        Binarization(data, data, out, updates=[3, 2, 2]).run()


def test_steps_that_an_earlier_version_wrote_down(tmp_path: Path) -> None:
    """It named their files by the words of the command, and listed the settings in recipe.json."""
    (tmp_path / "speech").mkdir()
    out = tmp_path / "out"
    words = f"hubert-eff manifest {tmp_path / 'speech'} --out {out / 'data'} --folder-level 1 --valid-percent 1"
    (out / "steps").mkdir(parents=True)
    record = {"title": "Check the audio, split it", "command": words, "seconds": 1.0}
    (out / "steps" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json").write_text(json.dumps(record))
    settings = {
        "speech": str(tmp_path / "speech"), "config": "debug", "updates": [1000, 2400], "clusters": [100, 500], "layer": 1,
        "folder_level": 1, "valid_percent": 1.0, "fit_hours": 10.0, "overrides": [],
    }  # fmt: skip
    (out / "recipe.json").write_text(json.dumps({"settings": settings}))
    recipe = Pretraining(tmp_path / "speech", out, "debug", updates=(1000, 2400))
    assert [step["done"] for step in recipe.plan()] == [True, False, False, False, False, False]
    assert {name: value for name, value in recipe.settings.items() if value is not None} == settings


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"settings": 3}', '{"settings": {}, "done": []}', "[" * 100_000])
def test_a_damaged_record_is_one_line(content: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "out").mkdir()
    (data / "out" / "recipe.json").write_text(content)
    assert main(["binarize-recipe", str(data), str(data), "--out", str(data / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hubert-eff binarize-recipe: {data / 'out' / 'recipe.json'} ") and "move it away" in line


def test_a_dry_run_leaves_nothing_behind(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(data.rglob("*"))
    words = ["binarize-recipe", str(data), str(data), "--out", str(data / "new" / "out"), "--dry-run"]
    assert main([*words, "--json"]) == 0
    assert [step["title"] for step in json.loads(capsys.readouterr().out)["steps"]] == ["float", "w1a2", "w1a1"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("$") == 0 and sorted(data.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused_by_a_dry_run(data: Path) -> None:
    (data / "file").touch()
    for out in (data / "file", data / "file" / "out", data / ("x" * 300) / "out"):
        with pytest.raises(UserError, match="is a file: name a folder|cannot be made"):
            Binarization(data, data, out).plan()


class Stages(Recipe):
    """Two stages, the second from what the first leaves behind."""

    SETTINGS = ("text",)

    def __init__(self, out: Path, text: str) -> None:
        self.out, self.text = out, text

    def steps(self) -> list[Step]:
        first, second = self.out / "first" / "a", self.out / "second" / "b"
        copy = "import shutil, sys; shutil.copy(*sys.argv[1:])"
        write = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
        return [
            Step("first", ("python", "-c", write, first, self.text), first), Step("second", ("python", "-c", copy, first, second), second)
        ]  # fmt: skip

    def results(self) -> dict[str, str]:
        return {"text": (self.out / "second" / "b").read_text()}


def test_stages_follow_one_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = Stages(tmp_path / "out", "abc")
    assert recipe.run() == {"text": "abc"} == recipe.run()
    assert capfd.readouterr().err.count("(done before)") == 2
    assert all(recipe.seconds(step) < 60 for step in recipe.steps())
    with pytest.raises(UserError, match="text=abc, not def: take another --out"):
        Stages(tmp_path / "out", "def").run()
