"""Atomic writes: a file or a folder appears under its name complete, or not at all; and who may write where."""

import errno
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO
from weakref import WeakSet

from dream_lightning.errors import UserError

WINDOWS = os.name == "nt"
PARTIAL = ".partial"  # suffix of an unfinished write; no reader takes it for a result
_UNUSED = 1 << 30  # a byte after the end of files that are locked
_DISK_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@contextmanager
def atomic_write(path: str | Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a path in the same folder to write a file or a folder to; it replaces `path` when the block ends.

    After a kill, a full disk or a power failure, the earlier content of `path` is still there. `needed_bytes`, the size
    of what will be written, is compared with the free space first.

    Raises:
        UserError: the disk is full or must not be written.
    """
    path = Path(path).expanduser().absolute()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if needed_bytes > free:
            raise OSError(errno.ENOSPC, f"it needs {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        yield partial
        for written in (partial, *partial.rglob("*")):
            _sync(written)
        replace(partial, path)
    except Exception as error:
        if disk_refuses(error):
            raise not_written(path, error) from error
        raise
    finally:
        remove(partial)


def write_texts(folder: Path, files: dict[str, str]) -> None:
    """Write text files, name → content, one after the other, each atomically."""
    for name, text in files.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def replace(partial: Path, path: Path) -> None:
    """Rename a complete file or folder to `path`; an old folder stays as `NAME-replaced` until the new one is there."""
    if path.exists() and path.is_dir() != partial.is_dir():  # such as a sharded checkpoint and a single file
        kinds = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise UserError(
            f"{path} was not written: it is a {kinds[0]}, and no {kinds[1]} replaces it: use another folder"
        )
    replaced = path.with_stem(f"{path.stem}-replaced")
    if path.is_dir():
        remove(replaced)
        path.rename(replaced)
    os.replace(partial, path)
    _sync(path.parent)
    if replaced.is_dir():
        remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists. A folder is renamed first: a kill leaves no half under its name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if path.suffix != PARTIAL:
        path = path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"))
    shutil.rmtree(path, ignore_errors=True)


def remove_partials(folder: str | Path, pattern: str = "*") -> list[Path]:
    """Remove what killed writes of such names left in a folder that is locked; returns what there was."""
    partials = sorted(Path(folder).glob(f"{pattern}{PARTIAL}"))
    for partial in partials:
        remove(partial)
    return partials


_locked: WeakSet[BinaryIO] = WeakSet()
if hasattr(os, "register_at_fork"):  # a forked worker would hold the locks of a killed process until it ends too
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _locked])


def lock(path: Path, refusal: str) -> BinaryIO:
    """Open a file to append to, which no other process can lock until it is closed or this process ends.

    Raises:
        UserError: with `refusal`, another process holds the lock.
    """
    while True:
        file = path.open("ab", buffering=0)
        try:
            lock_file(file, wait=False)  # the system releases it when the process ends
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        except OSError as error:  # of a network folder without locks
            warnings.warn(f"{path.parent} cannot be locked ({error}): let one process write there", stacklevel=2)
        if os.fstat(file.fileno()).st_nlink:  # or the process that held the lock has just removed it
            _locked.add(file)
            return file
        file.close()


def remove_locked(file: BinaryIO) -> None:
    """Remove the file of a lock, then release it; on Windows, which removes no open file, the other way round."""
    if WINDOWS:
        file.close()
    with suppress(FileNotFoundError, *[PermissionError] * WINDOWS):  # another process may have locked it by now
        os.unlink(file.name)
    file.close()


def lock_file(file: IO, *, wait: bool, byte: int | None = None) -> None:
    """Lock an open file, or one byte of it for this process.

    Raises:
        BlockingIOError: not `wait`, and another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(_UNUSED if byte is None else byte)  # nobody else may read a locked byte
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if not wait:
                    raise BlockingIOError(error.errno, f"{file.name} is locked") from error
                time.sleep(0.1)
    flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    if byte is None:
        fcntl.flock(file, flags)
    else:
        fcntl.lockf(file, flags, 1, byte)


def check_folder(option: str, folder: str | Path | None) -> None:
    """Raise UserError unless files can be written in a folder, which is created; URLs are not tried."""
    if folder is None or "://" in str(folder):
        return
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{option} is {folder}, where no file can be written ({reason}): name another folder"
        ) from error


def on_rank_zero(strategy: Any, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, or its UserError, on every process of a Lightning strategy; all call this."""
    result = problem = None
    if strategy.is_global_zero:
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    result, problem = strategy.broadcast((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result


def disk_refuses(error: BaseException) -> bool:
    """Whether an error or one of its causes means that a disk is full or read-only."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # Libraries in Rust (safetensors, tokenizers) report the code in the text only.
    texts = [f"(os error {code})" for code in _DISK_CODES]
    return any(getattr(e, "errno", None) in _DISK_CODES or any(text in str(e) for text in texts) for e in chain)


def not_written(path: Path, reason: object) -> UserError:
    return UserError(f"{path} was not written: {reason}. Its earlier content is unchanged. Free space on the disk")


def _sync(path: Path) -> None:
    if WINDOWS:  # it syncs neither folders nor files that are open to read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
