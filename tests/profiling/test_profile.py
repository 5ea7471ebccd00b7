"""Devices, whole models, Table 1, and the command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import hubert_eff
from hubert_eff.checkpoints.open import open_model
from hubert_eff.checkpoints.torchfile import structure_only
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.profiling import cost, list_devices, read_device
from hubert_eff.profiling.cost import file_storage, paper_storage
from hubert_eff.profiling.formulas import ATTENTION, CONVOLUTION, COPY, GROUPED, KINDS, MATRIX
from hubert_eff.quant.packing import packed_copy
from hubert_eff.reports import table1
from hubert_eff.reports.tables import render_text

B, T, D, H = 2, 7, 12, 3
FASTCONV, FRAMES = 3_295_436_160, 499  # MACs of the extractor on 10 s, frames of 10 s


# -- devices -------------------------------------------------------------------------------------------------------------


def test_devices():
    assert {"a100", "h100", "h200"} <= set(list_devices())
    for name in list_devices():
        device = read_device(name)
        assert device.rate(16) > device.rate(32) > 0 and device.rate(1) >= device.rate(8)
    a100 = read_device("a100")
    assert (a100.rate(16), a100.rate(1), a100.rate(2)) == (312, 4992, 1248)
    assert a100.paper_time(312 * 1024, 4992 * 1024) == 2.0
    assert a100.roofline_time({(16, 16): 312 * 10**12, (1, 1): 4992 * 10**12}, 0) == 4.0
    assert a100.roofline_time({(1, 1): 1}, 2039e9) == 1.0  # reading the weights takes longer
    with pytest.raises(UserError, match="64 bits"):
        a100.roofline_time({(64, 64): 1}, 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x", "must have the keys"),
        ("[", "is not a YAML file"),
        ("{name: x, source: y, tops: {16: fast}, bandwidth_gb_s: 1}", "tops must map"),
        ("{name: x, source: y, tops: {16: 312}, bandwidth_gb_s: 0}", "bandwidth_gb_s=0"),
    ],
)
def test_bad_device_files(text, message, tmp_path):
    (tmp_path / "device.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_device(tmp_path / "device.yaml")
    with pytest.raises(UserError, match="unknown device"):
        read_device("a1000")


def expected_macs(dim: int, layers: int, per_frame: int, frames: int) -> int:
    """Extractor, projection, positional convolution (k 128, 16 groups), then per layer the weights and two products of attention."""
    projection = 0 if dim == 512 else 512 * dim * FRAMES
    return FASTCONV + projection + 8 * dim**2 * FRAMES + layers * (per_frame * frames + 2 * frames**2 * dim)


def test_transformer_base():
    result = hubert_eff.profile("transformer-base", seconds=10.0)
    assert result.params == result.params_without_labels == result.modules.params == 92_212_096
    assert result.storage_mb == {"paper": 368.848384, "file": 368.848384}
    assert paper_storage(open_model("transformer-base", structure=True), float_bytes=2) / 1e6 == 184.424192  # the paper's figure
    assert (result.samples, result.frames) == (160_000, FRAMES)
    assert result.macs == expected_macs(768, 12, 12 * 768**2, 500)  # the encoder works on a multiple of two frames
    assert result.gflop == pytest.approx(105.85, abs=0.01)
    assert result.bop_nonq_g == 32 * result.macs / 2**30 and result.bop_bq_g == 0.0
    assert result.est_time_s["paper"] == result.bop_nonq_g / (312 * 1024)
    assert result.est_time_s["roofline"] == 2 * result.macs / 19.5e12  # float32 of an A100
    attention = 12 * 2 * 500**2 * 768
    assert result.kinds[ATTENTION].macs == attention
    assert result.kinds[GROUPED].macs == 8 * 768**2 * FRAMES
    assert result.kinds[MATRIX].macs + result.kinds[CONVOLUTION].macs == result.macs - attention - result.kinds[GROUPED].macs
    modules = {module.name: module for module in result.modules.walk()}
    assert modules["feature_extractor"].macs == FASTCONV
    assert modules["final_proj"].macs == 0 < modules["final_proj"].params
    assert modules["encoder.layers.3"].macs == 12 * 768**2 * 500 + 2 * 500**2 * 768
    assert modules["encoder.layers.3.fc1"].macs == 500 * 768 * 3072


def test_conformer_s():
    with structure_only():
        absolute = hubert_eff.profile(hubert_eff.build("conformer-s", pos_enc_type="abs"))
    weights = 7 * 144**2 + 4 * 144 * 576 + 31 * 144
    assert absolute.params == 9_884_752
    assert absolute.macs == expected_macs(144, 16, weights, FRAMES)
    relative = hubert_eff.profile("conformer-s")
    assert relative.params == absolute.params + 16 * (144**2 + 2 * 144)  # linear_pos, u, v
    # linear_pos on 2T - 1 offsets, and at least T offsets per query
    least = 16 * ((2 * FRAMES - 1) * 144**2 + FRAMES**2 * 144)
    assert absolute.macs + least < relative.macs < absolute.macs + 1.5 * least


@pytest.mark.parametrize("preset", ["conformer-debug", "sparseformer-debug+w1a1", "zipformer-debug"])
def test_a_short_pass_is_run_and_counts_what_meta_tensors_do(preset, monkeypatch):
    model = open_model(preset)
    if "+" in preset:
        model = packed_copy(model)
    ran = hubert_eff.profile(model, seconds=1.0)
    monkeypatch.setattr(cost, "SHORT", 0.0)
    monkeypatch.setattr(cost, "noise", None)  # the model is not run
    followed = hubert_eff.profile(model, seconds=1.0)
    kinds = [{name: (kind.macs_by_bits, kind.element_ops) for name, kind in found.kinds.items()} for found in (ran, followed)]
    assert kinds[0] == kinds[1] and ran.macs == followed.macs > 0 and ran.frames == followed.frames
    assert [m.macs_by_bits for m in ran.modules.walk()] == [m.macs_by_bits for m in followed.modules.walk()]


def test_a_report_of_a_small_run_does_not_import_the_compiler(tmp_path):
    script = (
        "import sys, hubert_eff; hubert_eff.profile(hubert_eff.load(sys.argv[1]), seconds=1.0); "
        "sys.exit(bool({'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    hubert_eff.export(open_model("transformer-debug"), tmp_path / "model.safetensors")
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.safetensors"], check=True)


def test_profiling_leaves_the_model_as_it_was_and_repeats():
    model = hubert_eff.build("conformer-debug", num_classes=(7,))
    model.encoder.pos_conv.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = hubert_eff.profile(model, seconds=1.0)
    assert hubert_eff.profile(model, seconds=1.0) == first
    assert model.training and model.encoder.layers.training and not model.encoder.pos_conv.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert first.params - first.params_without_labels == 7 * 64
    assert hubert_eff.profile("conformer-debug", seconds=1.0).macs == first.macs


def test_counts_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    model = hubert_eff.build("conformer-debug", pos_enc_type="rel_pos")
    counted = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            counted.append(hubert_eff.profile(model, seconds=11.0))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_is_counted_and_twice_the_same(encoder):
    model = hubert_eff.build(f"{encoder}-debug")
    first = hubert_eff.profile(model, seconds=1.0)
    assert hubert_eff.profile(model, seconds=1.0) == first
    assert hubert_eff.profile(f"{encoder}-debug", seconds=1.0).macs_by_bits == first.macs_by_bits
    assert first.frames == 49 and set(first.kinds) <= set(KINDS) and COPY in first.kinds
    assert first.macs == sum(kind.macs for kind in first.kinds.values()) == first.macs_by_bits[32, 32]
    narrow = hubert_eff.profile(model.bfloat16(), seconds=1.0)
    assert narrow.macs_by_bits.get((16, 16), 0) > 0.99 * narrow.macs  # a table of positions may stay wider


LARGE = ("-m", "-ml", "-l", "-flat", "-16x384")  # these add seconds, and differ from the small ones in their sizes only


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.long) if p.endswith(LARGE) else p for p in hubert_eff.list_presets()])
def test_every_preset_is_counted(preset):
    model = open_model(preset, structure=True)
    result = hubert_eff.profile(model, seconds=0.5)
    assert result.macs > 0 and result.frames == 24 and result.bops == "paper"
    assert sum(t.macs for t in result.operations.values()) == result.macs
    assert sum(c.params for c in result.modules.children) + model.mask_emb.numel() == result.params


# -- the paper's Table 1 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return {row["preset"]: row for row in table1.table1()}


def test_table1_is_kept_as_it_is_counted(rows):
    assert list(rows.values()) == table1.table1(counts=table1.COUNTS)


def test_table1_time_follows_from_the_papers_own_bit_operations():
    assert len(table1.PAPER_TABLE) == 10
    for row in table1.PAPER_TABLE:
        assert row.recomputed_time(read_device("a100")) == pytest.approx(row.est_time_e4_s, rel=1e-3), row.title


def test_table1_float_rows(rows):
    expected = {  # parameters, GFLOP of a clean count
        "transformer-base": (92_212_096, 105.85),
        "conformer-s-table1": (32_967_760, 39.84),
        "squeezeformer-xs-table1": (33_010_096, 31.33),
    }
    for preset, (params, gflop) in expected.items():
        row = rows[preset]
        assert row["params"] == params
        assert f"{row['storage_mb']:.2f}" == f"{row['paper']['storage_mb']:.2f}"
        assert row["gflop"] == pytest.approx(gflop, abs=0.012)  # ours embeds positions on 499 frames, not on 500
        assert row["bop_nonq_g"] == pytest.approx(16 * row["gflop"] * 1e9 / 2**30) and row["bop_bq_g"] == 0.0
        assert row["est_time_e4_s"] == 1e4 * row["bop_nonq_g"] / (312 * 1024)
        assert row["difference_percent"]["gflop"] == 100 * (row["gflop"] / row["paper"]["gflop"] - 1)
    assert "368.85 MB" in rows["transformer-base"]["note"]


def test_table1_sparse_rows_are_what_is_computed(rows):
    for preset, params, gflop in (("sparseformer-dn-s", 15_203_712, 23.92), ("sparseformer-sw-s", 29_294_720, 37.95)):
        row = rows[preset]
        assert row["params"] == params
        assert f"{row['storage_mb']:.2f}" == f"{row['paper']['storage_mb']:.2f}"
        assert row["gflop"] < gflop and f"{gflop} GFLOP" in row["note"]  # the dense figure


def test_table1_binarized_row(monkeypatch):
    paper = table1.Row("BQ", "transformer-debug+w1a1", 0.5, 2.0, 3.0, 4.0, 5.0, "a reason", float_bytes=2)
    monkeypatch.setattr(table1, "PAPER_TABLE", (paper,))
    (row,) = table1.table1()
    full = hubert_eff.profile("transformer-debug")
    weights, attention = 2 * (4 * 64 * 64 + 2 * 64 * 128), 2 * 2 * 499 * 499 * 64
    moves = 2 * 3 * 64
    assert row["storage_mb"] == pytest.approx((2 * (full.params - weights - 64 + moves) + weights / 8) / 1e6, rel=1e-3)  # and scales
    assert row["bop_bq_g"] == (weights * 499 + attention) / 2**30
    assert row["gflop"] == pytest.approx(full.gflop - 2 * (weights * 499 + attention) / 1e9)
    assert row["note"].startswith("a reason; at 4 B per float")
    (product,) = table1.table1("product")
    assert product["bop_nonq_g"] == 32 * row["bop_nonq_g"] and product["bop_bq_g"] == row["bop_bq_g"]
    assert product["est_time_e4_s"] == row["est_time_e4_s"] and product["paper"]["bop_nonq_g"] == 96.0


def test_table1_command(rows, monkeypatch, capsys):
    monkeypatch.setattr(table1, "table1", lambda bops, counter: list(rows.values()))
    assert main(["profile", "--table1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["rows"]
    assert len(values) == 10
    assert {"preset", "storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s", "params"} <= set(values[0])
    assert main(["profile", "--table1"]) == 0
    text = capsys.readouterr().out
    assert all(row["row"] in text and row["note"] in text for row in values) and "estimated" in text


def test_file_storage_is_what_export_writes(tmp_path):
    model = hubert_eff.build("conformer-debug", num_classes=(7,))
    hubert_eff.export(model, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert file_storage(model) == len(content) - header


def test_command(capsys):
    assert main(["profile", "transformer-debug", "--seconds", "1", "--json", "--depth", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gflop"] == 2 * values["macs"] / 1e9 and values["seconds"] == 1.0
    children = {child["name"]: child for child in values["modules"]["children"]}
    assert children["encoder"]["macs"] > 0 and children["encoder"]["children"] == []
    assert main(["profile", "transformer-debug", "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{values['macs']:,} MACs" in text and "0-1 (2, each)" in text
    text += render_text(hubert_eff.profile("conformer-debug+w1a1", seconds=1.0))  # with long reasons
    assert not any(mark in text for mark in ("\x1b", "\u2026"))  # neither colors nor cut-off cells


def test_command_compares(capsys):
    models = ["transformer-debug", "conformer-debug"]
    assert main(["profile", *models, "--seconds", "1", "--json", "--depth", "0", "--bops", "product"]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert [p["name"] for p in profiles] == models
    assert all(p["bop_nonq_g"] == 1024 * p["macs"] / 2**30 for p in profiles)
    assert main(["profile", *models, "--seconds", "1", "--device", "h200"]) == 0
    text = capsys.readouterr().out
    assert all(f"{p['gflop']:,.2f}" in text and p["name"] in text for p in profiles) and "NVIDIA H200" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conformr-s"], "did you mean 'conformer-s'?"),
        (["conformer-s", "--seconds", "0.02"], "seconds=0.02"),
        (["conformer-s", "--seconds", "nan"], "seconds=nan"),
        (["conformer-s", "--seconds", "ten"], "argument --seconds: invalid float value: 'ten'"),
        (["conformer-s", "--second-s", "1"], "unrecognized arguments: --second-s"),
        (["conformer-s", "--depth", "-1"], "--depth: -1"),
        (["conformer-s", "--device", "a1000"], "unknown device"),
        (["conformer-s", "--table1"], "--table1 has its own models"),
        (["--table1", "--counter", "papr"], "unknown counter 'papr' - did you mean 'paper'?"),
        (["conformer-s", "--counter", "paper"], "--counter paper is for --table1"),
        ([], "name a preset"),
        (["{file}"], "is not a checkpoint"),
        (["{file}.missing"], "no checkpoint at"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "notes.pt").write_text("no checkpoint")
    assert main(["profile", *(a.format(file=tmp_path / "notes.pt") for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
