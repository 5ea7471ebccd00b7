"""Lets one process at a time use a folder; a lock names its holder and ends with the process.

The lock is the kernel's (flock) on a file in the folder, which names the holder and is removed at the end. On shared folders such locks
may be missing or hold for one machine only. So the holder also touches the file every few seconds: a process that finds a file of another
machine watches it for a while, and takes it over if nobody touches it. Clocks of different machines are never compared.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..errors import UserError
from .files import host_id, is_alive

try:
    import fcntl
except ImportError:  # systems without flock must rely on the file
    fcntl = None  # type: ignore[assignment]

BEAT, WATCH = 10.0, 45.0  # seconds between touches, and seconds to wait for one
_held: set[Lock] = set()


@contextmanager
def locked(folder: str | os.PathLike[str], part: str = "") -> Iterator[Lock]:
    """Reserve a folder, or a part of the work in it, for this process. The folder is made, and removed if it stays empty.

    Raises `UserError` that names another process if one has it.
    """
    path = Path(folder)
    missing = [place for place in (path, *path.parents) if not place.exists()]
    lock = Lock(path, part)
    try:
        yield lock
    finally:
        lock.release()
        for place in missing:
            with suppress(OSError):
                place.rmdir()


class Lock:
    """The lock of a folder, from its creation to `release` or the end of the process. A forked child does not hold it."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder = folder.absolute()
        self.file = folder / f".hubert-eff{'-' * bool(part)}{part}.lock"
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take()
            self._folder = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{folder} cannot be used: {self.file.name} cannot be made in it ({error.strerror})") from error
        self._end = threading.Event()
        self.content = json.dumps(
            {
                "id": token_hex(8), "pid": os.getpid(), "host": socket.gethostname(), "host_id": host_id(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:150],
            }
        )  # fmt: skip
        with suppress(OSError):  # on a full disk the kernel's lock still holds
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self.content.encode("utf-8", "replace"), 0)
        _held.add(self)
        threading.Thread(target=self._beat, daemon=True).start()

    def _take(self) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                known = self._lock(descriptor)
                holder = _read(descriptor)
                if holder and not (known and holder.get("host_id") == host_id()) and self._is_used(descriptor, holder):
                    raise self._refusal(holder)
                if _same_file(descriptor, self.file):  # otherwise its last holder has removed it meanwhile
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Take the kernel's lock; False if the file system has none. Raises `UserError` if another process has it."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal(_read(descriptor)) from None
            return False
        return True

    def _is_used(self, descriptor: int, holder: dict[str, Any]) -> bool:
        """Whether the process that a file names is still working, if the kernel does not tell."""
        pid = holder.get("pid")
        if holder.get("host_id") == host_id() and not (isinstance(pid, int) and is_alive(pid)):
            return False
        said = f"{self.folder} was last used by {_who(holder)}: waiting for {WATCH:.0f} s to see whether it still is"
        print(said, file=sys.stderr, flush=True)
        before, end = _touched(self.file), time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(BEAT / 10)
            if _touched(self.file) not in (before, None):
                return True
        return False

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        if holder.get("host_id") == host_id():
            remedy = f"wait for its end, or end it (kill {holder.get('pid')})"
        else:
            remedy = f"wait for its end, or remove {self.file} if you are sure that it has ended"
        return UserError(f"{self.folder} is in use by {_who(holder)}: {remedy}")

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(OSError):
                os.utime(self._descriptor)

    def release(self) -> None:
        """Release the lock."""
        self._end.set()
        if self in _held:
            _held.discard(self)
            with suppress(OSError):  # the folder may have been moved
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.file.name, dir_fd=self._folder)):
                    os.unlink(self.file.name, dir_fd=self._folder)
            os.close(self._descriptor)
            os.close(self._folder)

    @property
    def in_place(self) -> bool:
        """Whether the folder of this name is still the one that was locked, rather than moved or removed."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._folder), self.folder.stat()):
                return True
            return self.file.read_text(encoding="utf-8") == self.content  # some file systems renumber files
        return False

    def moved_to(self) -> Path | None:
        """The current place of the folder, if the system tells."""
        with suppress(OSError):
            place = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            if os.path.samestat(os.fstat(self._folder), place.stat()):
                return place
        return None


def _forget() -> None:
    """Drop the lock in a forked child, because it belongs to the parent and must not outlive it."""
    for lock in _held:
        os.close(lock._descriptor)
        os.close(lock._folder)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _read(descriptor: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(os.pread(descriptor, 1 << 14, 0))
        return content if isinstance(content, dict) else {}
    return {}


def _who(holder: dict[str, Any]) -> str:
    """A process in words, without control codes of the file."""
    if not holder:
        return "another process"
    text = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"
    return "".join(c if c.isprintable() else "?" for c in text)


def _touched(file: Path) -> int | None:
    try:
        with file.open("rb") as opened:  # opening makes a shared file system ask its server again
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


def _same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False
