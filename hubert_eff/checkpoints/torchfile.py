"""Reads files of `torch.save` without unpickling them; tensors stay in the file until they are asked for.

Before a tensor is read, what the pickle claims is compared with the bytes in the file: `torch.load(weights_only=True)` reads past the end
of a storage that is shorter than claimed.
"""

from __future__ import annotations

import argparse
import functools
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import BUILD_ERRORS, UserError, short
from .pickled import NOT_ONE, Bad, Reader, Storage, Stored, check_extent, size_of

LONGEST_PICKLE = 1 << 26  # bytes
LONGEST_DIRECTORY = 1 << 24  # bytes of a zip file's directory
ALIGNMENT = 64  # bytes; torch aligns its own memory so
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # first bytes of the format of torch before 1.6
# errors that other bytes than a checkpoint may cause anywhere in the reader
DAMAGED = (*BUILD_ERRORS, OSError, EOFError, struct.error, zipfile.BadZipFile)

M = TypeVar("M", bound=nn.Module)


class Unreadable(UserError):
    """A file that cannot be read; `reason` follows the file's name in the message."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file} {reason}")
        self.reason = reason


# element-wise operations that initialize layers
ELEMENTWISE = {
    *"abs add clamp div empty_like mul neg ones_like rsqrt round sqrt square sub where zeros_like".split(),
    *(f"__{prefix}{name}__" for prefix in ("", "r") for name in ("add", "mul", "sub", "truediv")),
}  # fmt: skip
COMPARISONS = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__"}
SHAPED_OTHERWISE = {"amax", "cat", "matmul", "__matmul__"}
IN_PLACE = {"add_", "clamp_", "copy_", "div_", "fill_", "mul_", "sub_", "zero_", "__iadd__", "__imul__", "__isub__", "__itruediv__"}
RANDOM = {"uniform_", "normal_", *(name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))}
KNOWN = ELEMENTWISE | COMPARISONS | IN_PLACE | SHAPED_OTHERWISE


def _shaped(name: str, args: Any, named: Mapping[str, Any]) -> Tensor | None:
    """The result of an operation of `KNOWN` on the meta device, without running it; None for arguments of an unknown kind."""
    if name == "cat" and len(args) == 1 and not named and all(part.is_meta for part in args[0]):
        return args[0][0].new_empty((sum(part.size(0) for part in args[0]), *args[0][0].shape[1:]))  # type: ignore[no-any-return]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not tensors or not all(tensor.is_meta for tensor in tensors):
        return None
    first: Tensor = tensors[0]
    if name in IN_PLACE:
        return first
    if name in ELEMENTWISE or name in COMPARISONS:
        dtype = named.get("dtype") or functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return first.new_empty(np.broadcast_shapes(*(t.shape for t in tensors)), dtype=torch.bool if name in COMPARISONS else dtype)
    if name == "amax" and isinstance(args[-1], int) and not named:
        return first.new_empty((*first.shape[: args[-1]], *first.shape[args[-1] :][1:]))
    if name in ("matmul", "__matmul__") and tensors[-1].dim() == 1:
        return first.new_empty(first.shape[:-1])
    return None


class _Unfilled(TorchFunctionMode):
    """Skips random initialization and arithmetic with weights: the meta device infers shapes in Python, after seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named, name = kwargs or {}, getattr(func, "__name__", "")
        if name in RANDOM:
            return args[0] if args else named["tensor"]
        shaped = _shaped(name, args, named) if name in KNOWN else None
        return func(*args, **named) if shaped is None else shaped


