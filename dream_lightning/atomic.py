"""Atomic writes: a file or a folder appears under its name complete, or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dream_lightning.errors import UserError

PARTIAL = ".partial"  # suffix of an unfinished write; no reader takes it for a result
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


def remove_partials(folder: str | Path) -> list[Path]:
    """Remove what killed writes left in a folder; returns what there was."""
    partials = sorted(Path(folder).glob(f"*{PARTIAL}"))
    for partial in partials:
        remove(partial)
    return partials


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
