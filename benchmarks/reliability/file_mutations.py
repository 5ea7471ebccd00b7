"""Exports and checkpoints changed at random: what benchmarks/reliability/fuzz_files.py, and tests, give to the readers."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hubert_eff
from hubert_eff.recognition import Recognizer, RecognizerConfig

TINY = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2", "encoder_layers": 1, "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "conv_pos": 8, "conv_pos_groups": 2, "final_dim": 8,
}  # fmt: skip

Header = dict[str, Any]

# -- exports ----------------------------------------------------------------------------------------------------------------------------


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


ABSURD: list[Any] = [
    -1, 0, 1, 2, 3, 7, 2**20, 10**6, 10**9, 2**31, 2**63, 2**80, 1e308, -0.5, True, None, "", "x" * 300, [], {}, [[[]]], "default",
    "paper", "w1a1",
]  # fmt: skip


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


EXPORTS: dict[Callable[[bytes, random.Random], bytes], int] = {  # and their shares
    flip_data: 250, flip_header: 2_700, cut: 3_600, length: 2_600, describe: 200, configure: 200, tensor: 500
}  # fmt: skip


def exports(folder: Path) -> list[bytes]:
    """Sound exports to start from."""
    path = folder / "model.safetensors"
    return [
        tiny(path),
        tiny(path, "conformer-debug+w1a1", "bf16", quant_policy="paper", depthwise_conv_kernel_size=3),
        tiny(path, "transformer-debug", "fp16"),
    ]


# -- checkpoints of torch.save ----------------------------------------------------------------------------------------------------------

Content = dict[str, Any]


def checkpoint(preset: str, **keys: Any) -> Content:
    """A small pre-trained model, laid out as fairseq's trainer does."""
    model = hubert_eff.build(preset, (5,), **{**TINY, **keys}).train()
    with torch.no_grad():
        model.hidden_states(torch.randn(1, 4_000))
    encoder = preset.partition("-")[0]
    moments = {name: torch.rand_like(weight) for name, weight in list(model.named_parameters())[:3]}
    return {
        "args": None, "more": argparse.Namespace(no_save=False),
        "cfg": {"model": {"_name": f"hubert_{encoder}", **model.config.to_dict()}, "task": {}},
        "model": model.state_dict(), "optimizer_history": [{"num_updates": 7, "lr_scheduler_state": {"best": None}}],
        "task_state": {}, "extra_state": {"train_iterator": {"epoch": 1, "shuffle": True}, "val_loss": 1.5},
        "last_optimizer_state": {"state": {0: moments}, "param_groups": [{"betas": (0.9, 0.98)}]},
    }  # fmt: skip


def recognizer() -> Content:
    """A small fine-tuned one."""
    config = RecognizerConfig(letters="|ABC", decoder_layers=1, decoder_ffn_embed_dim=32, decoder_attention_heads=2)
    config.describe(hubert_eff.build("conformer-debug", **TINY).config)
    settings = {"_name": "hubert_eff_aed", "w2v_path": None, **vars(config)}
    return {"cfg": {"model": settings, "task": {}}, "model": Recognizer(config).state_dict(), "optimizer_history": [{"num_updates": 3}]}


