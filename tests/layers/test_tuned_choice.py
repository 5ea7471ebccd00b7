"""A choice that was measured on this machine: kept as a whole, checked when it is read, and nothing to training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.layers import choice, linear
from hubert_eff.profiling import tuning

OURS = choice.Choice(((1, 1),), ((1, 1),), attention=1, relative=1, least=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "FIXED", choice.STOCK)
    choice.tuned.cache_clear()
    yield tmp_path
    choice.tuned.cache_clear()


@pytest.mark.parametrize("kept", [OURS, choice.STOCK, choice.HALF_WIDTH, choice.FULL_WIDTH])
def test_what_is_kept_is_read_and_holds_in_inference_mode_alone(kept: choice.Choice) -> None:
    assert choice.chosen() is choice.STOCK
    threads = torch.get_num_threads()
    choice.keep(kept, threads)
    assert choice.tuned(threads) == kept and choice.tuned(threads + 1) is None
    with torch.inference_mode():
        assert choice.chosen() == kept
    with torch.no_grad():
        assert choice.chosen() is choice.STOCK


def step(preset: str) -> list[torch.Tensor]:
    """Two updates, a validation after each as a trainer makes it; all parameters and what validation saw."""
    torch.manual_seed(0)
    model = hubert_eff.build(preset, dropout=0.1)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.01), []
    wav = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.train().hidden_states(wav)[0][-1].square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            seen.append(model.eval().hidden_states(wav)[0][-1])
    return [*seen, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("preset", ["conformer-debug", "transformer-debug+w1a1"])
def test_no_bit_of_a_training_depends_on_it(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = step(preset)
    choice.keep(OURS, torch.get_num_threads())
    assert all(torch.equal(a, b) for a, b in zip(before, step(preset), strict=True))
    called = []
    exact = linear.product
    monkeypatch.setattr(linear, "product", lambda *args: called.append(args) or exact(*args))
    layer, x = linear.Linear(4, 4), torch.randn(3, 4)
    layer(x)
    assert not called
    with torch.inference_mode():
        layer(x)
    assert len(called) == (linear._PRODUCT is not None)


def changed(**values: object) -> str:
    text = json.loads(choice.tuned_file(1).read_text())
    text["choice"] |= values
    return json.dumps(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda: "", lambda: "{", lambda: "[]", lambda: "null", lambda: "[" * 100_000, lambda: changed(linear=None),
        lambda: changed(linear=[[1]]), lambda: changed(linear=[["a", 2]]), lambda: changed(linear=[[1, 2], [3, 4]]),
        lambda: changed(attention=-1),
        lambda: changed(relative=1.5), lambda: changed(least=10**30), lambda: changed(least=True), lambda: changed(folded={"a": 1}),
        lambda: json.dumps(json.loads(changed()) | {"torch": "1.0"}),
        lambda: json.dumps(json.loads(changed()) | {"processor": {"vendor": "Intel", "name": "", "sets": []}}),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_and_said_once(damage: object) -> None:
    path = choice.keep(OURS, 1)
    path.write_text(damage())  # type: ignore[operator]
    with pytest.warns(UserWarning, match="is damaged .* and ignored: run hubert-eff doctor --tune again"):
        assert choice.tuned(1) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.tuned(1) is None


def test_bytes_that_are_no_text_and_a_folder_in_its_place() -> None:
    path = choice.keep(OURS, 1)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="the fixed rule holds"):
        assert choice.tuned(1) is None
    choice.tuned.cache_clear()
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="the fixed rule holds"):
        assert choice.tuned(1) is None


def test_a_size_is_taken_only_where_all_larger_ones_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning._first([(1, True), (2, False), (3, True), (4, True)]) == 3
    assert tuning._first([(1, True), (2, False)]) == choice.NEVER and tuning._first([(1, True)]) == 1
    monkeypatch.setattr(tuning, "ROWS", (2, 8))
    monkeypatch.setattr(tuning, "WEIGHTS", ((4, 4), (8, 8)))
    monkeypatch.setattr(tuning, "FRAMES", (16, 300))
    monkeypatch.setattr(tuning, "_is_faster", lambda ours, stock: bool(torch.isfinite(ours()).all() and torch.isfinite(stock()).all()))
    if linear._PRODUCT is not None:
        steps = ((8, 16), (2, 16))
        assert tuning.tune() == choice.Choice(steps, steps, attention=16, relative=16, least=16)
    monkeypatch.setattr(tuning, "_is_faster", lambda *_: False)
    assert tuning.tune() == choice.STOCK


def test_the_faster_of_two_is_found() -> None:
    few, many = torch.randn(10), torch.randn(1_000_000)
    assert tuning._is_faster(few.exp, many.exp) and not tuning._is_faster(many.exp, few.exp)


@pytest.mark.skipif(linear._PRODUCT is None, reason="torch is built without oneDNN")
def test_the_command_keeps_and_shows_it(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning, "tune", lambda: OURS)
    assert main(["doctor", "--tune", "--json"]) in (0, 1)
    printed = capsys.readouterr()
    layers = json.loads(printed.out)["float_layers"]
    assert layers["tuned attention"] == "by blocks from 1 frames on" and layers["attention"] == "torch"
    assert f"kept in {cache}" in printed.err and choice.tuned(torch.get_num_threads()) == OURS
    monkeypatch.setenv("XDG_CACHE_HOME", str(choice.tuned_file(1).parent / "float-layers.json"))
    choice.tuned_file(1).parent.parent.write_text("a file")
    monkeypatch.setattr(tuning, "tune", lambda: pytest.fail("measured for nothing"))
    assert main(["doctor", "--tune"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_compiled_layer_follows_the_rule() -> None:
    choice.keep(OURS, torch.get_num_threads())
    layer, x = linear.Linear(4, 4), torch.randn(3, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x), layer(x))
