"""One bad file stopped a report, int8 benches were left out of it, names reached pages and figures as they were, one-bit models were timed
as floats unsaid."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hubert_eff.analysis.layer_trends import FILE, read_trends
from hubert_eff.cli import main
from hubert_eff.profiling import machine, precision
from hubert_eff.profiling.latency import read
from hubert_eff.reports import page
from hubert_eff.reports.tables import as_text, plain_table

LOG = "epoch 001: 10 / 20 loss=6.1, num_updates=10\n"
TIMING = {
    "model": "conformer-debug int8", "seconds": 10.0, "batch": 1, "rounds": 2, "median_ms": 12.25, "p5_ms": 11.0, "p95_ms": 14.0,
    "rtf": 0.001, "throughput": 800.0, "peak_memory_mb": None, "ratio": 1.0, "ratio_p5": 1.0, "ratio_p95": 1.0,
}  # fmt: skip
SHARE = {"params": 1, "flop": 1, "ms": 1.0, "params_percent": 4.0, "flop_percent": 4.0, "time_percent": 4.0}
SHARES = {"model": "x\x1b[31m", "seconds": 1.0, "parts": [], "blocks": [{"name": f"C{i}<i>", **SHARE} for i in range(25)], "kinds": []}
RESULT = {"task": "ks", "upstream": "conformer-debug", "accuracy": 0.5}
BAD = {
    "result.json": ["[" * 100_000, "\0", '{"accuracy": ' + "9" * 5000 + "}"],
    "bench.json": ["{}", '{"timings": 5, "shares": 3}', json.dumps({"timings": [{**TIMING, "rtf": "x"}], "shares": []})],
    "hydra_train.log": ["nothing"],
}
SILENT = [{"task": ["ks"]}, {"upstream": 5}, {"accuracy": True}, {"task": "sf", "f1": 1, "slot_value_cer": "x"}]


def put(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good files of every kind under hostile names, and bad ones among them."""
    runs = tmp_path / "runs"
    for name in ("a$b_$\\frac{", "[red]x[bold]", "esc\x1b[31m", os.fsdecode(b"bad\xff")):
        put(runs / name, "hydra_train.log", LOG)
    put(runs / "r", "result.json", {**RESULT, "upstream": "gone\x1b<b>"})
    put(runs / "b", "bench.json", {"timings": [TIMING], "shares": [SHARES]})
    for name, contents in BAD.items():
        for index, content in enumerate(contents):
            put(runs / f"{name}-{index}", name, content)
        (runs / f"{name}-fifo").mkdir()
        os.mkfifo(runs / f"{name}-fifo" / name)
    for index, content in enumerate(SILENT):
        put(runs / f"silent-{index}", "result.json", {**RESULT, **content})
    return runs


def test_one_bad_file_never_stops_a_report(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "COSTS", {"storage": "storage, MB"})
    monkeypatch.setattr(page, "QUALITIES", {"ks": page.QUALITIES["ks"]})
    out = tmp_path / "out"
    assert main(["report", str(folder), str(tmp_path / "none"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and all(name in said.err for name in ("bench.json-0", "result.json-fifo", "no folder at"))
    report = json.loads((out / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert len(report["runs"]) == 4 and len(report["left_out"]) == sum(map(len, BAD.values())) + len(BAD) + 2
    (timing,) = report["timings"]
    assert (timing["model"], timing["precision"]) == ("conformer-debug", "int8")
    shown = (out / "report.html").read_text()
    assert "\x1b" not in shown and "conformer-debug (int8)" in shown and "12.25" in shown and "C2<i>" not in shown
    colors = {part.split("'")[0] for part in shown.split("<i style='background:")[1:]}
    assert len(colors) == 9  # eight of 25 classes (the ninth color is that of LayerNorm), and the rest


def test_an_earlier_bench_and_a_report_of_bad_files_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (timing,), (shares,) = read(folder / "b" / "bench.json")
    assert timing.label == "conformer-debug (int8)" and timing.form == shares.form == "float" and shares.precision == "float32"
    assert main(["report", str(folder / "bench.json-0"), "--out", str(tmp_path / "out")]) == 2
    assert "is not a result of" in capsys.readouterr().err


def test_one_bit_models_are_timed_packed_or_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(machine, "PROBE_LIMIT", float("inf"))
    models = ["transformer-debug+w1a1", "transformer-debug+w1a2"]
    monkeypatch.setattr(precision, "require", lambda *_: None)  # also on a processor without bfloat16
    arguments = ["bench", *models, "--seconds", "0.5", "--rounds", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--precision", "float32", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert all(said in text for said in ("debug+w1a1 (packed) ", "debug+w1a2 (simulated) ", "not the time of an export"))
    timings = json.loads((tmp_path / "bench.json").read_text())["timings"]
    forms = [(t["model"], t["form"], t["precision"]) for t in timings]
    assert forms == [(m, f, p) for m, f in zip(models, ("packed", "simulated")) for p in ("float32", "bfloat16")]
    assert main(["bench", models[0], "--precision", "int8"]) == 2
    assert "int8 is a precision of float models" in capsys.readouterr().err


def test_what_rich_takes_for_a_style_is_text() -> None:
    table = plain_table("model")
    table.add_row("runs/[red]x[/bold]/:smile:.pt")
    assert "runs/[red]x[/bold]/:smile:.pt" in as_text(table)


def test_trends_of_hostile_records_and_checkpoints(tmp_path: Path, capsys: Any) -> None:
    import hubert_eff

    head = '{"update": %s, "loss": %s, "input": "batch", "layers": {"a\\u001b[31m": [0, 1, 0]}}\n'
    for update, loss in (("1e999", "1"), ("1", '"x"'), ("[" * 100_000, "1"), ("9" * 5000, "1")):
        (tmp_path / FILE).write_text(head % (update, loss) + head % (2, 1))
        with pytest.raises(hubert_eff.errors.UserError, match="line 1 is not a record"):
            read_trends(tmp_path / FILE)
    (tmp_path / FILE).write_text(head % (1, 2))
    assert list(read_trends(tmp_path / FILE)[0].layers) == ["a\\x1b[31m"]
    hubert_eff.export(hubert_eff.build("transformer-debug"), tmp_path / "good.safetensors")
    (tmp_path / "bad.pt").write_text("no checkpoint")
    assert main(["trends", str(tmp_path / "good.safetensors"), str(tmp_path / "bad.pt")]) == 0
    said = capsys.readouterr()
    assert "left out: " in said.err and "bad.pt" in said.err and said.out.startswith("1 records of")


def test_profiles_of_hostile_names_are_one_line(capsys: Any) -> None:
    assert main(["profile", "x\x1b[31m\n[red]"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and error.count("\n") == 1
