"""Where the package's own files are; writing files so that a reader, or a crash, never sees half of one."""

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
_OF_RUST = re.compile(r"\(os error (\d{1,5})\)")  # how libraries in Rust, which may remove their file, name an error of the system
_TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp(\.[^.]*)?$")
_ABANDONED = 24 * 3600.0  # seconds after which a temporary file of another host is taken for one that is left
_writes: dict[Path, int] = {}  # per folder, how many more until it is swept again


def config_dir() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def writable(folder: str | os.PathLike[str]) -> Path:
    """A folder that files may be written to, made where it is not there. Raises `UserError` where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the folder {path} cannot be written to")
    return path


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """The folder if it is there, else the nearest one above it that is; makes nothing.

    Raises `UserError` where the folder could not be made or written to.
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
    """Yield a temporary path beside `path`; on success it is renamed onto `path`, on error it is removed and what was there stays whole.

    The file has the mode of the one it replaces, or the one that the umask gives. Temporary files that killed processes left in the folder
    are removed.

    sync: have it on the disk before it is renamed; without, a power failure may leave an empty file (for caches, checked when read).
    follow: write to the file that a symbolic link points to; else the link itself is replaced.

    Raises `UserError` as `writable` does, and where `path` is a folder or no regular file; `WriteError` where the disk is full or fails.
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
            # made here: it shows the mode that the umask gives, and some libraries give one of their own
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
    """The mode of the file that is to be replaced; None where there is none. Raises `UserError` for what is no file."""
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
    """The error of the disk that is behind the failure of a writer, if one is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS and cause.filename in (None, os.fspath(temporary), temporary):
            return cause
        if (said := _OF_RUST.search(str(cause))) and int(said[1]) in _DISK_ERRORS:
            return OSError(int(said[1]), os.strerror(int(said[1])))
        cause = cause.__cause__ or cause.__context__
    try:  # libraries hide the reason, and an input/output error may be that of a file which is read
        with temporary.open("ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found if found.errno in (*_DISK_ERRORS, errno.EIO) else None
    return None


def temporary_beside(target: Path) -> Path:
    """A name in the folder of `target` that no other process takes, and that the next writer there removes once this process has died.

    The suffix is kept last: soundfile and numpy read the format from it. The name is at most 120 bytes long, however long the target's is.
    """
    _sweep(target.parent)
    stem = os.fsencode(target.stem)[:40].decode("utf-8", "ignore")
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= 20 else ""
    return target.with_name(f".{stem}.{host_id()}-{os.getpid()}-{token_hex(4)}.tmp{suffix}")


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, whose content is to be moved once it is whole; what is left of it is removed.

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
    """Remove what dead processes left in a folder; of other hosts, what nobody has touched for a day."""
    left = _writes.get(folder, 0)
    if left > 0:  # so that many files in one folder do not take a time that grows with the square of their number
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
    """Eight hexadecimal digits that tell this machine, since it was started, and this container from others that share a folder."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    if pid <= 0:  # would be a group of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk. Raises `OSError` where that fails."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot
                raise
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` as a whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
