"""Finds the package's own files, and writes files atomically, so that neither a reader nor a crash sees half of one."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..errors import UserError, WriteError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_OF_RUST = re.compile(r"\(os error (\d{1,5})\)")  # notation for system errors of libraries in Rust, which may remove their file
_TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp(\.[^.]*)?$")
_ABANDONED = 24 * 3600.0  # seconds after which a temporary file of another host counts as abandoned
_writes: dict[Path, int] = {}  # folder -> number of writes until it is swept again


def config_dir() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def writable(folder: str | os.PathLike[str]) -> Path:
    """Make a folder if necessary and check that it is writable. Raises `UserError` otherwise."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the folder {path} cannot be written to")
    return path


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Check the folder, or the nearest existing one above it, without making anything; returns it.

    Raises `UserError` if the folder could not be made or written to.
    """
    path = Path(folder).absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:  # such as a name that is too long
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error
    if not there.is_dir():
        raise UserError(f"{there} is a file: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {there} cannot be written to")
    return there


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True, follow: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on error it is removed and the old file stays.

    The file has the mode of the one it replaces, or the one that the umask gives. Temporary files that killed processes left in the folder
    are removed.

    sync: flush it to the disk before it is renamed; without this, a power failure may leave an empty file (for caches that are checked when
    read). follow: write to the file that a symbolic link points to; otherwise the link itself is replaced.

    Raises `UserError` as `writable` does, and if `path` is a folder or not a regular file; `WriteError` if the disk is full or fails.
    """
    try:
        target = Path(os.path.realpath(path) if follow else path)
        writable(target.parent)
        held = _mode(target, follow)
    except ValueError as error:  # a NUL in the name
        raise error if isinstance(error, UserError) else UserError(f"{os.fspath(path)!r} cannot be written: {error}") from error
    temporary = temporary_beside(target)
    try:
        try:
            # made here to get the umask's mode, because some libraries set their own
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode) if held is None else held
            os.close(descriptor)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                with suppress(PermissionError):  # not every file system has modes
                    temporary.chmod(mode)
            if sync:
                sync_to_disk(temporary)
            os.replace(temporary, target)
        except UserError:
            raise
        except Exception as error:
            failure = None if isinstance(error, WriteError) else _failure(error, temporary)
            if failure is None:
                raise
            raise WriteError(failure.errno, failure.strerror, os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(target.parent)


def _mode(target: Path, follow: bool) -> int | None:
    """The mode of the file to be replaced; None if there is none. Raises `UserError` if it is not a file."""
    try:
        found = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    if stat.S_ISDIR(found):
        raise UserError(f"{target} is a folder: name a file")
    if stat.S_ISLNK(found) and not follow:
        return None
    if not stat.S_ISREG(found):
        raise UserError(f"{target} is not a regular file: name another")
    return stat.S_IMODE(found) & 0o777


def _failure(error: Exception, temporary: Path) -> OSError | None:
    """The disk error behind the failure of a writer, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS and cause.filename in (None, os.fspath(temporary), temporary):
            return cause
        if (said := _OF_RUST.search(str(cause))) and int(said[1]) in _DISK_ERRORS:
            return OSError(int(said[1]), os.strerror(int(said[1])))
        cause = cause.__cause__ or cause.__context__
    try:  # libraries hide the reason, and an input/output error may concern a file that is read
        with temporary.open("ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found if found.errno in (*_DISK_ERRORS, errno.EIO) else None
    return None


def temporary_beside(target: Path) -> Path:
    """A unique name in the folder of `target`; the next writer there removes the file once this process has died.

    The suffix stays at the end, because soundfile and numpy read the format from it. The name has at most 120 bytes.
    """
    _sweep(target.parent)
    stem = os.fsencode(target.stem)[:40].decode("utf-8", "ignore")
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= 20 else ""
    return target.with_name(f".{stem}.{host_id()}-{os.getpid()}-{token_hex(4)}.tmp{suffix}")


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, whose content is to be moved when complete; the rest is removed.

    Raises `UserError` as `writable` does.
    """
    writable(target.parent)
    folder = temporary_beside(target)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove temporary files that dead processes left in a folder, and those of other hosts that are a day old."""
    left = _writes.get(folder, 0)
    if left > 0:  # so the time for many files in one folder does not grow with the square of their number
        _writes[folder] = left - 1
        return
    count = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            match = _TEMPORARY.search(entry.name)
            with suppress(OSError):
                if match and _is_abandoned(entry, match):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
    _writes[folder] = count // 256


def _is_abandoned(entry: os.DirEntry[str], match: re.Match[str]) -> bool:
    if match["host"] == host_id():
        return not is_alive(int(match["pid"]))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED


@functools.cache
def host_id() -> str:
    """Eight hexadecimal digits that identify this machine since its start, and this container, among others that share a folder."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    if pid <= 0:  # would address a group of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def sync_to_disk(path: Path) -> None:
    """Flush a file, or all files of a folder, to the disk. Raises `OSError` if that fails."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot do it
                raise
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
