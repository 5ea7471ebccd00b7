"""Reads pickles without unpickling them: plain values, and tensors as descriptions of bytes elsewhere in the file.

A pickle is a list of instructions. Those that build values are followed here; a name in it (`collections.OrderedDict`) is looked up in a
short list of functions of this module. Nothing is imported.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import short

# limits of what a file may ask for, far above checkpoints of a billion parameters with their optimizer
MOST_INSTRUCTIONS = 1 << 21
DEEPEST = 100  # containers in containers
MOST_DIMS = 16
EXTENT = "holds more values, or deeper ones, than any checkpoint"
NOT_ONE = "is not a checkpoint, or is truncated"

DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
SCALARS = (str, int, float, bool, bytes, type(None))


class Bad(Exception):
    """Why a file is refused."""


@dataclass(frozen=True, eq=False)
class Storage:
    """A contiguous array of numbers of one dtype in the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in the file; `stride` and `offset` count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Name:
    """A name that the pickle calls, such as torch._utils._rebuild_tensor_v2."""

    text: str


def size_of(value: object) -> int:
    """Check a size or position in a pickle. Raises `Bad` for other values."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Bad("is damaged: a size or position in it is not a whole number")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored:
    """Do what _rebuild_tensor and _rebuild_tensor_v2 do; `rest`: requires_grad, hooks, and flags of conjugation and negation."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
        raise Bad("is damaged: it describes a tensor without shape or storage")
    if len(shape) > MOST_DIMS or (len(rest) > 2 and rest[2]):
        raise Bad("holds a tensor of a kind that is not read here")
    stored = Stored(storage, size_of(offset), tuple(size_of(n) for n in shape), tuple(size_of(n) for n in stride))
    numel = 1
    for size in shape:  # without overflow
        numel *= size
    reach = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if numel else offset
    if reach > storage.numel or numel > storage.numel:  # the latter catches elements that several places of the tensor share
        raise Bad(
            f"is damaged: a tensor of shape {short(shape)} reaches to element {reach} of the storage {short(storage.key)}, which has "
            f"{storage.numel}"
        )
    return stored


def _parameter(data: Any, *_: Any) -> Stored:
    if not isinstance(data, Stored):
        raise Bad("is damaged: it holds a parameter that is not a tensor")
    return data


def _pairs(*pairs: Any) -> dict[Any, Any]:
    """Build an OrderedDict or a Counter from its pickled form."""
    items = pairs[0] if pairs else ()
    items = items.items() if isinstance(items, dict) else items
    return OrderedDict((_key(key), value) for key, value in items)


def _bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Bad("holds bytes in another form than torch's")
    return text.encode("latin1")


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _pairs, "collections.Counter": _pairs, "_codecs.encode": _bytes,
    "torch.Size": lambda sizes: tuple(size_of(size) for size in sizes),
    "torch.device": lambda kind, index=None: f"{kind}" if index is None else f"{kind}:{size_of(index)}",
    **dict.fromkeys(("builtins.set", "__builtin__.set"), lambda items=(): {_key(item) for item in items}),
}  # fmt: skip
VALUES: dict[str, Any] = {  # names that stand for values
    **{f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()},
    **{str(dtype): dtype for dtype in DTYPES.values()},
}
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}  # fmt: skip
LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINBYTES",
    "BINBYTES", "BINBYTES8",
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _key(value: Any) -> Any:
    if type(value) not in SCALARS:  # hashing deeply nested tuples would crash the process
        raise Bad(f"holds a mapping with a key that is a {type(value).__name__}")
    return value


