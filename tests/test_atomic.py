"""Atomic writes: whatever happens, the old content or the new one is there, complete."""

import errno
import os
import resource
import signal
import sys
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest
from kill_points import killed_before

from dream_lightning import atomic
from dream_lightning.atomic import atomic_write, disk_refuses, lock_file, remove_partials


@contextmanager
def files_up_to(size: int):
    """Writing more than this to a file fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def write_file(path, text):
    with atomic_write(path) as partial:
        partial.write_text(text)


def write_folder(path, text):
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "part").write_text(text)
        (partial / "deeper").mkdir()
        (partial / "deeper" / "part").write_text(text)


def read(path):
    if path.is_file():
        return path.read_text()
    first, second = ((path / name).read_text() for name in ("part", "deeper/part"))
    assert first == second
    return first


KINDS = pytest.mark.parametrize("write", [write_file, write_folder])


@KINDS
def test_a_new_one_replaces_the_old_one(tmp_path, write):
    for text in ("old", "new"):
        write(tmp_path / "runs" / "last.ckpt", text)
        assert read(tmp_path / "runs" / "last.ckpt") == text
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["last.ckpt"]


@KINDS
def test_a_full_disk_leaves_the_old_one(tmp_path, write):
    write(tmp_path / "last.ckpt", "old")
    with files_up_to(1000), pytest.raises(ValueError, match=r"last.ckpt was not written: .*too large.*is unchanged"):
        write(tmp_path / "last.ckpt", "new" * 1000)
    with pytest.raises(ValueError, match="needs 1073741824"), atomic_write(tmp_path / "last.ckpt", needed_bytes=2**60):
        pass
    assert read(tmp_path / "last.ckpt") == "old" and len(list(tmp_path.iterdir())) == 1


def test_other_errors_pass_and_leave_the_old_one(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="something else"), atomic_write(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError("something else")
    assert read(tmp_path / "a") == "old" and len(list(tmp_path.iterdir())) == 1


@KINDS
def test_a_kill_at_any_moment_leaves_one(tmp_path, write):

    def newest(folder):  # what `--ckpt_path last` uses
        return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    for moment in count():
        folder = tmp_path / str(moment)
        write(folder / "last.ckpt", "1")
        killed = killed_before(moment, folder, lambda folder=folder: write(folder / "last.ckpt", "2"))
        assert read(newest(folder)) in "12"
        again = killed_before(moment, folder, lambda folder=folder: write(folder / "last.ckpt", "3"))
        assert read(newest(folder)) in "123"
        write(folder / "last.ckpt", "4")
        remove_partials(folder)
        assert read(folder / "last.ckpt") == "4"
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        if not (killed or again):
            break
    assert moment > 1


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """A power failure after the renaming must not leave an empty file under the final name."""
    events = []
    for name in ("fsync", "replace"):
        call = getattr(atomic.os, name)
        monkeypatch.setattr(atomic.os, name, lambda *a, call=call, name=name: (events.append(name), call(*a))[1])
    write_file(tmp_path / "a", "new")
    assert events == ["fsync", "replace", "fsync"]


def test_a_full_disk_is_recognized_in_causes_and_in_the_words_of_rust():
    outer = RuntimeError("writing failed")
    outer.__context__ = OSError(errno.ENOSPC, "No space left")
    assert disk_refuses(outer) and disk_refuses(Exception("I/O error (os error 28)"))
    assert not disk_refuses(OSError(errno.ENOENT, "No such file"))


@pytest.mark.parametrize("old_is_folder", [True, False])
def test_a_file_and_a_folder_do_not_replace_each_other(tmp_path, old_is_folder):
    path, inside = tmp_path / "last.ckpt", tmp_path / "last.ckpt" / "meta.pt"
    if old_is_folder:
        path.mkdir()
    kept = inside if old_is_folder else path
    kept.write_text("old")
    with pytest.raises(ValueError, match=r"last.ckpt was not written: it is a .* use another folder"):  # noqa: SIM117
        with atomic_write(path) as partial:
            if old_is_folder:
                partial.write_text("new")
            else:
                partial.mkdir()
    assert kept.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_without_fcntl_is_one_of_windows(tmp_path, monkeypatch):
    """It locks one byte after the end of the file, and waits or not."""
    asked = []

    def locking(descriptor, mode, count):
        asked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(asked) < 3:
            raise PermissionError(13, "locked")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with (tmp_path / "lock").open("ab", buffering=0) as file:
        with pytest.raises(BlockingIOError):
            lock_file(file, wait=False)
        lock_file(file, wait=True, byte=7)
    assert asked == [(1 << 30, 2, 1), (7, 2, 1), (7, 2, 1)]
