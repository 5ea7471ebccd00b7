"""Measured cost: what the figures consist of, never how fast something was."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hubert_eff
from hubert_eff import cli
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.kernels.cpu import Cpu
from hubert_eff.profiling import count_operations, latency, list_devices, machine, precision, read_device
from hubert_eff.profiling.latency import measure, measure_shares, shares_of
from hubert_eff.profiling.precision import at_precision

MODELS = ("transformer-debug", "conformer-debug")


@pytest.fixture(autouse=True)
def _never_slow(monkeypatch) -> None:
    monkeypatch.setattr(machine, "PROBE_LIMIT", float("inf"))  # these tests are about what is reported, on however busy a machine


@pytest.fixture(scope="module")
def models():
    return {name: hubert_eff.build(name) for name in MODELS}


def test_a_processor_is_named_with_its_family(monkeypatch, tmp_path):
    facts = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPU_FACTS", str(facts))
    facts.write_text("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\ncpu family\t: 0\nmodel name\t: another\n")
    assert machine.cpu_name() == "AMD EPYC (family 26, model 2)"
    facts.write_text("model name\t: Cortex-A76\n")
    assert machine.cpu_name() == "Cortex-A76"
    facts.unlink()
    assert machine.cpu_name()


def test_measure(models):
    timings = measure(models, [0.5, 1.0], [1, 2], rounds=3)
    assert [(t.seconds, t.batch, t.model) for t in timings] == [(s, b, m) for s in (0.5, 1.0) for b in (1, 2) for m in MODELS]
    for t in timings:
        assert 0 < t.p5_ms <= t.median_ms <= t.p95_ms and t.rounds == 3
        assert t.rtf == pytest.approx(t.median_ms / 1e3 / (t.seconds * t.batch)) and t.throughput == pytest.approx(1 / t.rtf)
        weights = sum(p.numel() * 4 for p in models[t.model].parameters())
        assert t.peak_memory_mb is None or t.peak_memory_mb >= weights / 1e6
        assert 0 < t.ratio_p5 <= t.ratio <= t.ratio_p95
        if t.model == MODELS[0]:
            assert t.ratio == t.ratio_p5 == t.ratio_p95 == 1.0
    assert all(model.training for model in models.values())  # as they were


def test_peak_memory_sees_what_is_allocated_and_freed():
    grown = machine.peak_growth(lambda: torch.ones(32 << 20), "cpu")  # 128 MiB
    assert grown is None or grown == pytest.approx(128 << 20, rel=0.1)


def test_ratios_are_taken_round_by_round(models, monkeypatch):
    times = iter([1.0, 2.0, 10.0, 30.0, 1.0, 4.0])
    monkeypatch.setattr(latency, "seconds_of", lambda call: next(times))
    first, second = measure(models, [0.5], [1], rounds=3)
    assert (first.median_ms, second.median_ms) == (1000.0, 4000.0) and second.ratio == 3.0
    assert first.rtf == 2.0 and second.throughput == 0.5 / 4.0


def check(groups: list) -> None:
    for key in ("flop_percent", "time_percent"):
        assert sum(getattr(row, key) for row in groups) == pytest.approx(100)
    assert [row.ms for row in groups] == sorted((row.ms for row in groups), reverse=True)


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_shares_of_every_encoder(encoder):
    model = hubert_eff.build(f"{encoder}-debug")
    shares = measure_shares(encoder, model, 0.5, rounds=2)
    profile = hubert_eff.profile(model, seconds=0.5)
    for groups in (shares.parts, shares.blocks, shares.kinds):
        check(groups)
    assert sum(row.params for row in shares.parts) == profile.params
    assert sum(row.flop for row in shares.parts) == sum(row.flop for row in shares.kinds) == 2 * profile.macs + profile.element_ops
    assert {row.name for row in shares.kinds} == set(profile.kinds)
    (blocks,) = [row for row in shares.parts if row.name == "encoder.layers"]
    assert sum(row.flop for row in shares.blocks) == blocks.flop
    assert sum(row.params for row in shares.blocks) == sum(p.numel() for p in model.encoder.layers.parameters())


def test_shares_worked_out_by_hand():
    class Fused(nn.Module):
        """Runs its two linears as one product: they run nothing themselves."""

        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return x @ torch.cat((self.left.weight, self.right.weight)).t()

    class Norm(nn.LayerNorm):
        """Whatever derives from LayerNorm counts as one."""

    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.layers = nn.Sequential(Norm(8), nn.Linear(8, 8, bias=False), Fused())
    ticks, x = iter(range(1000)), torch.randn(5, 8)
    with torch.no_grad(), count_operations(model, lambda: float(next(ticks))) as counts:
        model.encoder.layers(x)
    shares = shares_of("tiny", model, 1.0, counts)
    assert [row.name for row in shares.parts] == ["encoder.layers"]
    rows = {row.name: row for row in shares.blocks}
    assert {name: (row.params, row.flop) for name, row in rows.items()} == {
        "LayerNorm": (16, 40), "Linear": (64, 2 * 5 * 64), "Fused": (64, 2 * 5 * 64)
    }  # fmt: skip
    # each operation takes one tick: a norm; a transposition and a product; a concatenation, a transposition and a product
    assert [rows[name].ms for name in ("LayerNorm", "Linear", "Fused")] == [1e3, 2e3, 3e3]
    assert rows["Fused"].time_percent == 50.0 and rows["Linear"].params_percent == pytest.approx(100 * 64 / 144)


def test_a_slow_process_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(machine, "PROBE_LIMIT", 0.0)
    assert main(["bench", MODELS[0], "--seconds", "0.5", "--rounds", "1"]) == 1
    assert "discarded: before 0.5 s" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["bench", *MODELS, "--seconds", "0.5", "1", "--rounds", "2", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert torch.get_num_threads() == threads
    assert values == json.loads((tmp_path / "bench.json").read_text())
    assert values["basis"] == "measured" and values["machine"]["threads"] == 1
    assert len(values["timings"]) == len(values["shares"]) == 4 and all(t["basis"] == "measured" for t in values["timings"])
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml") and (tmp_path / "bench.png").stat().st_size > 10_000
    assert main(arguments[:-2]) == 0
    text = capsys.readouterr().out
    assert "Measured, 2 interleaved rounds" in text and "modules inside the blocks" in text and "LayerNorm" in text
    assert not any(mark in text for mark in ("\x1b", "\u2026"))


def test_one_table_of_what_would_be_shipped(tmp_path, capsys, monkeypatch):
    """Each precision of one model: the sizes of its export, and what runs it."""
    monkeypatch.setattr(precision, "require", lambda *_: None)
    asked = ["float32", "bfloat16", "int8", "w1a1"]
    assert main(["bench", "conformer-debug", "--precision", *asked, "--seconds", "0.5", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert [(r["model"], r["form"], r["precision"]) for r in rows] == [
        ("conformer-debug", "float", "float32"), ("conformer-debug", "float", "bfloat16"), ("conformer-debug", "float", "int8"),
        ("conformer-debug+w1a1", "packed", "float32"),
    ]  # fmt: skip
    model, file = hubert_eff.build("conformer-debug"), tmp_path / "model.safetensors"
    for row, keys in zip(rows, ({"fuse": True}, {"fuse": True, "dtype": "bf16"}, {"dtype": "int8"}, None), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scales that never saw data
            hubert_eff.export(hubert_eff.binarize(model) if keys is None else model, file, **(keys or {}))
        held = sum(tensor.nbytes for tensor in load_file(file).values())
        assert row["file_mb"] * 1e6 == pytest.approx(held, abs=64) and row["kernel"]  # a file keeps a byte where a panel ends


@pytest.mark.parametrize("asked", ["bfloat16", "int8", "w1a1"])
def test_a_precision_that_this_machine_lacks_is_one_line_before_measuring(asked, capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu", lambda: Cpu("AMD", "an old one", ("avx2",)))
    monkeypatch.setattr(precision.int8, "kernel", lambda: precision.int8.FLOAT)
    monkeypatch.setattr(precision, "absence", lambda: "no compiler")
    monkeypatch.setattr(latency, "measure", lambda *_: pytest.fail("it measures"))
    assert main(["bench", "conformer-debug", "--precision", "float32", asked]) == 2
    error = capsys.readouterr().err
    assert f"--precision {asked}" in error and error.count("\n") == 1


def test_cpu_time_and_a_busy_machine(monkeypatch, capsys):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (99_999.0, 0.0, 0.0))
    monkeypatch.setattr(latency, "cpu_seconds_of", lambda call: 0.25)
    monkeypatch.setattr(latency, "seconds_of", lambda call: 0.5)
    for words, median, clock in ((["--cpu-time"], 250.0, "CPU time"), ([], 500.0, "wall")):
        assert main(["bench", MODELS[0], "--seconds", "0.5", "--rounds", "1", "--json", *words]) == 0
        said = capsys.readouterr()
        values = json.loads(said.out)
        assert values["timings"][0]["median_ms"] == median and values["machine"]["clock"] == clock
        assert ("warning: the load of this machine is 99999.0" in said.err) == (not words)


def test_both_spellings_of_a_precision():
    bench, export = cli._parser("bench"), cli._parser("export")
    assert bench.parse_args(["bench", MODELS[0], "--precision", "fp32", "bf16", "float32"]).precision == ["float32", "bfloat16", "float32"]
    for name, kept in (("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16"), ("bf16", "bf16")):
        assert export.parse_args(["export", MODELS[0], "--dtype", name]).dtype == kept


def test_roofline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "SIZE", 128)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    assert main(["bench", "--roofline", "--out", str(tmp_path)]) == 0
    written = (tmp_path / "cpu.yaml").read_text()
    assert capsys.readouterr().out == written and "measured by hubert-eff bench" in written
    device = read_device(tmp_path / "cpu.yaml")
    assert {16, 32} <= set(device.tops) and device.name == machine.cpu_name() and device.bandwidth_gb_s > 0
    profile = hubert_eff.profile(MODELS[0], seconds=0.5, device=tmp_path / "cpu.yaml")
    assert profile.device == device.name
    assert profile.est_time_s["roofline"] >= 2 * profile.macs / (device.rate(32) * 1e12)
    assert "cpu" not in list_devices()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name one or more presets"),
        (["conformr-s"], "did you mean 'conformer-s'?"),
        ([MODELS[0], "--seconds", "0"], "0 s cannot be measured"),
        ([MODELS[0], "--batch", "0"], "--batch: 0 must be at least 1"),
        ([MODELS[0], "--rounds", "0"], "--rounds: 0 must be at least 1"),
        ([MODELS[0], "--threads", "0"], "--threads: 0 must be at least 1"),
        ([MODELS[0], "--precision", "fp16"], "fp16 is a storage format on a CPU"),
        ([MODELS[0], "--cpu-time", "--threads", "2"], "--cpu-time counts one thread of a CPU"),
        (["--roofline", MODELS[0]], "leave out the models"),
        ([MODELS[0], "--out", __file__], "cannot be made: File exists"),
        (["--roofline", "--out", __file__], "cannot be made: File exists"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys):
    assert main(["bench", MODELS[0], "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(capsys):
    assert main(["bench", *MODELS, "--seconds", "1", "--rounds", "3", "--device", "cuda", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["gpu"] and all(t["peak_memory_mb"] > 0 for t in values["timings"])


def test_measure_refuses_bad_lengths(models):
    with pytest.raises(UserError, match="nan s cannot be measured"):
        measure(models, [float("nan")], [1], 1)


def test_precisions_compute_the_same_at_their_width():
    model = hubert_eff.build("conformer-debug").eval()
    wav = torch.randn(1, 16_000)
    with torch.no_grad():
        exact = model.hidden_states(wav)[0][-1]
        assert at_precision(model, "float32") is model
        half = at_precision(model, "bfloat16").hidden_states(wav.bfloat16())[0][-1]
        eighth_model = at_precision(model, "int8")
        eighth = eighth_model.hidden_states(wav)[0][-1]
    for rough in (half.float(), eighth):
        assert not torch.equal(rough, exact)
        assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), 0) > 0.98
    shares = measure_shares("int8", eighth_model, 1.0, 1)
    products = 2 * (4 * 64 * 64 + 64 * 64 + 4 * 64 * 128 + 3 * 64 * 64)  # attention with its positions, feed-forward, pointwise
    assert next(row.params for row in shares.blocks if row.name == "Int8Linear") >= products
    with pytest.raises(UserError, match="unknown precision"):
        at_precision(model, "int4")
    assert main(["bench", "conformer-debug", "--seconds", "0.5", "--rounds", "1", "--precision", "float32", "int8"]) == 0
