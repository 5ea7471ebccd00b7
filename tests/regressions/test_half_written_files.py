"""`files.replacing`: whole files of any name and of the right mode; nothing is left of a write that failed, or of a killed process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_eff.errors import UserError, WriteError
from hubert_eff.labels.make import make_labels
from hubert_eff.utils import files
from hubert_eff.utils.files import replacing, temporary_beside, temporary_folder, write_text

from ..helpers.disks import files_of_at_most


def _numpy(path: Path) -> None:
    np.save(path, np.zeros(100_000))


def _torch(path: Path) -> None:
    torch.save(torch.zeros(100_000), path)


def _safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100_000)}, path)


def _sound(path: Path) -> None:
    import soundfile

    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 200_000), 16_000)


def _text(path: Path) -> None:
    path.write_text("x" * 100_000)


WRITERS = {"x.npy": _numpy, "x.pt": _torch, "x.safetensors": _safetensors, "x.flac": _sound, "x.txt": _text}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_names_it(name: str, tmp_path: Path) -> None:
    target, write = tmp_path / name, WRITERS[name]
    target.write_text("old")
    with files_of_at_most(20_000), pytest.raises(WriteError) as caught, replacing(target) as temporary:
        write(temporary)
    assert str(caught.value).startswith(f"{target} cannot be written (") and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name] and target.read_text() == "old"
    with replacing(target) as temporary:
        write(temporary)
    assert os.listdir(tmp_path) == [name] and target.stat().st_size > 20_000


def test_a_full_disk_is_named_where_the_library_removes_its_file(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    with pytest.raises(WriteError, match="No space left on device") as caught, replacing(target) as temporary:
        temporary.unlink()
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")  # as safetensors' 0.8
    assert caught.value.filename == str(target)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="os error 2"), replacing(target):
        raise RuntimeError("I/O error: No such file or directory (os error 2)")


def test_other_errors_keep_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("no number"), UserError("bad"), FileNotFoundError(2, "No such file", "source.wav"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise error
        assert caught.value is error and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a" * 255, "語" * 85, "x" * 243 + ".safetensors", "a." + "s" * 253, ".hidden", "two\nlines.json", "\udce9.txt", "-", "é" * 127],
)
def test_names_up_to_what_a_file_system_takes(name: str, tmp_path: Path) -> None:
    with replacing(tmp_path / name) as temporary:
        assert len(os.fsencode(temporary.name)) <= 120
        assert temporary.name.endswith((tmp_path / name).suffix if len(name) < 255 or name.endswith(".safetensors") else ".tmp")
        temporary.write_text("content")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "content"


@pytest.mark.parametrize("name", ["a" * 256, "語" * 86, "nul\0.txt"])
def test_names_that_no_file_system_takes_are_bad_input(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / name, "content")
    assert not os.listdir(tmp_path)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name, said in (("fifo", "not a regular file"), ("loop", "not a regular file"), ("folder", "is a folder")):
        with pytest.raises(UserError, match=said):
            write_text(tmp_path / name, "content")
    with pytest.raises(UserError, match="not a regular file"):
        write_text(os.devnull, "content")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "loop"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("write", [_safetensors, _text])
def test_the_umask_gives_the_mode(umask: int, write: Callable[[Path], None], tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "new") as temporary:
            write(temporary)
        (tmp_path / "kept").touch(0o640)
        (tmp_path / "kept").chmod(0o640)
        with replacing(tmp_path / "kept") as temporary:
            write(temporary)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    write_text(tmp_path / "link", "first")  # it points to nothing yet
    write_text(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "second"
    with replacing(tmp_path / "link", follow=False) as temporary:
        temporary.write_text("third")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "second"


def test_what_killed_processes_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    leave = (
        "import os, signal, sys; from pathlib import Path; from hubert_eff.utils.files import temporary_beside\n"
        "target = Path(sys.argv[1]); temporary_beside(target / 'a.pt').write_text('half'); temporary_beside(target / 'b').mkdir()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", leave, str(tmp_path)], check=False, cwd=Path(files.__file__).parents[1])
    assert len(os.listdir(tmp_path)) == 2
    mine, others, old = (temporary_beside(tmp_path / name) for name in ("mine", "others", "old"))
    assert not os.listdir(tmp_path)
    others, old = (path.with_name(path.name.replace(files.host_id(), "0123abcd")) for path in (others, old))
    for path in (mine, others, old):
        path.write_text("half")
    (tmp_path / ".settings.tmp").write_text("a user's own")
    os.utime(old, (time.time() - 1e5,) * 2)  # of another host, and untouched for more than a day
    write_text(tmp_path / "file", "whole")
    assert set(os.listdir(tmp_path)) == {mine.name, others.name, ".settings.tmp", "file"}


def test_a_half_written_table_is_no_split_of_a_manifest(tmp_path: Path) -> None:
    temporary_beside(tmp_path / "train.tsv").write_text(f"{tmp_path}\na.flac\t16000\n")
    with pytest.raises(UserError, match="no manifest in"):
        make_labels(tmp_path, tmp_path / "out")


def test_looking_for_what_was_left_is_not_quadratic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    scan = os.scandir

    def counted(folder: Path) -> object:
        nonlocal looked
        looked += len(os.listdir(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", counted)
    for number in range(1500):
        with replacing(tmp_path / f"{number}.txt", sync=False):
            pass
    assert len(os.listdir(tmp_path)) == 1500 and looked < 1500 * 300


def test_a_temporary_folder_vanishes_with_what_is_left_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError), temporary_folder(tmp_path / "語"):
        raise ValueError
    with temporary_folder(tmp_path / "corpus") as draft:
        (draft / "part").mkdir()
        (draft / "part").rename(tmp_path / "part")
    assert os.listdir(tmp_path) == ["part"]
