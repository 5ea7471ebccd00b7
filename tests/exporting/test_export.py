"""Exports: packed one-bit models and float ones, what they weigh, what their metadata say, and files that must be refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hubert_eff
from hubert_eff.checkpoints.safetensors import read_metadata
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.profiling.cost import file_storage
from hubert_eff.quant import pack
from hubert_eff.quant.runtime.modules import PackedConv1d, PackedLinear, PackedQuantizer
from hubert_eff.quant.storage import SCALES, bits_of, bytes_of, exact_bias, fold_moves
from hubert_eff.reports.model_card import write_card

from ..helpers.packed import debug, differing
from ..helpers.paths import ROOT

ENCODERS = hubert_eff.list_encoders()
PRESETS = ["transformer-base", "conformer-s", "squeezeformer-xs", "sparseformer-dn-s", "sparseformer-sw-s", "fusionformer-s", "zipformer-s"]


def batch() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    return torch.randn(2, 12_000), padding


# -- packed -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["default", "paper"])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_a_packed_file_computes_what_the_simulation_does(encoder: str, policy: str, tmp_path: Path) -> None:
    """Every bit, moves of queries, keys and values folded or not."""
    model, path = debug(encoder, policy), tmp_path / "model.safetensors"
    hubert_eff.export(model, path)
    loaded = hubert_eff.load(path)
    assert not loaded.training and loaded.config == model.config and not any(p.requires_grad for p in loaded.parameters())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    wav, padding = batch()
    assert differing(loaded.hidden_states(wav, padding)[0], model.hidden_states(wav, padding)[0]) == 0
    again = tmp_path / "again.safetensors"
    hubert_eff.export(loaded, again)
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "zipformer"])
@torch.no_grad()
def test_moves_are_folded(encoder: str) -> None:
    packed = pack(debug(encoder))
    before = {name for name, module in packed.named_modules() if isinstance(module, PackedQuantizer) and module.move is not None}
    fold_moves(packed)
    after = {name for name, module in packed.named_modules() if isinstance(module, PackedQuantizer) and module.move is not None}
    folded = {name.rpartition(".")[2] for name in before - after}
    assert folded == {
        "transformer": {"query", "key", "value"}, "conformer": {"key", "value"}, "zipformer": {"query", "key", "position", "value"}
    }[encoder]  # fmt: skip


@torch.no_grad()
def test_folded_biases_keep_every_bit() -> None:
    """Against the sum of the two, which flips bits where rounding does; values are such that sums often come out next to zero."""
    inputs, flipped = 64, 0
    sums = torch.arange(-inputs, inputs + 1).float().unsqueeze(1)
    for _ in range(200):
        factor = torch.rand(300) * 10 ** torch.randint(-4, 1, (300,)) + 1e-9
        steps = torch.randint(-inputs - 4, inputs + 4, (300,))
        move = torch.randn(300) * factor
        bias = -steps * factor - move  # (steps * factor + bias) + move is zero but for rounding
        new = exact_bias(factor, bias, move, inputs)
        expected = (sums * factor + bias) + move > 0
        assert torch.equal(sums * factor + new > 0, expected)
        flipped += int(((sums * factor + (bias + move) > 0) != expected).sum())
    assert flipped > 0  # so the test sees what it is about


@torch.no_grad()
def test_stored_bits_are_the_signs_of_the_weight() -> None:
    for encoder in ("conformer", "squeezeformer"):
        model = debug(encoder, "paper")
        packed = pack(model)
        for name, module in packed.named_modules():
            if isinstance(module, (PackedLinear, PackedConv1d)):
                weight = model.get_submodule(name).weight
                stored = bytes_of(module)
                center = weight.mean()  # the paper policy: one for the whole tensor
                bits = (stored.unsqueeze(1) >> torch.arange(8) & 1).flatten()[: weight.numel()].bool()
                assert torch.equal(bits.view(weight.shape), weight > center), name
                assert torch.equal(bits_of(stored, module), module.bits)


# -- size -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_files_have_the_size_that_the_profiler_says(preset: str, tmp_path: Path) -> None:
    most = {"default": 12.8e6, "paper": 12.1e6} if preset == "sparseformer-dn-s" else {"default": float("inf")}
    for policy, limit in most.items():
        model, path = hubert_eff.build(f"{preset}+w1a1", quant_policy=policy), tmp_path / "model.safetensors"
        hubert_eff.export(model, path)
        size = path.stat().st_size
        assert size == pytest.approx(file_storage(model), rel=0.01) and size <= limit


@torch.no_grad()
def test_dtypes_of_the_rest(tmp_path: Path) -> None:
    model, path, wav = debug("conformer"), tmp_path / "model.safetensors", torch.randn(1, 12_000)
    expected = model.hidden_states(wav)[0]
    sizes = {}
    for dtype, stored, computed in (("fp32", "F32", "float32"), ("fp16", "F16", "float32"), ("bf16", "BF16", "bfloat16")):
        hubert_eff.export(model, path, dtype=dtype)
        with safe_open(path, "pt") as stream:
            held = {name: stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        assert held["layer_norm.weight"] == stored and held[SCALES] == "F32" and held["encoder.layers.0.ffn1.w_1.bits"] == "U8"
        loaded = hubert_eff.load(path)
        assert loaded.layer_norm.weight.dtype == getattr(torch, computed)
        states = loaded.hidden_states(wav)[0]
        assert torch.cosine_similarity(states[0].float().flatten(), expected[0].flatten(), 0) > 0.999
        sizes[dtype] = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert sizes[dtype] - header == pytest.approx(file_storage(loaded), rel=0.001)
    assert sizes["fp16"] < 0.7 * sizes["fp32"] and abs(sizes["fp16"] - sizes["bf16"]) < 200
    floats = hubert_eff.build("transformer-debug").eval()
    hubert_eff.export(floats, path, dtype="fp16")
    assert path.stat().st_size < 0.53 * file_storage(floats)
    loaded = hubert_eff.load(path)
    assert torch.equal(loaded.layer_norm.weight, floats.layer_norm.weight.half().float())
    assert file_storage(loaded) == pytest.approx(file_storage(floats) / 2, rel=0.01)
    with torch.no_grad():
        floats.layer_norm.weight[0] = 1e6
    with pytest.raises(UserError, match=r"cannot export as torch.float16: layer_norm.weight has values up to 1e\+06"):
        hubert_eff.export(floats, path, dtype="fp16")
    with torch.no_grad():
        floats.layer_norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="layer_norm.weight holds numbers that are not finite"):
        hubert_eff.export(floats, path)


@torch.no_grad()
def test_a_profile_of_a_file_is_that_of_the_model(tmp_path: Path) -> None:
    for encoder in ("transformer", "conformer"):
        model, path = debug(encoder), tmp_path / "model.safetensors"
        hubert_eff.export(model, path)
        a, b = hubert_eff.profile(model, 1.0), hubert_eff.profile(path, 1.0)
        assert (a.macs, a.macs_by_bits, a.gflop, a.frames) == (b.macs, b.macs_by_bits, b.gflop, b.frames)
        # moves of q, k, v (conformer: k, v) of two blocks, and the positional convolution's weight norm
        folded = 2 * 64 * (3 if encoder == "transformer" else 2) + 32
        assert a.params - b.params == folded
        assert (a.storage_mb["file"] - b.storage_mb["file"]) * 1e6 == pytest.approx(4 * folded)
        assert [row["becomes"] for row in a.quantized] == [row["becomes"] for row in b.quantized]


# -- float, and what a file says ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_models_with_tensors_that_are_not_saved(tmp_path: Path) -> None:
    """Mel filters and window are made anew."""
    for preset in ("transformer-debug", "transformer-debug+w1a1"):
        model, path = hubert_eff.build(preset, conv_feature_layers="logmel-dws").eval(), tmp_path / "model.safetensors"
        hubert_eff.export(model, path)
        wav = torch.randn(1, 8_000)
        assert differing(hubert_eff.load(path).hidden_states(wav)[0], model.hidden_states(wav)[0]) == 0


@torch.no_grad()
def test_float_weights_of_a_binarized_model_train_on(tmp_path: Path) -> None:
    path, (wav, padding) = tmp_path / "model.safetensors", batch()
    for quant in ("w1a1", "w1a2"):
        model = hubert_eff.build("conformer-debug", quant=quant)
        model.train().hidden_states(wav)
        hubert_eff.export(model.eval(), path, packed=False)
        loaded = hubert_eff.load(path)
        assert read_metadata(path)["weights"] == "float" and all(p.requires_grad for p in loaded.parameters())
        assert differing(loaded.hidden_states(wav, padding)[0], model.hidden_states(wav, padding)[0]) == 0
    hubert_eff.export(hubert_eff.build("conformer-debug+w1a2"), path)  # cannot be packed
    assert read_metadata(path)["weights"] == "float"
    with pytest.raises(UserError, match="one bit per weight: its float weights are in the checkpoint"):
        hubert_eff.export(pack(debug("conformer")), path, packed=False)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(9))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # whoever runs tests as root may read everything
    with pytest.raises(UserError, match=f"{path} cannot be read: Permission denied"):
        hubert_eff.load(path)


def test_notes_do_not_replace_what_a_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="a note cannot be called 'config': the file says that itself"):
        hubert_eff.export(hubert_eff.build("transformer-debug"), path, notes={"config": "{}", "weights": "packed"})
    assert not path.exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "secret" / "place"
    folder.mkdir(parents=True)
    source, out = folder / "checkpoint.safetensors", tmp_path / "out" / "model.safetensors"
    hubert_eff.export(debug("conformer", "paper"), source, packed=False)
    said = ["--license", "CC BY 4.0", "--trained-on", "speech | noise"]
    assert main(["export", str(source), "--out", str(out), "--dtype", "fp16", *said, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["bytes"] == out.stat().st_size and figures["weights"] == "packed" and set(figures["macs_by_bits"]) == {"32x32", "1x1"}
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"secret" not in content
    metadata = read_metadata(out)
    assert metadata["source"] == "checkpoint.safetensors" and metadata["policy"] == "paper" and metadata["dtype"] == "fp16"
    assert metadata["package_version"] == hubert_eff.__version__
    card = (tmp_path / "out" / "model.md").read_text()
    for text in ("CC BY 4.0", "speech \\| noise", "checkpoint.safetensors", "packed", f"{figures['macs']:,}", "policy `paper`"):
        assert text in card
    assert "secret" not in card
    assert main(["export", str(out), "--out", str(tmp_path / "again.safetensors"), "--trained-on", "other speech"]) == 0
    again = read_metadata(tmp_path / "again.safetensors")
    assert (again["license"], again["trained_on"]) == ("CC BY 4.0", "other speech")
    with safe_open(out, framework="pt") as stream:  # as version 0.1.0 spelled it, in files and on the command line
        held, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}
    save_file(tensors, folder / "old.safetensors", {"licence" if key == "license" else key: text for key, text in held.items()})
    assert read_metadata(folder / "old.safetensors")["license"] == "CC BY 4.0"
    assert main(["export", str(out), "--out", str(tmp_path / "again.safetensors"), "--licence", "CC0 1.0"]) == 0
    assert read_metadata(tmp_path / "again.safetensors")["license"] == "CC0 1.0"
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0].replace('"model.safetensors"', repr(str(out)))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert len(scope["states"]) == 3


def test_random_weights_are_marked_wherever_they_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the line, the card and the metadata; a file of random weights that is exported again stays one."""
    mark, out, again = "weights: random, never trained", tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    program, folder = tmp_path / "model.pt2", tmp_path / "folder"
    for words in (["--out", out, "--dtype", "int8"], ["--out", out, "--edge"], ["--out", out, "--pt2", program, "--hf", folder]):
        assert main(["export", "transformer-debug", *map(str, words)]) == 0
        said, files = capsys.readouterr().out, [word for word in words if isinstance(word, Path)]
        assert said.count(mark) == said.count("\n") == len(files)
        assert read_metadata(out)["training"] == "random, never trained" and mark in out.with_suffix(".md").read_text()
    assert "float weights in fp32; weights: random" in said and mark in (folder / "README.md").read_text()
    described = {"hubert_eff.json": ""}
    torch.export.load(program, extra_files=described)
    assert json.loads(described["hubert_eff.json"])["training"] == "random, never trained"
    assert main(["export", "transformer-debug+w1a1", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "packed weights, the rest fp32; weights: random" in said.out and re.search(r"warning: written, but \d+ of \d+ scales", said.err)
    assert main(["export", str(out), "--out", str(again)]) == 0 and mark in again.with_suffix(".md").read_text()
    hubert_eff.export(debug("transformer"), out)
    assert main(["export", str(out), "--out", str(again)]) == 0
    assert "never trained" not in again.with_suffix(".md").read_text() + capsys.readouterr().out.splitlines()[-1]


def test_the_card_of_a_model_that_streams(tmp_path: Path) -> None:
    path = tmp_path / "live.safetensors"
    model = hubert_eff.build("conformer-debug", streaming=True, chunk_sizes="8,16,0", left_chunks="4,-1")
    hubert_eff.export(model, path)
    card = write_card(path)[0].read_text()
    assert "| streams | yes; trained with chunks of 8,16,0 frames" in card and "`hubert-eff run live.safetensors - --stream 16-4` |" in card
    hubert_eff.export(model, path, notes={"training": "random, never trained"})
    assert "| streams | yes; not trained with chunks" in write_card(path)[0].read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["conformer-debug"], "--out FILE.safetensors is needed, or --hf DIR, --pt2 FILE.pt2 or --onnx FILE.onnx"),
        (["conformer-debug", "--onnx", "model.onnx", "--dtype", "fp16"], "--out FILE.safetensors or --hf DIR is written: both are missing"),
        (["conformer-debug", "--out", "model.bin"], "must end in .safetensors"),
        (["conformer-dbug", "--out", "m.safetensors"], "unknown preset or checkpoint 'conformer-dbug' - did you mean 'conformer-debug'"),
        (["conformer-debug+w1a1", "--fuse", "--out", "m.safetensors"], "a binarized model cannot be fused"),
        (["conformer-debug+w1a1", "--edge", "--out", "m.safetensors"], "this one is one-bit: leave out --edge"),
        (["conformer-debug+w1a2", "--edge", "--out", "m.safetensors"], "this one is binarized (w1a2): leave out --edge"),
        (["conformer-debug+w1a1", "--policy", "papr", "--out", "m.safetensors"], "unknown policy 'papr'"),
        (["conformer-debug", "--dtype", "fp8", "--out", "m.safetensors"], "invalid choice: 'fp8'"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.long
def test_commands_of_the_page_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = re.findall(r"<!-- run -->\n```(\w+)\n(.*?)```", page, re.S)
    assert len(blocks) == 8
    for language, body in blocks:
        program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run([*program, body], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_first_file_that_a_process_reads_imports_no_compiler(tmp_path: Path) -> None:
    """torch's meta device imports sympy and its compiler to work out shapes: seconds, of which a file of weights needs nothing."""
    files = []
    for encoder in ENCODERS:
        model = hubert_eff.build(f"{encoder}-debug").eval()
        for name, source, keys in (("packed", debug(encoder, "default"), {}), ("int8", model, {"dtype": "int8"})):
            files.append(str(tmp_path / f"{encoder}-{name}.safetensors"))
            hubert_eff.export(source, files[-1], **keys)
    program = (
        "import sys, torch, hubert_eff\n"
        "from hubert_eff.inference import extract\n"
        "heavy = {'sympy', 'torch._dynamo', 'torch.fx.experimental.symbolic_shapes'} - set(sys.modules)\n"
        "for file in sys.argv[1:]:\n"
        "    hubert_eff.load(file)\n"
        "    assert not heavy & set(sys.modules), (file, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
