"""Reading checkpoints: stock HuBERT with and without fairseq, ours, and files that must be refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.checkpoints.load import average, last_checkpoints
from hubert_eff.cli import main
from hubert_eff.errors import UserError

SIZES = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "final_dim": 8,
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as fairseq's trainer writes it for stock HuBERT: pickled Dictionary objects and all."""
    pytest.importorskip("fairseq")
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    dictionary = Dictionary()
    for symbol in range(6):
        dictionary.add_symbol(str(symbol))
    cfg = OmegaConf.structured(HubertConfig(label_rate=50.0, **SIZES))
    cfg._name = "hubert"
    torch.manual_seed(0)
    model = HubertModel(cfg, HubertPretrainingConfig(sample_rate=16_000), [dictionary])
    path = tmp_path_factory.mktemp("stock") / "checkpoint.pt"
    config = {"model": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), "task": {"normalize": True}}
    torch.save({"args": None, "cfg": config, "model": model.state_dict(), "task_state": {"dictionaries": [dictionary]}}, path)
    return path


def test_stock_checkpoint_keeps_fairseqs_conventions(stock: Path) -> None:
    model = hubert_eff.load(stock)
    assert not model.training and model.num_classes == (10,)
    assert model.config.valid_frames == "fairseq" and model.config.normalize
    assert len(model.hidden_states(torch.randn(1, 8_000))[0]) == 3