def aligned(tensor: Tensor) -> Tensor:
    """Align the tensor to `ALIGNMENT` bytes as torch does: the last digit of a product can depend on the alignment of its operands."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def structure_only() -> Iterator[None]:
    """Build models inside without storage: they have names and shapes only."""
    with torch.device("meta"), _Unfilled():
        yield


class TorchFile:
    """An open file of `torch.save`. `content` is what was saved, with `Stored` instead of tensors; close it, or use it in `with`.

    `objects`: classes, by module and name, whose instances a file may hold. They are filled with plain values; their code is not called.
    Raises `Unreadable` for a file that is truncated, holds anything but tensors and plain values, or claims more than it holds.
    """

    def __init__(self, file: Path, objects: Mapping[str, type] | None = None) -> None:
        self.file, self.objects = file, {"argparse.Namespace": argparse.Namespace, **(objects or {})}
        self._claimed: dict[str, Storage] = {}
        self._places: dict[str, tuple[int, int, int | None]] = {}  # storage -> (position, bytes, checksum)
        self._read: dict[str, Tensor] = {}
        try:
            self._stream = file.open("rb")
        except OSError as error:
            raise Unreadable(file, f"cannot be read: {error.strerror}") from error
        try:
            self.content = self._open()
        except Bad as error:
            self.close()
            raise Unreadable(file, str(error)) from error
        except DAMAGED as error:
            self.close()
            raise Unreadable(file, NOT_ONE) from error

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _open(self) -> Any:
        head = self._stream.read(len(LEGACY))
        if head == LEGACY:
            return self._open_legacy()
        if head[:4] != b"PK\x03\x04":
            raise Bad(NOT_ONE)
        return self._open_zip()

    # -- two layouts -------------------------------------------------------------------------------------------------

    def _open_zip(self) -> Any:
        self._check_directory()
        with zipfile.ZipFile(self._stream) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise Bad("is damaged: two of its records have one name")
        names = [name for name in records if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise Bad(NOT_ONE)
        prefix = names[0].removesuffix("data.pkl")
        places = {name.removeprefix(prefix): self._place(info) for name, info in records.items()}
        end = 0
        for begin, size, _ in sorted(places.values()):
            if begin < end:
                raise Bad("is damaged: two of its records overlap")
            end = begin + size
        if "byteorder" in places and self._bytes(*places["byteorder"], most=16) != sys.byteorder.encode():
            raise Bad("was written on a machine with another order of bytes")
        self._places = {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}
        return self._unpickled(io.BytesIO(self._bytes(*places["data.pkl"], most=LONGEST_PICKLE)))

    def _check_directory(self) -> None:
        """Refuse a directory so long that reading it would take minutes; its size is stored at the end of the file."""
        end = self._stream.seek(0, io.SEEK_END)
        self._stream.seek(max(0, end - 98))
        tail = self._stream.read()
        if tail[-22:-18] != b"PK\x05\x06":
            raise Bad(NOT_ONE)
        (size,) = struct.unpack("<L", tail[-10:-6])
        if size == 0xFFFFFFFF and tail[-98:-94] == b"PK\x06\x06":
            (size,) = struct.unpack("<Q", tail[-58:-50])
        if size > min(LONGEST_DIRECTORY, end):
            raise Bad(NOT_ONE)

    def _place(self, info: zipfile.ZipInfo) -> tuple[int, int, int]:
        """The position of a record's bytes, behind its own header."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise Bad("is not a file of torch.save: its records are compressed")
        self._stream.seek(info.header_offset)
        header = self._stream.read(30)
        if header[:4] != b"PK\x03\x04":
            raise Bad(NOT_ONE)
        name, extra = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + name + extra, info.file_size, info.CRC

    def _open_legacy(self) -> Any:
        """Read pickles of the byte order, the content and the storages' names, then size and bytes of each storage."""
        stream = io.BytesIO(self._stream.read(LONGEST_PICKLE))
        about = Reader(self._storage, {}).read(stream)
        if not isinstance(about, dict) or about.get("little_endian", True) is not (sys.byteorder == "little"):
            raise Bad("was written on a machine with another order of bytes")
        content_at = stream.tell()
        Reader(self._claim, self.objects).read(stream)  # what it claims
        keys = Reader(self._storage, {}).read(stream)
        if type(keys) is not list or sorted(map(str, keys)) != sorted(self._claimed):
            raise Bad("is damaged: its list of storages is not that of its tensors")
        position = len(LEGACY) + stream.tell()
        for key in keys:
            self._stream.seek(position)
            header = self._stream.read(8)
            if len(header) < 8 or struct.unpack("<q", header)[0] != self._claimed[key].numel:
                raise Bad(f"is damaged: the storage {short(key)} has another size than its tensors claim")
            self._places[key] = position + 8, self._claimed[key].nbytes, None
            position += 8 + self._claimed[key].nbytes
        stream.seek(content_at)
        return self._unpickled(stream)

    # -- values ------------------------------------------------------------------------------------------------------

    def _unpickled(self, stream: io.BytesIO) -> Any:
        content = Reader(self._storage, self.objects).read(stream)
        check_extent(content, self.objects, 16 * stream.tell() + (1 << 16))
        return content

    def _claim(self, claim: Any) -> Storage:
        """The storage that a persistent id describes."""
        if type(claim) is not tuple or not 5 <= len(claim) <= 6 or claim[0] != "storage" or not isinstance(claim[1], torch.dtype):
            raise Bad("is damaged: it describes a storage in an unknown way")
        _, dtype, key, _, numel = claim[:5]
        if type(key) is not str or (len(claim) == 6 and claim[5] is not None):
            raise Bad("is damaged: it describes a storage in an unknown way")
        storage = self._claimed.setdefault(key, Storage(key, dtype, size_of(numel)))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise Bad(f"is damaged: it describes the storage {short(key)} in two ways")
        return storage

    def _storage(self, claim: Any) -> Storage:
        """The storage of a persistent id, compared with the file."""
        storage = self._claim(claim)
        position, size, _ = self._places.get(storage.key, (0, -1, None))
        if size != storage.nbytes:
            held = "is not in it" if size < 0 else f"has {size} bytes"
            raise Bad(f"is damaged: the storage {short(storage.key)} {held}, its tensors claim {storage.nbytes}")
        if position + size > self._stream.seek(0, io.SEEK_END):
            raise Bad(NOT_ONE)
        return storage

    def _bytes(self, position: int, size: int, checksum: int | None, most: int) -> bytes:
        if size > most:
            raise Bad(NOT_ONE)
        self._stream.seek(position)
        content = self._stream.read(size)
        if len(content) != size or (checksum is not None and zlib.crc32(content) != checksum):
            raise Bad(f"{NOT_ONE}: its bytes are not those that were written")
        return content

    # -- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, stored: Stored) -> Tensor:
        """Read a tensor to the CPU; tensors of one storage share memory. Raises `Unreadable` if the bytes are not those written."""
        key = stored.storage.key
        if key not in self._read:
            self._read[key] = self._numbers(stored.storage)
        return self._read[key].as_strided(stored.shape, stored.stride, stored.offset)

    def _numbers(self, storage: Storage) -> Tensor:
        position, size, checksum = self._places[storage.key]
        try:
            content = torch.empty(size, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise Unreadable(self.file, f"needs {size} bytes of memory for one of its tensors") from error
        view = memoryview(content.numpy())  # type: ignore[arg-type]
        self._stream.seek(position)
        found = self._stream.readinto(view) if size else 0
        if found != size or (checksum is not None and zlib.crc32(view) != checksum):
            raise Unreadable(self.file, f"is damaged: the bytes of its storage {short(storage.key)} are not those that were written")
        if storage.dtype == torch.bool and bool((content > 1).any()):
            raise Unreadable(self.file, f"is damaged: its storage {short(storage.key)} holds what is neither true nor false")
        return content.view(storage.dtype)

    def whole(self) -> Any:
        """The content with its tensors."""
        made: dict[int, Any] = {}

        def filled(value: Any) -> Any:  # `check_extent` has bounded the depth
            if isinstance(value, Stored):
                result: Any = self.tensor(value)
            elif isinstance(value, dict):
                result = type(value)((key, known(item)) for key, item in value.items())
            elif isinstance(value, (list, tuple)):
                result = type(value)(known(item) for item in value)
            else:
                if type(value) in self.objects.values():
                    vars(value).update({key: known(item) for key, item in vars(value).items()})
                result = value
            return result

        def known(value: Any) -> Any:
            if id(value) not in made:  # the content keeps it alive, so its id is unique
                made[id(value)] = filled(value)
            return made[id(value)]

        return known(self.content)

    def fill(self, build: Callable[[], M], weights: Mapping[str, Any]) -> M:
        """Fill the model that `build` makes with `weights`, a part of `content`; it is in eval mode on the CPU.

        It is first built without storage, and memory is allocated only if its tensors are those of the file. Raises `UserError`
        otherwise.
        """
        if not all(isinstance(name, str) and isinstance(stored, Stored) for name, stored in weights.items()):
            raise UserError("its weights are not tensors by name")
        if sum(stored.numel * stored.dtype.itemsize for stored in weights.values()) > self.file.stat().st_size:
            raise UserError("its weights are larger than the file: tensors share their bytes")
        with structure_only():
            try:
                model = build()
            except UserError:
                raise
            except BUILD_ERRORS as error:
                raise UserError(f"its configuration describes no model that can be built ({short(error)})") from error
            claimed = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in weights.items()}
        expected = model.state_dict()
        try:
            model.load_state_dict(claimed)
        except RuntimeError as error:
            raise UserError(f"the weights do not fit the model that its configuration describes: {short(error, 600)}") from error
        state: dict[str, Tensor] = {}
        used: set[str] = set()
        for name, stored in weights.items():
            wanted = expected[name].dtype
            if stored.dtype != wanted and not (stored.dtype.is_floating_point and wanted.is_floating_point):
                raise UserError(f"the weights do not fit its configuration: {name} is {stored.dtype}, not {wanted}")
            tensor = self.tensor(stored).to(wanted)
            alone = tensor.numel() == stored.storage.numel and tensor.is_contiguous() and stored.storage.key not in used
            state[name] = aligned(tensor) if alone else tensor.clone(memory_format=torch.contiguous_format)
            used.add(stored.storage.key)
        if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in expected):  # such as mel filters
            model = build()
        model.load_state_dict(state, assign=True)
        return model.eval()
