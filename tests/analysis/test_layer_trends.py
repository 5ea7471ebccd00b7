"""Layer trends: figures of outputs, the file of a run, alarms, the command and its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff import cli
from hubert_eff.analysis.layer_trends import LayerTrends, Record, TrendLog, alarms, by_block, look, place, read_trends
from hubert_eff.encoders.base import Frames
from hubert_eff.errors import UserError

PRESETS = [p for p in hubert_eff.list_presets() if p.endswith("-debug")]


def test_figures_are_those_of_the_outputs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight[0].zero_()  # a channel that never changes
    x = torch.randn(2, 5, 4)
    with LayerTrends(model).watching() as figures:
        model(x)
    first, second = model[0](x), model(x)
    assert set(figures) == {"0", "2"}
    mean, variance, dead = figures["0"]
    assert mean == pytest.approx(float(first.mean()), abs=1e-6) and variance == pytest.approx(float(first.var(correction=0)), rel=1e-5)
    assert dead == 0.0 and figures["2"][1] == pytest.approx(float(second.var(correction=0)), rel=1e-4)
    assert figures["2"][2] == pytest.approx(1 / 3)
    assert not any(module._forward_hooks for module in model.modules())  # nothing is left behind


@pytest.mark.parametrize("preset", PRESETS)
def test_every_linear_and_convolutional_layer_is_seen(preset: str) -> None:
    model = hubert_eff.build(preset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = look(model, 7)
    kinds = ("DepthwiseConv", "PositionalConv1d")
    layers = {name for name, m in model.encoder.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ in kinds}
    parts = {name.replace("qkv_proj", part) for name in layers if "qkv_proj" in name for part in ("q_proj", "k_proj", "v_proj")}
    assert {name for name in layers if "qkv_proj" not in name} | parts == set(record.layers) and record.update == 7
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    assert look(model, 7) == record  # the same input each time
    blocks = by_block(record.layers)
    assert {f"block {i}" for i in range(1, len(model.encoder.layers) + 1)} <= set(blocks)


def test_projections_computed_as_one_product_are_told_apart() -> None:
    block = hubert_eff.build("transformer-debug").eval().encoder.layers[0]
    x = torch.randn(1, 9, 64)
    with LayerTrends(block).watching() as figures:
        block.self_attn(x)
    for key in ("q_proj", "k_proj", "v_proj"):
        y = getattr(block.self_attn, key)(x)
        assert figures[f"self_attn.{key}"][1] == pytest.approx(float(y.var(correction=0)), rel=1e-4)


def test_queries_keys_and_values_of_a_fusionformer_have_rows_of_their_own() -> None:
    block = hubert_eff.build("fusionformer-debug").eval().encoder.layers[0]
    x = torch.randn(1, 9, 64)
    with LayerTrends(block).watching() as figures:
        block(x, Frames())
    with torch.no_grad():
        y = block.self_attn.qkv_proj(torch.add(x, block.ffn1(x, None), alpha=0.5))
    for part, key in zip(y.chunk(3, -1), ("q_proj", "k_proj", "v_proj")):
        assert figures[f"self_attn.{key}"][1] == pytest.approx(float(part.var(correction=0)), rel=1e-4)
    assert "self_attn.qkv_proj" not in figures


def test_alarms() -> None:
    def record(update: int, **variances: float) -> Record:
        return Record(update, {name: (0.0, variance, 1.0 if name == "dead" else 0.0) for name, variance in variances.items()})

    good = record(0, a=1.0, b=2.0)
    assert alarms([good, record(1, a=9e3, b=1e-7)]) == []
    found = alarms([good, record(5, a=2e4, b=1e-9), record(10, a=math.nan, b=1.0, dead=1.0), record(15, a=3e4)])
    assert [(a.kind, a.layer, a.update) for a in found] == [
        ("explosion", "a", 5), ("attenuation", "b", 5), ("not finite", "a", 10), ("dead", "dead", 10),
    ]  # fmt: skip
    assert str(found[0]) == "update 5: a has exploded: variance 2e+04"


def test_a_run_that_goes_on_drops_what_came_after(tmp_path: Path) -> None:
    log = TrendLog(tmp_path)
    for update in (0, 10, 20):
        log.add(Record(update, {"layers.0.w": (0.1, math.inf if update == 20 else 2.0, 0.0)}, loss=3.0, input="batch"))
    with (tmp_path / "trends.jsonl").open("a") as stream:
        stream.write('{"update": 30, "lay')  # a kill in between
    again = TrendLog(tmp_path)
    again.add(Record(20, {"layers.0.w": (0.1, 4.0, 0.0)}))
    assert [(r.update, r.layers["layers.0.w"][1], r.input) for r in read_trends(tmp_path / "trends.jsonl")] == [
        (0, 2.0, "batch"), (10, 2.0, "batch"), (20, 4.0, "gaussian"),
    ]  # fmt: skip
    head = b'{"update": 1, "loss": null, "input": "batch", "layers": '
    for junk in (b"junk", b"\xff\xfe", head + b'{"a": [1, 2]}}', head + b"{}}"):
        (tmp_path / "trends.jsonl").write_bytes(junk + b"\n{}\n")
        with pytest.raises(UserError, match="line 1 is not a record"):
            read_trends(tmp_path / "trends.jsonl")


def test_places() -> None:
    assert place("layers.3.ffn1.w_1") == ("block 4", "ffn1.w_1")
    assert place("encoder.layers.0.self_attn.q_proj") == ("block 1", "self_attn.q_proj")
    assert place("feature_extractor.conv_layers.0.0") == ("outside the blocks", "feature_extractor.conv_layers.0.0")


def test_trends_command_on_a_run_and_on_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrendLog(tmp_path / "run")
    model = hubert_eff.build("conformer-debug")
    for update in (0, 10, 20):
        log.add(look(model, update))
        model.encoder.layers[1].ffn2.w_1.weight.data.mul_(1000)
    out = tmp_path / "out"
    assert cli.main(["trends", str(tmp_path / "run"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "explosion: " in said and "first, update 10: layers.1.ffn2.w_1 has exploded" in said
    assert json.loads((out / "trends.json").read_text())["alarms"][0]["update"] == 10 and (out / "trends.png").stat().st_size > 20_000
    other = TrendLog(tmp_path / "other")
    for update in (0, 10, 20):
        other.add(look(hubert_eff.build("transformer-debug"), update))
    assert cli.main(["trends", str(tmp_path / "run"), str(tmp_path / "other"), "--out", str(out / "two")]) == 0
    said = capsys.readouterr().out
    assert "run: explosion: " in said and "other: no alarm" in said and (out / "two" / "trends.png").stat().st_size > 20_000
    overlaid = json.loads((out / "two" / "trends.json").read_text())["runs"]
    assert set(overlaid) == {"run", "other"} and overlaid["run"] == json.loads((out / "trends.json").read_text())
    assert cli.main(["trends", str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        hubert_eff.export(hubert_eff.build("conformer-debug"), file)
    assert cli.main(["trends", *map(str, files), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["records"]) == 2 and result["alarms"] == []
    for arguments, message in (
        ([tmp_path], "no trends.jsonl in"), ([tmp_path / "none.pt"], "no checkpoint at"), ([files[0], tmp_path], "is a folder"),
    ):  # fmt: skip
        assert cli.main(["trends", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
