"""Files and folders that are whole or not there: written under another name, brought to the disk, then renamed."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dream_lightning.errors import UserError

PARTIAL = ".partial"  # the suffix of what is being written; no reader takes it for a result


@contextmanager
def atomic_write(path: str | Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A path in the same folder to write a file or a folder to, which replaces `path` when the block ends.

    A kill, a full disk or a power failure leaves what was at `path` before.

    Args:
        path: the final name.
        needed_bytes: how much will be written, compared with the free space first; 0 = not known.

    Raises:
        UserError: the disk is full, or becomes full, or must not be written.
    """
    path = Path(path).expanduser().absolute()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed_bytes > (free := shutil.disk_usage(path.parent).free):
            raise OSError(errno.ENOSPC, f"{needed_bytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
        yield partial
        _sync(partial)
        replace(partial, path)
    except Exception as error:
        if not disk_refuses(error):
            raise
        raise UserError(
            f"{path} was not written: {error}. What was there before is untouched. Make room, or name a folder on "
            "another disk"
        ) from error
    finally:
        remove(partial)


def replace(partial: Path, path: Path) -> None:
    """Give a complete file or folder its final name; a folder of that name goes only after the new one is there."""
    old = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    if path.is_dir():
        path.rename(old)
    os.replace(partial, path)
    remove(old)
    _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def disk_refuses(error: BaseException) -> bool:
    """Whether an error means that a disk is full or may not be written. Libraries in Rust say so in words alone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return any(getattr(e, "errno", None) in codes or any(f"(os error {c})" in str(e) for c in codes) for e in chain)


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
