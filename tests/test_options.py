"""Options: what a key allows stands beside its default, is said in its help, and is checked by one function."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import yaml

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.config import Bounds, check_options, option
from hubert_eff.encoders.registry import get_encoder
from hubert_eff.errors import UserError, unknown
from hubert_eff.recognition.model import RecognizerConfig
from hubert_eff.utils.configurations import check_choices


@dataclasses.dataclass
class Keys:
    """One key of each kind."""

    share: float = option(0.5, "a share", bounds=Bounds(least=0, below=1))
    size: int = option(3, "a size", bounds=Bounds(least=1, odd=True))
    speed: float = option(1.0, "a speed", bounds=Bounds(above=0))
    kind: str = option("a", "a kind", ("a", "b"))
    free: int = option(0, "a number")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"share": 1.0}, "share=1.0 must be at least 0 and below 1"),
        ({"share": -0.1}, "share=-0.1 must be at least 0 and below 1"),
        ({"size": 4}, "size=4 must be odd, at least 1"),
        ({"size": -1}, "size=-1 must be odd, at least 1"),
        ({"speed": 0.0}, "speed=0.0 must be above 0"),
        ({"speed": math.nan}, "speed=nan must be a finite number"),
        ({"kind": "c"}, "unknown value of kind 'c'. Known: a, b"),
        ({"free": "3"}, "free='3' must be a whole number"),
    ],
)
def test_what_is_not_allowed_is_one_line(keys: dict[str, Any], message: str) -> None:
    check_options(Keys())
    check_options(Keys(share=0.0, size=1, speed=1e-9, kind="b", free=-5))
    with pytest.raises(UserError) as error:
        check_options(Keys(**keys))
    assert str(error.value) == message


def test_help_says_what_is_allowed() -> None:
    helps = [field.metadata["help"] for field in dataclasses.fields(Keys)]
    assert helps == ["a share (at least 0 and below 1)", "a size (odd, at least 1)", "a speed (above 0)", "a kind (a | b)", "a number"]
    assert str(Bounds(1, 100)) == "1 to 100" and str(Bounds(most=2)) == "at most 2"


CONFIGS = [*(get_encoder(name).config for name in hubert_eff.list_encoders()), RecognizerConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=[config.__name__ for config in CONFIGS])
def test_every_number_of_a_model_has_bounds_that_hold_its_default(config: type) -> None:
    for field in dataclasses.fields(config):
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool) and field.name != "time_recover_idx":
            bounds = field.metadata["bounds"]
            assert bounds is not None and bounds.holds(field.default) and not bounds.holds(-1) and not bounds.holds(math.nan), field.name


@pytest.mark.parametrize("name", ["conformer_s", "quantize/conformer_s_w1a1", "finetune/debug"])
def test_a_configuration_can_be_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    policy = 'model.quant_policy=\'{"feed_forward": "float", "modules": {"encoder.layers.0": "float"}}\''
    words = ["config", name, *[policy] * name.startswith("quantize")]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--explain"]) == 0
    explained = capsys.readouterr().out
    assert yaml.safe_load(explained) == yaml.safe_load(plain)
    assert any(line.startswith("  mask_prob: ") and line.endswith("(0 to 1)") for line in explained.splitlines())


def test_an_unknown_name_among_many_lists_those_near_it() -> None:
    many = [f"section.key_{i}" for i in range(100)]
    error = str(unknown("key", "section.kye_77", many, "hubert-eff config debug"))
    assert error.startswith("unknown key 'section.kye_77' - did you mean 'section.key_77'? Near it: ")
    assert error.count("section.key_") == 5 and error.endswith(". `hubert-eff config debug` shows all")
    assert str(unknown("key", "?", many, "hubert-eff config")) == "unknown key '?'. `hubert-eff config` shows all"
    assert str(unknown("key", "?", many)).count("section.key_") == 100  # there is no other place that shows them


def test_names_that_go_on_are_near() -> None:
    """`encoder=zipformer`: the debug size is offered too, though more letters follow."""
    with pytest.raises(UserError, match="did you mean 'zipformer_[sml]'.*zipformer_debug.*`hubert-eff config` shows all"):
        check_choices(["encoder=zipformer"])
