"""The library of kernels in the cache: half of one ended every process that loaded it, and another user's was loaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from hubert_eff.kernels import loader

COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo "a compiler"
echo once >> {log}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that is quick; the file in which it counts its calls."""
    log, command = tmp_path / "log", tmp_path / "compiler"
    command.write_text(COMPILER.format(log=log))
    command.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("CXX", str(command))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_a_whole_library_is_compiled_once(compiled: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)  # as of many distributions: what is made must not be writable by the group all the same
    try:
        library = loader.compile_library()
        assert loader.compile_library() == library and calls(compiled) == 1
    finally:
        os.umask(before)
    assert library.parent == tmp_path / "cache" / "hubert-eff"
    assert not (library.stat().st_mode | library.parent.stat().st_mode) & 0o022


@pytest.mark.parametrize("content", [b"", b"libr", b"another"])
def test_half_a_library_is_made_anew(compiled: Path, content: bytes) -> None:
    library = loader.compile_library()
    library.write_bytes(content)
    assert loader.compile_library().read_text() == "library\n" and calls(compiled) == 2
    assert [file.name for file in library.parent.iterdir()] == [library.name]


def test_a_library_that_others_can_write_to_is_not_loaded(compiled: Path) -> None:
    loader.compile_library().chmod(0o775)
    loader.compile_library()
    assert calls(compiled) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_library_of_another_user_is_not_loaded(compiled: Path, tmp_path: Path) -> None:
    library = loader.compile_library()
    os.chown(library, 12_345, 12_345)
    loader.compile_library()
    assert calls(compiled) == 2 and library.stat().st_uid == 0
    os.chown(library.parent, 12_345, 12_345)  # a folder that the other one can change at any time
    other = loader.compile_library()
    assert calls(compiled) == 3 and other.parent == tmp_path / "tmp" / f"hubert-eff-{os.geteuid()}"
    assert loader.compile_library() == other and calls(compiled) == 3


def test_a_folder_that_others_can_replace_is_not_used(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert loader.compile_library().parent.parent == tmp_path / "tmp"
    (tmp_path / "cache").chmod(0o1777)  # as /tmp is: what is in it can be replaced by its owner only
    assert loader.compile_library().parent.parent == tmp_path / "tmp" and calls(compiled) == 1  # found there
    (tmp_path / "tmp").chmod(0o777)
    assert loader.compile_library().parent.parent == tmp_path / "cache" and calls(compiled) == 2


def test_a_cache_that_can_only_be_read(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = loader.compile_library()
    access = os.access
    with monkeypatch.context() as patched:  # root may write everywhere
        cache = library.parent
        patched.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode == os.W_OK and Path(path) == cache))
        assert loader.compile_library() == library and calls(compiled) == 1
        library.unlink()
        assert loader.compile_library().parent.parent == tmp_path / "tmp"
    (tmp_path / "cache" / "hubert-eff").rmdir()
    (tmp_path / "cache" / "hubert-eff").write_text("no folder")
    assert loader.compile_library().read_text() == "library\n"
