"""Checkpoints (.pt) that are damaged or made to do harm: memory was read past the end of storages, absurd configurations took gigabytes."""

from __future__ import annotations

import io
import struct
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from benchmarks.reliability.file_mutations import TINY, checkpoint, recognizer, records, saved, zipped
from hubert_eff.checkpoints.load import read_fairseq, updates_of
from hubert_eff.checkpoints.torchfile import TorchFile, Unreadable
from hubert_eff.config import parse_conv_layers
from hubert_eff.errors import UserError
from hubert_eff.quant.policy import read_policy
from hubert_eff.recognition import load_recognizer

from ..helpers.paths import ROOT

CODE = "is refused: it holds pickled code, not only weights"


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    torch.manual_seed(0)
    return checkpoint("transformer-debug")


def refusal(path: Path, written: bytes) -> str:
    """What is said of a file."""
    path.write_bytes(written)
    with pytest.raises(UserError) as said:
        hubert_eff.load(path)
    assert str(said.value).startswith(str(path)) and "\n" not in str(said.value) and len(str(said.value)) < 1_000
    return str(said.value)


def in_pickle(content: dict[str, Any], old: bytes, new: bytes) -> bytes:
    """The file of a checkpoint with something else in its pickle."""
    parts = records(saved(content))
    assert old in dict(parts)["archive/data.pkl"]
    return zipped([(name, part.replace(old, new, 1) if name.endswith("data.pkl") else part) for name, part in parts])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_both_layouts_load_as_they_were_saved(legacy: bool, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved(content, legacy))
    state = hubert_eff.load(path).state_dict()
    assert state.keys() == content["model"].keys() and all(torch.equal(state[name], content["model"][name]) for name in state)
    assert updates_of(path) == 7
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in content["model"].items()}
    path.write_bytes(saved({**content, "model": half}, legacy))
    state = hubert_eff.load(path).state_dict()
    assert all(torch.equal(state[name], half[name].float()) for name in state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_all_of_a_file_is_what_torch_reads_of_it(legacy: bool, content: dict[str, Any], tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    more = {
        "views": [shared, shared.T, shared[1:3, ::2], shared[0]], "ordered": OrderedDict(b=1, a=(2, [3.5, None, True])),
        "bytes": b"\x00\xff",
        "parameter": torch.nn.Parameter(torch.randn(3)), "empty": torch.empty(0, 3), "scalar": torch.tensor(5), "size": torch.Size([2, 3]),
        "dtypes": [torch.ones(3).to(d) for d in (torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64, torch.int16)],
        "set": {1, "a"}, "large": 2**40, "negative": -3, "text": "é" * 300, "dtype": torch.float16,
    }  # fmt: skip
    path = tmp_path / "model.pt"
    path.write_bytes(saved({**content, **more}, legacy))
    found, wanted = read_fairseq(path), torch.load(path, weights_only=False)

    def same(one: Any, two: Any) -> bool:
        if isinstance(two, torch.Tensor):
            return one.dtype == two.dtype and one.stride() == two.stride() and torch.equal(one, two)
        if isinstance(two, dict):
            return list(one) == list(two) and all(same(one[key], two[key]) for key in two)
        if isinstance(two, (list, tuple)):
            return len(one) == len(two) and all(map(same, one, two))
        return bool(one == two)

    assert same(found, wanted)
    assert found["views"][0].data_ptr() == found["views"][1].data_ptr() and type(found["ordered"]) is OrderedDict


def test_a_storage_of_another_size_than_claimed_is_not_read(content: dict[str, Any], tmp_path: Path) -> None:
    parts = records(saved(content))
    place = next(index for index, (name, part) in enumerate(parts) if name == "archive/data/3")
    for part in (parts[place][1][:-4], b"", parts[place][1] + bytes(4)):
        said = refusal(tmp_path / "model.pt", zipped([*parts[:place], ("archive/data/3", part), *parts[place + 1 :]]))
        assert f"the storage 3 has {len(part)} bytes, its tensors claim {len(parts[place][1])}" in said
    assert "the storage 3 is not in it" in refusal(tmp_path / "model.pt", zipped([*parts[:place], *parts[place + 1 :]]))
    legacy = saved(content, legacy=True)
    size = struct.pack("<q", content["model"]["mask_emb"].numel())
    at = legacy.index(size, len(legacy) // 4)
    said = refusal(tmp_path / "model.pt", legacy[:at] + struct.pack("<q", 9) + legacy[at + 8 :])
    assert "has another size than its tensors claim" in said
    assert "is truncated" in refusal(tmp_path / "model.pt", legacy[:-8])


def test_a_tensor_that_reaches_beyond_its_storage_is_not_read(content: dict[str, Any], tmp_path: Path) -> None:
    weight = torch.full((16,), 3.0)
    made = {**content, "model": {**content["model"], "mask_emb": weight}}
    shape = b"K\x00K\x10\x85"  # offset 0, size (16,)
    parts = dict(records(saved(made)))["archive/data.pkl"]
    assert shape in parts
    for other in (b"K\x01K\x10\x85", b"K\x00K\x11\x85", b"K\x00M\x00\x40\x85", b"K\x00J\xff\xff\xff\x7f\x85"):
        assert "reaches to element" in refusal(tmp_path / "model.pt", in_pickle(made, shape, other))
    assert "not a whole number" in refusal(tmp_path / "model.pt", in_pickle(made, shape, b"J\xff\xff\xff\xffK\x10\x85"))
    expanded = {**content, "model": {**content["model"], "mask_emb": torch.zeros(1).expand(2**20, 2**20)}}
    assert "reaches to element" in refusal(tmp_path / "model.pt", saved(expanded))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_of_one_storage_do_not_share_memory_once_loaded(legacy: bool, content: dict[str, Any], tmp_path: Path) -> None:
    both = torch.randn(2, 16)
    state = {**content["model"], "encoder.layer_norm.weight": both[0], "encoder.layer_norm.bias": both[1]}
    (tmp_path / "model.pt").write_bytes(saved({**content, "model": state}, legacy))
    model = hubert_eff.load(tmp_path / "model.pt")
    weight, bias = model.encoder.layer_norm.weight, model.encoder.layer_norm.bias
    assert torch.equal(torch.stack((weight, bias)), both)
    assert weight.untyped_storage().data_ptr() != bias.untyped_storage().data_ptr()


def test_archives_that_torch_does_not_write(content: dict[str, Any], tmp_path: Path) -> None:
    path, parts = tmp_path / "model.pt", records(saved(content))
    assert "its records are compressed" in refusal(path, zipped(parts, compressed=True))
    with pytest.warns(UserWarning, match="Duplicate"):
        assert "two of its records have one name" in refusal(path, zipped([*parts, ("archive/data/0", b"")]))
    assert "another order of bytes" in refusal(path, zipped([(n, b"big" if n.endswith("byteorder") else p) for n, p in parts]))
    written = bytearray(zipped(parts))
    first, second = (at for at in (written.rindex(b"PK\x01\x02"), written.index(b"PK\x01\x02")))
    written[first + 42 : first + 46] = written[second + 42 : second + 46]
    assert "overlap" in refusal(path, bytes(written))
    flipped = bytearray(saved(content))
    flipped[flipped.index(content["model"]["mask_emb"].numpy().tobytes())] ^= 1  # what it claims is right, a bit is not
    assert "are not those that were written" in refusal(path, bytes(flipped))


def test_a_flag_that_is_neither_true_nor_false(tmp_path: Path) -> None:
    parts = records(saved({"model": {"a": torch.tensor(True)}}))
    (tmp_path / "a.pt").write_bytes(zipped([(n, b"\x02" if n.endswith("data/0") else p) for n, p in parts]))
    with TorchFile(tmp_path / "a.pt") as opened, pytest.raises(Unreadable, match="neither true nor false"):
        opened.whole()


DEEP = 50_000
PICKLES = {
    "memory that is not the file's": (b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R", CODE),
    "a large allocation": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", CODE),
    "control codes in a name": (b"c\x1b]0;x\x07\nname\n", CODE),
    "a tensor without storage": (b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", "a kind that is not read here"),
    "a list in itself": (b"]q\x7fh\x7fa", "holds itself"),
    "nested lists": (b"]" * DEEP + b"a" * (DEEP - 1), "deeper ones, than any checkpoint"),
    "nested tuples": (b")" + b"\x85" * DEEP, "deeper ones, than any checkpoint"),
    "nested tuples as a key": (b"})" + b"\x85" * DEEP + b"Ns", "a key that is a tuple"),
    "ten lists of ten lists of": (
        b"](]q\x00" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(60)) + b"e", "than any checkpoint",
    ),
    "a long text again and again": (b"](X\x10\x27\x00\x00" + b"A" * 10_000 + b"q\x01" + b"h\x01" * 20_000 + b"e", "than any checkpoint"),
    "a text beyond the end": (b"X\xff\xff\xff\x7fabc", "is truncated"),
    "a large number": (b"\x8b\x00\x01\x00\x00" + b"\x7f" * 256, "more than 64 bits"),
    "an object of this package": (b"chubert_eff.files\nreplacing\n)\x81", CODE),
}  # fmt: skip


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_torch_does_not_write(what: str, tmp_path: Path) -> None:
    value, message = PICKLES[what]
    made = b"\x80\x02}X\x05\x00\x00\x00model" + value + b"s."
    assert message in refusal(tmp_path / "model.pt", zipped([("archive/data.pkl", made), ("archive/version", b"3\n")]))


ABSURD = {
    "layers": ({"encoder_layers": 10**6}, "encoder_layers=1000000 must be 1 to 100"),
    "a width": ({"encoder_embed_dim": 2**20, "encoder_ffn_embed_dim": 2**20}, "do not fit"),
    "a width beyond 64 bits": ({"encoder_ffn_embed_dim": 2**60}, "is too large"),
    "a positional kernel": ({"conv_pos": 10**9}, "do not fit"),
    "a kernel": ({"conv_feature_layers": "[(8,1000000000,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2"}, "cannot be read"),
    "brackets": ({"conv_feature_layers": "[" * 20_000}, "has 20000 characters"),
    "nested brackets": ({"conv_feature_layers": "[" * 900 + "]" * 900}, "cannot be read"),
    "minus signs": ({"conv_feature_layers": "-" * 1_900 + "1"}, "cannot be read"),
    "an endless text": ({"quant_policy": "{" + " " * 10**7 + "}"}, "quant_policy has 10000002 characters"),
    "aliases": ({"quant_policy": '{a: &a ["x","x"], b: [*a,*a]}'}, "its quant_policy is not valid JSON"),
    "nested mappings": ({"quant_policy": '{"a":' * 10_000 + "1" + "}" * 10_000}, "is not valid JSON"),
    "a tensor": ({"dropout": torch.zeros(3)}, "'dropout' as a Stored"),
    "many numbers": ({"streaming": True, "chunk_sizes": "1," * 20_000 + "1"}, "must be whole numbers joined by commas"),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_configurations_are_refused(what: str, content: dict[str, Any], tmp_path: Path) -> None:
    keys, message = ABSURD[what]
    config = {**content["cfg"]["model"], **keys}
    assert message in refusal(tmp_path / "model.pt", saved({**content, "cfg": {"model": config, "task": {}}}))


def test_a_policy_in_a_checkpoint_names_no_file(content: dict[str, Any], tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("password: hunter2\n")
    config = {**content["cfg"]["model"], "quant": "w1a1", "quant_policy": str(secret)}
    said = refusal(tmp_path / "model.pt", saved({**content, "cfg": {"model": config, "task": {}}}))
    assert "is neither default nor paper, nor a policy's text" in said and "hunter2" not in said and "password" not in said


def test_recognizers(tmp_path: Path) -> None:
    path, made = tmp_path / "model.pt", recognizer()
    path.write_bytes(saved(made))
    state = load_recognizer(path).state_dict()
    assert all(torch.equal(state[name], made["model"][name]) for name in made["model"])
    for key, value, message in (
        ("letters", "|\x1b\x07", "an alphabet is distinct single characters"), ("decoder_layers", 10**6, "must be 0 to 100"),
        ("decoder_attention_heads", 0, "at least 1"), ("encoder_config", "[" * 20_000, "valid JSON"), ("ctc_weight", "x", "finite number"),
        ("decoder_ffn_embed_dim", 2**20, "do not fit"),
    ):  # fmt: skip
        path.write_bytes(saved({**made, "cfg": {"model": {**made["cfg"]["model"], key: value}, "task": {}}}))
        with pytest.raises(UserError, match=message) as error:
            load_recognizer(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 1_500


def test_policies_of_a_few_lines_that_stand_for_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("a: &a [x, x]\nb: &b [*a, *a]\nmodules: [*b, *b]\n")
    with pytest.raises(UserError, match="an alias"):
        read_policy(path)
    path.write_text("modules: " + "[" * 20_000)
    with pytest.raises(UserError, match="is not valid YAML"):
        read_policy(path)
    path.write_text("modules:\n" + "".join(f"  encoder.layers.{i}: float\n" for i in range(1_000)))
    with pytest.raises(UserError, match="modules has 1000 entries, at most"):
        read_policy(path)
    with pytest.raises(UserError, match="more than 65536 characters"):
        read_policy(Path("/dev/zero") if Path("/dev/zero").is_file() else _long(path))
    path.write_text("base: paper\nmoves: none\nmodules:\n  encoder.layers.0.*: float  # kept\n")
    assert read_policy(path).moves == "none" and read_policy(read_policy(path).text) == read_policy(path)


def _long(path: Path) -> Path:
    path.write_text("#" * 100_000)
    return path


def test_what_is_said_of_an_absurd_value_is_short() -> None:
    for spec in ("[(" + "9" * 1_900 + ",1,1)]", "[" * 1_000, "x" * 10_000):
        with pytest.raises(UserError) as said:
            parse_conv_layers(spec)
        assert len(str(said.value)) < 600
    with pytest.raises(UserError) as said:
        hubert_eff.build("transformer-debug", extractor_mode="x" * 10_000)
    assert len(str(said.value)) < 600


def test_fairseq_reads_checkpoints_by_the_same_reader(tmp_path: Path) -> None:
    pytest.importorskip("fairseq")
    from fairseq import checkpoint_utils

    import fairseq_plugins  # noqa: F401

    path = tmp_path / "checkpoint_last.pt"
    made = checkpoint("transformer-debug")
    path.write_bytes(saved(made))
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert torch.equal(state["model"]["mask_emb"], made["model"]["mask_emb"]) and state["cfg"].model._name == "hubert_transformer"
    parts = records(saved(made))
    path.write_bytes(zipped([(n, p[:-4] if n.endswith("data/1") else p) for n, p in parts]))
    with pytest.raises(UserError, match="checkpoint_last.pt is damaged: the storage 1 has .* bytes, its tensors claim .*restore_file=FILE"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.long
def test_changed_files_are_refused_or_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of those of benchmarks/reliability/fuzz_files.py, each read in a process that may die."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "reliability"))
    import fuzz_files

    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz_files.fuzz(fuzz_files.cases(60, 200), 1, Path(folder), 1, lambda case, outcome: lost.append(f"{case}: {outcome}"))
    assert not lost
    assert sum(counts["loaded"] for counts in found.values()) >= 5 and sum(counts["refused"] for counts in found.values()) >= 100


def test_the_search_for_foreign_numbers_finds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "reliability"))
    import fuzz_files

    model = hubert_eff.build("transformer-debug", **TINY)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert not fuzz_files.foreign(model, stream.getvalue())
    with torch.no_grad():
        model.mask_emb[3] = 0.123456789
    assert fuzz_files.foreign(model, stream.getvalue())