def test_stock_checkpoint_loads_without_fairseq(stock: Path) -> None:
    """In a process where fairseq cannot be imported."""
    code = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import hubert_eff; m = hubert_eff.load(sys.argv[1]); print(m.num_classes, sum(p.numel() for p in m.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(stock)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(sum(p.numel() for p in hubert_eff.load(stock).parameters()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_fn": "relu"}, "activation_fn=relu cannot be rebuilt here"),
        ({"layer_type": "conformer"}, "layer_type=conformer cannot be rebuilt here"),
        ({"_name": "hubert_ctc"}, "holds the fairseq model 'hubert_ctc'"),
        ({"encoder_layers": 3}, "the weights do not fit"),
        ({"no_such_key": 1}, "unknown key of TransformerConfig 'no_such_key'"),
    ],
)
def test_models_that_cannot_be_rebuilt_exactly(stock: Path, tmp_path: Path, change: dict, message: str) -> None:
    from fairseq.data.dictionary import Dictionary

    with torch.serialization.safe_globals([Dictionary]):
        content = torch.load(stock, weights_only=True)
    content["cfg"]["model"].update(change)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        hubert_eff.load(tmp_path / "other.pt")


class Hostile:
    """Runs a command when it is unpickled blindly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    torch.save({"model": Hostile(f"touch {trace}")}, path)
    with pytest.raises(UserError, match="is refused: it holds pickled code"):
        hubert_eff.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a checkpoint", b"RIFF....WAVEfmt ", pickle.dumps([1, 2])])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a checkpoint"):
        hubert_eff.load(path)


@pytest.mark.parametrize(
    "name, how", [("m.onnx", "run it with onnxruntime, as examples/06_onnx.py"), ("m.pt2", r"torch\.export\.load\(FILE\)")]
)
def test_programs_that_others_run(name: str, how: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match=how):
        hubert_eff.load(tmp_path / name)


def test_missing_and_truncated(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        hubert_eff.load(tmp_path / "absent.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(stock.read_bytes()[:-2_000])
    with pytest.raises(UserError, match="is not a checkpoint, or is truncated"):
        hubert_eff.load(cut)
    tensors = tmp_path / "tensors.pt"
    torch.save({"weight": torch.zeros(1)}, tensors)
    with pytest.raises(UserError, match="is not a checkpoint of a model"):
        hubert_eff.load(tensors)


def test_damaged_exports(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    hubert_eff.export(hubert_eff.build("transformer-debug"), path)
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(UserError, match="truncated or damaged"):
        hubert_eff.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not an export of hubert-eff"):
        hubert_eff.load(path)
    with pytest.raises(UserError, match="a .safetensors file"):
        hubert_eff.export(hubert_eff.build("transformer-debug"), tmp_path / "model.pt")
    with pytest.raises(UserError, match="cannot export a Linear"):
        hubert_eff.export(torch.nn.Linear(2, 2), path)


def test_core_imports_neither_fairseq_nor_s3prl() -> None:
    code = (
        "import sys\n"
        "for name in ('fairseq', 's3prl', 'sklearn', 'torchaudio', 'omegaconf', 'hydra', 'soxr'): sys.modules[name] = None\n"
        "import hubert_eff, hubert_eff.cli\n"
        "hubert_eff.profile('conformer-debug', seconds=1.0); print(hubert_eff.list_presets())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_mean_of_the_last_checkpoints(tmp_path: Path) -> None:
    models = [hubert_eff.build("fusionformer-debug") for _ in range(3)]
    for model, name in zip(models, ("checkpoint_2_900", "checkpoint_3_1000", "checkpoint_1_100")):
        values = {**model.config.to_dict(), "_name": "hubert_fusionformer"}
        torch.save({"cfg": {"model": values, "task": {}}, "model": model.state_dict()}, tmp_path / f"{name}.pt")
    content = torch.load(tmp_path / "checkpoint_3_1000.pt", weights_only=True)
    torch.save({**content, "optimizer_history": [{"num_updates": 1000}]}, tmp_path / "checkpoint_last.pt")
    files = last_checkpoints(tmp_path, 2)
    assert [file.name for file in files] == ["checkpoint_2_900.pt", "checkpoint_3_1000.pt"]
    mean = average(files).state_dict()
    for key, value in mean.items():
        one, two = (model.state_dict()[key] for model in models[:2])
        torch.testing.assert_close(value, (one + two) / 2 if value.is_floating_point() else two)
    assert main(["export", str(tmp_path), "--average", "2", "--out", str(tmp_path / "mean.safetensors")]) == 0
    read = hubert_eff.load(tmp_path / "mean.safetensors").state_dict()
    assert all(torch.equal(read[key], mean[key]) for key in read)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no checkpoint of a run: give its save_dir"):
        last_checkpoints(tmp_path / "none", 4)
    torch.save({**content, "optimizer_history": [{"num_updates": 1001}]}, tmp_path / "checkpoint_last.pt")  # of the end of an epoch
    assert [file.name for file in last_checkpoints(tmp_path, 2)] == ["checkpoint_3_1000.pt", "checkpoint_last.pt"]
    hubert_eff.export(hubert_eff.build("conformer-debug"), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="are not of one run: encoder is conformer and fusionformer"):
        average([tmp_path / "other.safetensors", files[0]])


def test_a_mean_names_the_key_that_differs_and_takes_what_only_training_reads(tmp_path: Path) -> None:
    files = {}
    for name, keys in (("a", {}), ("dropout", {"dropout": 0.3, "mask_prob": 0.5}), ("wide", {"encoder_ffn_embed_dim": 64})):
        files[name] = tmp_path / f"{name}.safetensors"
        hubert_eff.export(hubert_eff.build("transformer-debug", **keys), files[name])
    assert average([files["a"], files["dropout"]]).config.dropout == 0.3
    with pytest.raises(UserError, match=r"not of one run: encoder_ffn_embed_dim is \d+ and 64$"):
        average([files["a"], files["wide"]])


def test_epochs_count_as_checkpoints_of_a_run(tmp_path: Path) -> None:
    model = hubert_eff.build("transformer-debug")
    content = {"cfg": {"model": {**model.config.to_dict(), "_name": "hubert_transformer"}, "task": {}}, "model": model.state_dict()}
    for name, update in (("checkpoint1", 10), ("checkpoint2", 20), ("checkpoint_2_15", 15), ("checkpoint_last", 20)):
        torch.save({**content, "optimizer_history": [{"num_updates": update}]}, tmp_path / f"{name}.pt")
    assert [file.name for file in last_checkpoints(tmp_path, 4)] == ["checkpoint1.pt", "checkpoint_2_15.pt", "checkpoint2.pt"]
