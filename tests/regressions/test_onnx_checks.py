"""The check of a one-bit ONNX graph compared with torch in train mode, and so said nothing; short audio failed; scales had not started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.exporting import onnx as onnx_export
from hubert_eff.exporting.onnx import export_onnx
from hubert_eff.layers.position import by_key
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import pack

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402


def small(quant: str) -> HubertModel:
    """Dropout everywhere, so that train mode cannot pass for eval mode."""
    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "dropout_input"), 0.3)
    model = hubert_eff.build("transformer-debug", quant=quant, encoder_layers=1, **rates).train()
    with torch.no_grad():
        model.hidden_states(torch.randn(2, 8_000))
    return model


def other_weight(graph: onnx.ModelProto) -> None:
    """The first weight matrix, by a little."""
    tensor = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) > 1)
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))


def not_a_number(graph: onnx.ModelProto) -> None:
    (output,) = graph.graph.output
    last = next(node for node in graph.graph.node if output.name in node.output)
    last.output[0] = "before"
    nothing = helper.make_node("Constant", [], ["nan"], value_float=float("nan"))
    graph.graph.node.extend([nothing, helper.make_node("Mul", ["before", "nan"], [output.name])])


def other_threshold(graph: onnx.ModelProto) -> None:
    """Bits of a block's input are those of its negative."""
    comparison = next(node for node in graph.graph.node if node.op_type == "Greater")
    comparison.op_type = "Less"


@pytest.mark.parametrize("quant", ["none", "w1a1"])
def test_a_wrong_graph_is_refused(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small(quant), tmp_path / "model.onnx"
    figures = export_onnx(model, path)
    assert figures["difference"] < 1e-4 and figures["share_off"] == 0.0
    assert model.training  # as it was
    right = path.read_bytes()
    tampers: list[Callable[[onnx.ModelProto], None]] = [other_weight, not_a_number, *([other_threshold] if quant == "w1a1" else [])]
    for tamper in tampers:

        def written(traced: torch.nn.Module, file: Path, tamper: Callable[[onnx.ModelProto], None] = tamper) -> None:
            graph = onnx.load_from_string(right)
            tamper(graph)
            onnx.save(graph, file)
            traced.train()  # as the exporter leaves it

        monkeypatch.setattr(onnx_export, "_trace", written)
        with pytest.raises(UserError, match="ONNX graph of this transformer differs from torch by .*nothing is written"):
            export_onnx(model, path)
    assert path.read_bytes() == right and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_graph_that_does_not_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_trace", lambda traced, file: onnx.save(onnx.ModelProto(), file))
    with pytest.raises(UserError, match=r"does not run in onnxruntime \(.*\): nothing is written") as raised:
        export_onnx(hubert_eff.build("transformer-debug"), tmp_path / "model.onnx")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_bit_at_a_tie_does_not_refuse_a_graph() -> None:
    """What differs from some block on, in some recordings, is a bit; what always differs, or from the start, is the graph."""

    class Session:
        def __init__(self, model: HubertModel, flips: Callable[[int], int | None], size: float) -> None:
            self.model, self.flips, self.size, self.calls = model, flips, size, 0

        def run(self, _: None, given: dict) -> list:
            states = traced(torch.from_numpy(given["wav"])).clone()
            first = self.flips(self.calls)
            self.calls += 1
            if first is not None:
                states[first:] += self.size * torch.randn_like(states[first:])
            return [states.numpy()]

    traced = onnx_export._States(small("w1a1").eval())
    long, short = (1, 9_001), (2, 720)

    def agreement(flips: Callable[[int], int | None], shape: tuple[int, int], size: float = 0.01) -> float:
        return float(onnx_export._agreement(traced, Session(traced.model, flips, size), shape).max())

    assert agreement(lambda call: 1 if call < 2 else None, short) == 0.0
    assert agreement(lambda call: 1, long) > onnx_export.AGREES
    for flips, shape, size in ((1, short, 0.01), (0, long, 0.01), (1, long, 0.5)):
        with pytest.raises(UserError, match="differs from torch by"):
            agreement(lambda call, flips=flips: flips, shape, size)


def test_relative_positions_of_few_frames() -> None:
    for frames in (1, 2, 3, 9):
        for n in range(1, frames + 1):
            by_offset = torch.randn(2, 3, n, frames + n - 1)
            traced = torch.jit.trace(by_key, by_offset)
            assert torch.equal(traced(by_offset), by_key(by_offset))


def test_scales_that_never_saw_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hubert_eff.binarize(hubert_eff.build("transformer-debug"))
    with pytest.raises(UserError, match="nothing to write as ONNX yet: 14 of 16 scales never saw data .*train mode"):
        export_onnx(model, tmp_path / "model.onnx")
    with pytest.warns(UserWarning, match="14 of 16 scales never saw data"):
        pack(model)
    with pytest.warns(UserWarning, match="14 of 16 scales never saw data"):
        hubert_eff.export(model, tmp_path / "model.safetensors")
    both = ["--out", str(tmp_path / "new.safetensors"), "--onnx", str(tmp_path / "model.onnx")]
    assert main(["export", "transformer-debug+w1a1", *both]) == 2
    assert "scales never saw data" in capsys.readouterr().err and not (tmp_path / "new.safetensors").exists()
    with torch.no_grad():
        model.train().hidden_states(torch.randn(1, 8_000))
    assert not hubert_eff.quant.modules.unstarted(model)
