"""Exports that are damaged, or made to do harm: each is refused in one line, or is a sound model that runs."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from benchmarks.reliability.file_mutations import Header, joined, split, tiny
from hubert_eff.checkpoints.safetensors import FORMAT_VERSION
from hubert_eff.errors import UserError

Edit = Callable[[Header, bytearray, random.Random], None]


def edited(content: bytes, edit: Edit, seed: int = 0) -> bytes:
    """The file with its header and data changed."""
    header, data = split(content)
    edit(header, data, random.Random(seed))
    return joined(header, data)


def configured(**keys: Any) -> Edit:
    """Set keys of the configuration."""

    def edit(header: Header, data: bytearray, _: random.Random) -> None:
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps({**config, **keys})

    return edit


def described(**keys: str | None) -> Edit:
    """Set keys of the metadata, or take them out."""

    def edit(header: Header, data: bytearray, _: random.Random) -> None:
        for key, value in keys.items():
            if value is None:
                del header["__metadata__"][key]
            else:
                header["__metadata__"][key] = value

    return edit


def valued(name: str, value: bytes) -> Edit:
    """Overwrite the first number of a tensor."""

    def edit(header: Header, data: bytearray, _: random.Random) -> None:
        begin = header[name]["data_offsets"][0]
        data[begin : begin + len(value)] = value

    return edit


def shaped(name: str, **keys: Any) -> Edit:
    """Change what the header says of a tensor."""

    def edit(header: Header, data: bytearray, _: random.Random) -> None:
        header[name] = {**header[name], **keys}

    return edit


def without(name: str) -> Edit:
    def edit(header: Header, data: bytearray, _: random.Random) -> None:
        entry = header.pop(name)
        begin, end = entry["data_offsets"]
        del data[begin:end]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [at - (end - begin) for at in other["data_offsets"]]

    return edit


def with_more(header: Header, data: bytearray, _: random.Random) -> None:
    header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    data += bytes(4)


BITS, SIZE = "encoder.layers.0.fc1.bits", "encoder.layers.0.fc1.size"
NAN, INFINITY, MINUS = (struct.pack("<f", number) for number in (float("nan"), float("inf"), -1.0))
HOSTILE: dict[str, tuple[Edit, str]] = {
    "another version": (described(format_version="2"), f"format version 2, written by hubert-eff .*which reads version {FORMAT_VERSION}"),
    "no version": (described(format_version=None), "format version none"),
    "no encoder": (described(encoder=None), "its metadata lack 'encoder'"),
    "an unknown encoder": (described(encoder="mamba"), "unknown encoder 'mamba'"),
    "another encoder": (described(encoder="zipformer"), "encoder_layers=1 must be"),
    "an unknown dtype": (described(dtype="int3"), "unknown dtype 'int3'"),
    "another dtype": (described(dtype="fp16"), r"mask_emb is \('F32', .*not \('F16'"),
    "other weights": (described(weights="float"), "it lacks encoder.layers.0"),
    "unknown weights": (described(weights="ternary"), "unknown kind of weights 'ternary'"),
    "many projections": (described(final_projections="9999"), "final_proj.weight is"),
    "absurd projections": (described(final_projections="-1"), "must be a number of codebooks"),
    "a fused flag": (described(fused="true"), "a binarized model cannot be fused"),
    "no JSON": (described(config="{"), "its configuration is not valid JSON"),
    "deep JSON": (described(config="[" * 60_000 + "]" * 5_000), "its configuration is not valid JSON"),
    "deep in an object": (described(config='{"seed": ' + "[" * 30_000 + "]" * 30_000 + "}"), "is not valid JSON|must be a whole number"),
    "a list": (described(config="[1]"), "is not a JSON object"),
    "a number of 50,000 digits": (described(config='{"seed": ' + "9" * 50_000 + "}"), "its configuration is not valid JSON"),
    "a long configuration": (described(config=" " * 70_000 + "{}"), "has 70002 characters"),
    "a thousand million blocks": (configured(encoder_layers=10**9), "encoder_layers=1000000000 must be 1 to 100"),
    "a width of terabytes": (configured(encoder_embed_dim=2**40, encoder_attention_heads=2**20, final_dim=8), "0x10000000000 is too large"),
    "a width beyond 64 bits": (configured(encoder_embed_dim=2**80, final_dim=8), "encoder_embed_dim=0x100.* is too large"),
    "no blocks": (configured(encoder_layers=0), "encoder_layers=0 must be 1 to 100"),
    "padding to a long multiple": (configured(required_seq_len_multiple=10**12), "required_seq_len_multiple=0xe8d4a51000 is too large"),
    "nested repetition": (configured(conv_feature_layers="[(8,2,1)]" + " * 64" * 12), "conv_feature_layers=.*cannot be read"),
    "a long list": (configured(conv_feature_layers="[(8,2,1)]" + " + [(8,2,1)]" * 500), "conv_feature_layers has 6009 characters"),
    "float": (configured(quant="none"), "packed bits, but its configuration says quant=none"),
    "two bits": (configured(quant="w1a2"), "packed bits, but its configuration says quant=w1a2"),
    "a policy in a file": (configured(quant_policy="/etc/passwd.yaml"), "is neither default nor paper"),
    "a policy with aliases": (configured(quant_policy='{a: &a ["x","x"], b: [*a,*a]}'), "its quant_policy is not valid JSON"),
    "another policy": (configured(quant_policy="paper"), "do not fit its configuration"),
    "not a number": (configured(dropout="much"), "dropout='much' must be a finite number"),
    "an unknown key": (configured(layers=3), "unknown key of TransformerConfig 'layers'"),
    "fewer heads of another shape": (configured(conv_pos_groups=4), "pos_conv.0.weight is"),
    "a NaN scale": (valued("quantizer_scales", NAN), "quantizer_scales holds numbers that are not finite"),
    "a negative scale": (valued("quantizer_scales", MINUS), "quantizer_scales holds a scale that is not positive"),
    "an infinite size": (valued(SIZE, INFINITY), f"{SIZE} holds numbers that are not finite"),
    "a size of zero": (valued(SIZE, bytes(4)), f"{SIZE} holds a scale that is not positive"),
    "a NaN bias": (valued("layer_norm.bias", NAN), "layer_norm.bias holds numbers that are not finite"),
    "bits as another type": (shaped(BITS, dtype="I8"), f"{BITS} is .'I8'"),
    "bits of another shape": (shaped(BITS, shape=[8, 8]), f"{BITS} is .'U8', .8, 8.*not .'U8', .64"),
    "a shape that overflows": (shaped(BITS, shape=[2**40, 2**40]), "truncated or damaged"),
    "offsets past the end": (shaped(BITS, data_offsets=[0, 2**50]), "truncated or damaged"),
    "offsets backwards": (shaped(BITS, data_offsets=[64, 0]), "truncated or damaged"),
    "a tensor less": (without(BITS), f"it lacks {BITS}"),
    "a tensor more": (with_more, "it has superfluous tensors, more"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    return tiny(tmp_path_factory.mktemp("sound") / "model.safetensors")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_in_one_line(what: str, sound: bytes, tmp_path: Path) -> None:
    edit, message = HOSTILE[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(edited(sound, edit))
    with pytest.raises(UserError, match=message) as said:
        hubert_eff.load(path)
    assert str(path) in str(said.value) and "\n" not in str(said.value) and len(str(said.value)) < 900


def test_a_variance_that_is_negative(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = tiny(path, "conformer-debug")
    path.write_bytes(edited(content, valued("encoder.layers.0.conv_module.batch_norm.running_var", MINUS)))
    with pytest.raises(UserError, match="running_var holds a variance that is not positive"):
        hubert_eff.load(path)
