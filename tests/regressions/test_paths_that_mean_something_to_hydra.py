"""Paths with = , { ( ' and the like reach fairseq-hydra-train as they are, and others are refused before work starts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hubert_eff.errors import UserError
from hubert_eff.recipes.base import path_overrides
from hubert_eff.recipes.binarize import Binarization
from hubert_eff.recipes.demo import Demo
from hubert_eff.recipes.pretrain import Pretraining
from hubert_eff.utils.configurations import check_overrides

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

ODD = "a=b,c{d(e'f\"g h%i*jé[k]\\"


def read_back(word: str) -> str:
    """What a run sees: hydra's value, through a configuration whose interpolations are resolved."""
    value = str(OverridesParser.create().parse_override(word).value())
    return str(OmegaConf.to_container(OmegaConf.create({"path": value}), resolve=True)["path"])  # type: ignore[index,call-overload]


def test_any_path_is_read_back() -> None:
    chosen = random.Random(1)
    names = ["".join(chosen.choice("ab=,{}()[]'\"\\ %*$~:;#!?&|<>@+-é語.") for _ in range(chosen.randint(0, 9))) for _ in range(300)]
    for path in [f"/{name}" for name in (*names, ODD, "null", "1e5", "  ", "\\'", "\\\\", "a\\'\\\\", "\u3000") if "${" not in name]:
        (word,) = path_overrides({"checkpoint.save_dir": path})
        assert word.startswith("checkpoint.save_dir=") and read_back(word) == path
    assert path_overrides({"task.data": Path("/plain/path-1.x")}) == ["task.data=/plain/path-1.x"]


@pytest.mark.parametrize("path", ["/a\nb", "/a\tb", "/\x1b[2J", "/a\udce9", "/${x}", "/\u2028", "/\x7f"])
def test_what_hydra_cannot_be_given_is_one_line(path: str) -> None:
    with pytest.raises(UserError, match="training cannot be given a path with") as error:
        path_overrides({"task.data": path})
    assert str(error.value).isprintable()


@pytest.mark.parametrize("override", ["optimization.lr=[0.1", "a.b={", "a b=1", "a.b='x"])
def test_overrides_that_hydra_does_not_read_are_one_line(override: str) -> None:
    with pytest.raises(UserError, match="hydra does not read") as error:
        check_overrides(["common.seed=1", override])
    assert "\n" not in str(error.value)


def test_every_recipe_quotes_its_paths(tmp_path: Path) -> None:
    (tmp_path / ODD / "speech").mkdir(parents=True)
    recipe = Pretraining(tmp_path / ODD / "speech", tmp_path / ODD / "out", "debug")
    recipe.check()
    folder = tmp_path / ODD
    listed = [*recipe.steps(), *Binarization(folder, folder, folder).steps(), *Demo(folder / "demo").steps()]
    commands = [step.words for step in listed if step.words[0] == "fairseq-hydra-train"]
    assert len(commands) == 2 + 3 + 2
    for words in commands:
        odd = [read_back(str(word)) for word in words if "a=b" in str(word)]
        assert len(odd) >= 3 and all(value.startswith(str(tmp_path / ODD)) for value in odd)


def test_they_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    for change in ({"out": tmp_path / "${x}"}, {"out": tmp_path / "o", "overrides": ["optimization.lr=[0.1"]}):
        with pytest.raises(UserError, match="training cannot be given|hydra does not read"):
            Pretraining(tmp_path / "speech", config="debug", **change).check()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="training cannot be given"):
        Demo(tmp_path / "two\nlines").run()
    with pytest.raises(UserError, match="the recipe decides checkpoint.no_save itself"):
        Pretraining(tmp_path / "speech", tmp_path / "o", "debug", overrides=["checkpoint.no_save=true"])
    assert [path.name for path in tmp_path.iterdir()] == ["speech"]