class Reader:
    """Follows the instructions of one pickle. `storage` finds the storage of a persistent id (kind, dtype, key, place, numel);
    `objects` are classes by name whose instances are made without calling them."""

    def __init__(self, storage: Callable[[Any], Storage], objects: Mapping[str, type]) -> None:
        self.storage, self.objects = storage, objects
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, stream: BinaryIO) -> Any:
        """Read the pickle at the stream's position and leave the stream behind it."""
        stack = self.stack
        argument: Any
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            name: str = code.name
            if name in LITERALS:
                if type(argument) is int and argument.bit_length() > 64:
                    raise Bad("holds a number of more than 64 bits")
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(self.memo[argument])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name == "MARK":
                self.marks.append(len(stack))
            elif name in TUPLES:
                self._push_tuple(TUPLES[name])
            elif name not in ("PROTO", "FRAME", "STOP"):
                self._other(name, argument)
            if count > MOST_INSTRUCTIONS:
                raise Bad(EXTENT)
        if len(stack) != 1:
            raise Bad(NOT_ONE)
        return stack[0]

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _push_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise Bad(NOT_ONE)
        self.stack[-count:] = [items]

    def _other(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "GLOBAL":
            stack.append(self._named(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._named(f"{module}.{attribute}"))
        elif name == "REDUCE":
            args, called = stack.pop(), stack.pop()
            if not isinstance(called, _Name) or called.text not in CALLS or type(args) is not tuple:
                raise Bad("is damaged: it calls what is not a function")
            stack.append(CALLS[called.text](*args))
        elif name == "NEWOBJ":
            args, made = stack.pop(), stack.pop()
            if not isinstance(made, _Name) or made.text not in self.objects or args != ():
                raise Bad("is damaged: it makes an object of what is not a class")
            cls = self.objects[made.text]
            stack.append(cls.__new__(cls))  # type: ignore[call-overload]
        elif name == "BUILD":
            self._build(stack.pop(), stack[-1])
        elif name in ("SETITEM", "SETITEMS"):
            items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], dict) or len(items) % 2:
                raise Bad(NOT_ONE)
            stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self._marked() if name == "APPENDS" else [stack.pop()]
            if type(stack[-1]) is not list:
                raise Bad(NOT_ONE)
            stack[-1].extend(items)
        elif name == "ADDITEMS":
            items = self._marked()
            if type(stack[-1]) is not set:
                raise Bad(NOT_ONE)
            stack[-1].update(_key(item) for item in items)
        else:
            raise Bad(f"is not a file of torch.save: its pickle has the instruction {name}")

    def _named(self, text: str) -> Any:
        if text in VALUES:
            return VALUES[text]
        if text in CALLS or text in self.objects:
            return _Name(text)
        if text.startswith("torch._utils._rebuild_"):
            raise Bad(f"holds a tensor of a kind that is not read here ({short(text)})")
        raise Bad(f"is refused: it holds pickled code, not only weights (GLOBAL {short(text)})")

    def _build(self, state: Any, made: Any) -> None:
        if isinstance(made, OrderedDict):
            return  # versions of modules, which a state_dict carries
        if type(made) not in self.objects.values() or type(state) is not dict or any(type(key) is not str for key in state):
            raise Bad("is damaged: it fills an object of an unknown kind")
        made.__dict__.update(state)


def check_extent(content: Any, objects: Mapping[str, type], most: int) -> None:
    """Refuse containers that hold themselves, are deeply nested, or would take more than `most` characters to write out, such as a list
    of ten times the same list of ten times the same list ..."""
    containers = (dict, list, tuple, set, OrderedDict, *objects.values())
    leaves = (*SCALARS, Stored, torch.dtype)
    known: dict[int, int] = {}  # container -> size, once everything below it is known
    begun: set[int] = set()
    work = [(content,)]  # a container keeps each visited object alive, so its id is unique
    while work:
        value = work[-1]
        if id(value) in known:
            work.pop()
            continue
        parts = _parts(value)
        waiting = [part for part in parts if type(part) in containers and id(part) not in known]
        if waiting:
            if id(value) in begun:
                raise Bad("is damaged: it holds a container that holds itself")
            begun.add(id(value))  # containers around the value on top
            if len(begun) > DEEPEST:
                raise Bad(EXTENT)
            work += waiting
            continue
        begun.discard(id(value))
        size = 1
        for part in parts:
            if type(part) in containers:
                size += known[id(part)]
            elif type(part) in leaves:
                size += 1 + (len(part) if isinstance(part, (str, bytes)) else 8)
            else:
                raise Bad("is damaged: it holds a value of an unknown kind")
        known[id(value)] = size
        if size > most:
            raise Bad(EXTENT)


def _parts(value: Any) -> list[Any]:
    """The content of a container; the attributes of an object."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set)) else list(vars(value).values())
