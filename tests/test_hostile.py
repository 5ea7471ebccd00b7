"""Exports that are damaged, or made to do harm: each is refused in one line, or is a sound model that runs."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.exporting import FORMAT_VERSION

TINY = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2", "encoder_layers": 1, "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "conv_pos": 8, "conv_pos_groups": 2, "final_dim": 8,
}  # fmt: skip

Header = dict[str, Any]
Edit = Callable[[Header, bytearray, random.Random], None]


def tiny(path: Path, preset: str = "transformer-debug+w1a1", dtype: str = "fp32", **keys: Any) -> bytes:
    """A small export, as bytes."""
    model = hubert_eff.build(preset, **{**TINY, **keys}).train()
    with torch.no_grad():
        model.hidden_states(torch.randn(1, 4_000))
    hubert_eff.export(model.eval(), path, dtype=dtype)
    return path.read_bytes()


def split(content: bytes) -> tuple[Header, bytearray]:
    """(header, data)."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])


def joined(header: Header, data: bytes) -> bytes:
    """The inverse of `split`."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


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
    "a fused flag": (described(fused="true"), "a binarised model cannot be fused"),
    "no JSON": (described(config="{"), "its configuration is no JSON"),
    "deep JSON": (described(config="[" * 60_000 + "]" * 5_000), "its configuration is no JSON"),
    "deep in an object": (described(config='{"seed": ' + "[" * 30_000 + "]" * 30_000 + "}"), "is no JSON|must be a whole number"),
    "a list": (described(config="[1]"), "is no JSON object"),
    "a number of 50,000 digits": (described(config='{"seed": ' + "9" * 50_000 + "}"), "its configuration is no JSON"),
    "a long configuration": (described(config=" " * 70_000 + "{}"), "has 70002 characters"),
    "a thousand million blocks": (configured(encoder_layers=10**9), "encoder_layers=1000000000: at most 256 blocks"),
    "a width of terabytes": (configured(encoder_embed_dim=2**40, encoder_attention_heads=2**20, final_dim=8), "0x10000000000 is too large"),
    "a width beyond 64 bits": (configured(encoder_embed_dim=2**80, final_dim=8), "encoder_embed_dim=0x100.* is too large"),
    "no blocks": (configured(encoder_layers=0), "encoder_layers=0 must be at least 1"),
    "padding to a long multiple": (configured(required_seq_len_multiple=10**12), "required_seq_len_multiple=0xe8d4a51000 is too large"),
    "nested repetition": (configured(conv_feature_layers="[(8,2,1)]" + " * 64" * 12), "conv_feature_layers=.*cannot be read"),
    "a long list": (configured(conv_feature_layers="[(8,2,1)]" + " + [(8,2,1)]" * 500), "conv_feature_layers has 6009 characters"),
    "float": (configured(quant="none"), "packed bits, but its configuration says quant=none"),
    "two bits": (configured(quant="w1a2"), "packed bits, but its configuration says quant=w1a2"),
    "a policy in a file": (configured(quant_policy="/etc/passwd.yaml"), "is neither default nor paper"),
    "a policy with aliases": (configured(quant_policy='{a: &a ["x","x"], b: [*a,*a]}'), "its quant_policy is no JSON"),
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
    "a tensor more": (with_more, "it has more than its configuration describes, more"),
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


# -- ten thousand of them ---------------------------------------------------------------------------------------------------------------

ABSURD = [-1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**80, 1e308, -0.5, True, None, "", "x" * 300, [], {}, [[[]]], "default", "paper", "w1a1"]


def flip_data(content: bytes, r: random.Random) -> bytes:
    changed = bytearray(content)
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(r.randint(1, 8)):
        changed[r.randrange(start, len(changed))] = r.randrange(256)
    return bytes(changed)


def flip_header(content: bytes, r: random.Random) -> bytes:
    changed = bytearray(content)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(r.randint(1, 4)):
        changed[r.randrange(end)] = r.choice((r.randrange(256), *b'0129"{}[],:-'))
    return bytes(changed)


def cut(content: bytes, r: random.Random) -> bytes:
    at = r.choice((r.randrange(9, len(content)), r.randrange(9, 40), len(content) - r.randrange(1, 9)))
    return content[:at] if r.random() < 0.8 else content + r.randbytes(r.randint(1, 64))


def length(content: bytes, r: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    other = r.choice((0, 1, 2, size - 1, size + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1, r.randrange(2 * size)))
    return struct.pack("<Q", other) + content[8:]


def describe(content: bytes, r: random.Random) -> bytes:
    header, data = split(content)
    metadata = header["__metadata__"]
    key = r.choice([key for key in metadata if key != "config"])
    choices = (None, "", "0", "1", "2", "true", "float", "packed", "fp16", "bf16", "zipformer", "conformer", "\x00", "9" * 5_000)
    value = r.choice(choices)
    metadata.pop(key)
    if value is not None:
        metadata[key] = value
    return joined(header, data)


def configure(content: bytes, r: random.Random) -> bytes:
    header, data = split(content)
    config = json.loads(header["__metadata__"]["config"])
    for _ in range(r.randint(1, 2)):
        config[r.choice(sorted(config))] = r.choice(ABSURD)
    if r.random() < 0.2:
        config.pop(r.choice(sorted(config)))
    header["__metadata__"]["config"] = json.dumps(config)
    return joined(header, data)


def tensor(content: bytes, r: random.Random) -> bytes:
    header, data = split(content)
    name = r.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    kind = r.randrange(6)
    if kind == 0:
        entry["dtype"] = r.choice(("F64", "F16", "BF16", "F32", "I8", "U8", "BOOL", "I64", "F8_E5M2", "NONE"))
    elif kind == 1:
        entry["shape"] = r.choice(([], [0], [2**63], entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**32, 2**32]))
    elif kind == 2:
        entry["data_offsets"] = r.choice(([0, end - begin], [begin, end + 1], [begin, 2**60], [end, begin], [len(data)] * 2, [-4, 0]))
    elif kind == 3:
        header[r.choice((name + "x", "", "encoder.layers.1." + name, "encoder.layers.x.y", "label_embs_concat"))] = header.pop(name)
    elif kind == 4:
        other = r.choice([name for name in header if name != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        bad = struct.pack("<f", r.choice((float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, 1e-45)))
        at = begin + r.randrange(max(1, (end - begin) // 4)) * 4
        if at + 4 <= end:
            data[at : at + 4] = bad
    return joined(header, data)


MUTATIONS = {flip_data: 250, flip_header: 2_700, cut: 3_600, length: 2_600, describe: 200, configure: 200, tensor: 500}


@pytest.mark.long
def test_ten_thousand_mutated_files(tmp_path: Path) -> None:
    """Loaded or refused: nothing crashes, hangs or reads out of bounds, and what is loaded is finite and runs."""
    r, path = random.Random(0), tmp_path / "model.safetensors"
    files = [
        tiny(path),
        tiny(path, "conformer-debug+w1a1", "bf16", quant_policy="paper", depthwise_conv_kernel_size=3),
        tiny(path, "transformer-debug", "fp16"),
    ]
    outcomes: Counter[str] = Counter()
    wav = torch.randn(1, 2_000)
    for mutate, times in MUTATIONS.items():
        for index in range(times):
            content = mutate(files[index % len(files)], r)
            path.write_bytes(content)
            try:
                model = hubert_eff.load(path)
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
                continue
            outcomes["loaded"] += 1
            assert all(bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
            if outcomes["loaded"] % 10 == 0:
                with torch.inference_mode():
                    states, _ = model.hidden_states(wav)
                assert states[-1].shape[:2] == (1, model.num_frames(2_000))
                outcomes["run"] += 1
    print(outcomes, file=sys.stderr)
    assert outcomes["refused"] + outcomes["loaded"] >= 10_000 and outcomes["run"] >= 30