def saved(content: Any, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def records(content: bytes) -> list[tuple[str, bytes]]:
    """The records of a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(parts: list[tuple[str, bytes]], compressed: bool = False) -> bytes:
    """The inverse; checksums are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, part in parts:
            archive.writestr(zipfile.ZipInfo(name), part, archive.compression)
    return stream.getvalue()


def with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with another pickle."""
    if content[:2] != b"PK":
        at = content.index(b"model") - 30  # in the third pickle of a legacy file
        return content[:at] + change(content[at : at + 2_000]) + content[at + 2_000 :]
    return zipped([(name, change(part) if name.endswith("data.pkl") else part) for name, part in records(content)])


def flip_any(content: bytes, r: random.Random) -> bytes:
    changed = bytearray(content)
    size = len(changed)
    for _ in range(r.randint(1, 6)):
        places = r.randrange(size), r.randrange(min(3_000, size)), size - r.randrange(1, 1_500)  # anywhere, the pickle, the list of records
        changed[r.choice(places) % size] = r.randrange(256)
    return bytes(changed)


def flip_pickle(content: bytes, r: random.Random) -> bytes:
    def change(part: bytes) -> bytes:
        changed = bytearray(part)
        for _ in range(r.randint(1, 4)):
            changed[r.randrange(len(changed))] = r.choice((r.randrange(256), *b"}]()eutsRQbc\x81h\x85\x86\x87a."))
        return bytes(changed)

    return with_pickle(content, change)


def claim(content: bytes, r: random.Random) -> bytes:
    """Other numbers in the pickle: sizes, offsets, strides, lengths of storages."""
    if content[:2] != b"PK":
        return flip_pickle(content, r)

    def change(part: bytes) -> bytes:
        numbers = [(place, arg) for code, arg, place in pickletools.genops(part) if code.name in ("BININT", "BININT1", "BININT2")]
        for place, number in sorted(r.sample(numbers, r.randint(1, 3)), reverse=True):
            other = r.choice((0, 1, number + 1, number * 2, number * 1000, 2**31 - 1, 2**40, 2**62, -1, number // 2))
            written = pickle.dumps(other, 2)[2:-1]
            width = {b"K": 2, b"M": 3, b"J": 5}[part[place : place + 1]]
            part = part[:place] + written + part[place + width :]
        return part

    return with_pickle(content, change)


def retype(content: bytes, r: random.Random) -> bytes:
    """Storages of another dtype than was written."""
    names = (b"DoubleStorage", b"HalfStorage", b"BoolStorage", b"LongStorage", b"BFloat16Storage", b"ComplexFloatStorage", b"Tensor")
    other = r.choice(names)
    return with_pickle(content, lambda part: part.replace(b"FloatStorage", other, r.choice((1, -1))))


def rearrange(content: bytes, r: random.Random) -> bytes:
    """Records cut, lengthened, swapped, doubled, lacking, renamed, compressed, or over one another."""
    if content[:2] != b"PK":
        return cut(content, r)
    parts = records(content)
    tensors = [index for index, (name, _) in enumerate(parts) if "/data/" in name]
    one, two = r.sample(tensors, 2)
    (name, part), kind = parts[one], r.randrange(9)
    if kind == 0:
        parts[one] = name, part[: r.randrange(len(part) + 1)]
    elif kind == 1:
        parts[one] = name, part + r.randbytes(r.randint(1, 64))
    elif kind == 2:
        parts[one], parts[two] = (name, parts[two][1]), (parts[two][0], part)
    elif kind == 3:
        parts.append((r.choice((name, parts[0][0])), r.randbytes(len(part))))
    elif kind == 4:
        parts.pop(r.choice((one, 0, 1, 2)))
    elif kind == 5:
        parts[one] = r.choice((name + "x", "other/data.pkl", "", "../" + name, "x" * 60_000, "a\x1b[31m")), part
    elif kind == 6:
        parts = [(n, b"big" if n.endswith("byteorder") else p) for n, p in parts]
    elif kind == 7:
        return zipped(parts, compressed=True)
    else:
        written = bytearray(zipped(parts))
        places = [at for at in range(len(written)) if written[at : at + 4] == b"PK\x01\x02"]
        first, second = r.sample(places, 2)
        written[first + 42 : first + 46] = written[second + 42 : second + 46]
        return bytes(written)
    return zipped(parts)


def reconfigure(content: bytes, r: random.Random) -> bytes:
    """Absurd values in the configuration."""
    loaded = torch.load(io.BytesIO(content), weights_only=False)
    config = loaded["cfg"]["model"]
    bombs = ('{a: &a ["x","x"], b: [*a,*a]}', "{" * 20_000, "/etc/passwd", "\x1b]0;owned\x07", '{"modules": {"*": "binary"}}', "[" * 20_000)
    special = {
        "conv_feature_layers": ("[" * 20_000, "[" * 900 + "]" * 900, "[(8,1000000000,5)]", "[(8,2,1)] * 64 * 64", "-" * 1_900 + "1"),
        "quant_policy": bombs, "encoder_config": (*bombs, '{"encoder_layers": 1000000}'), "letters": ("|\x1b\x07", "|" + "A" * 100_000),
        "_name": ("hubert_mamba", "\x1b[2J", 7, None, "hubert_conformer", "hubert"), "decoder_layers": (10**6, -1, 200),
        "encoder_layers": (10**6, 255, 0), "encoder_embed_dim": (2**20, 2**31), "encoder_ffn_embed_dim": (2**20, 2**40),
        "depthwise_conv_kernel_size": (10**9 + 1,), "conv_pos": (10**9,), "chunk_sizes": ("1," * 100_000,),
    }  # fmt: skip
    for _ in range(r.randint(1, 2)):
        key = r.choice([*sorted(special), *sorted(config)])
        config[key] = r.choice((*special.get(key, ()), *ABSURD)) if r.random() < 0.8 else r.choice((torch.zeros(3), {"a": 1}, (1, 2)))
    where = r.choice(("cfg", "model", "task_state", "optimizer_history", "extra_state", "args"))
    if r.random() < 0.3:
        loaded[where] = r.choice((None, 1, "x", [], {}, [None], {"model": {}}, {"dictionaries": [1, None]}, torch.zeros(2)))
    return saved(loaded, r.random() < 0.3)


def _others(tensor: torch.Tensor, another: torch.Tensor) -> tuple[Callable[[], Any], ...]:
    return (
        tensor.double, tensor.half, lambda: tensor.to(torch.int32), lambda: tensor.to(torch.complex64), lambda: tensor[..., None],
        lambda: torch.zeros(()).expand(tensor.shape), lambda: torch.zeros(()).expand(2**20, 2**20), lambda: tensor.flatten().flip(0),
        lambda: tensor.to("meta"), lambda: torch.sparse_coo_tensor(size=tensor.shape), lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8), lambda: another, lambda: "text", lambda: None,
        lambda: torch.full_like(tensor, 1), lambda: torch.empty(0), lambda: {"a": tensor}, lambda: torch.rand(50, 50)[3:30:2, 5:9],
        lambda: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor, lambda: torch.zeros(tensor.shape, dtype=torch.bool),
    )  # fmt: skip


def reweigh(content: bytes, r: random.Random) -> bytes:
    """Other tensors than the configuration describes, as torch.save writes them."""
    loaded = torch.load(io.BytesIO(content), weights_only=False)
    state = loaded["model"]
    for _ in range(r.randint(1, 3)):
        name, other = r.sample(sorted(key for key in state if torch.is_tensor(state[key])), 2)
        tensor = state[name]
        state[r.choice((name, name, name, name + "x", "\x1b[31m"))] = r.choice(_others(tensor, state[other]))()
        if r.random() < 0.1:
            del state[other]
    return saved(loaded, r.random() < 0.3)


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def handmade(content: bytes, r: random.Random) -> bytes:
    """Pickles that torch.save never writes, in place of one value of the checkpoint."""
    deep = r.choice((200, 10_000, 300_000))
    called = r.choice((
        b"ctorch\nTensor\n", b"ctorch\nFloatTensor\n", b"ctorch\nUntypedStorage\n", b"c__builtin__\nbytearray\n", b"cbuiltins\neval\n",
        b"cos\nsystem\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ccollections\nCounter\n", b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n", b"c__builtin__\nset\n", b"cargparse\nNamespace\n", b"c\x1b[31m\n\x07\n", b"ctorch\ndevice\n",
    ))  # fmt: skip
    number = r.choice((b"J\xff\xff\xff\x7f", b"\x8a\x06\x00\x00\x00\x00\x00\x01", b"K\x05", _text("rm -rf"), b"N"))
    value = r.choice((
        b"]q\x7fh\x7fa",  # a list in itself
        b"}q\x7fX\x01\x00\x00\x00ah\x7fs",
        b"]" * deep + b"a" * (deep - 1),
        b")" + b"\x85" * deep,  # a tuple in a tuple in ...
        b"})" + b"\x85" * deep + b"Ns",  # as a key
        b"](]q\x00" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(60)) + b"e",  # 10^60 lists
        b"](" + _text("A" * 10_000) + b"q\x01" + b"h\x01" * 20_000 + b"e",
        b"Nr\xff\xff\xff\xff",  # a memo of 2^32 places
        b"X\xff\xff\xff\x7fabc", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"(" * deep,
        called + number + b"\x85R", called + b")R", called + b")\x81", called + b")\x81}" + _text("__class__") + number + b"sb",
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + number + b"tQ",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + number * 5 + b"tR", b"I" + b"9" * 6_000 + b"\n", b"F1e999\n", b"i__main__\nx\n",
        r.randbytes(50), b"\x95" + b"\xff" * 8 + b"N",
    ))  # fmt: skip
    key = r.choice(("model", "cfg", "extra_state", "more"))
    made = b"\x80\x02}" + _text(key) + value + b"s"
    if r.random() < 0.5:
        made = b"\x80\x02}" + _text("cfg") + b"}" + _text("model") + b"}" + _text("_name") + _text("hubert_conformer") + b"sss"[:2] + b"s"
        made += _text(key) + value + b"s"
    return zipped([("archive/data.pkl", made + b"."), ("archive/version", b"3\n"), ("archive/data/0", bytes(64))])


CHECKPOINTS: dict[Callable[[bytes, random.Random], bytes], int] = {
    cut: 100, flip_any: 100, flip_pickle: 130, claim: 140, retype: 60, rearrange: 140, reconfigure: 130, reweigh: 100, handmade: 100
}  # fmt: skip


def checkpoints() -> list[bytes]:
    """Sound checkpoints to start from, in both layouts."""
    contents = [checkpoint("transformer-debug"), checkpoint("conformer-debug+w1a1", depthwise_conv_kernel_size=3), recognizer()]
    return [saved(content, legacy) for content in contents for legacy in (False, True)]
