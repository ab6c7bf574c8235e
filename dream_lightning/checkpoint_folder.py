"""Sharded checkpoints: folders in torch's distributed format that appear when they are whole, read without pickle.

`meta.pt` holds what all processes share (step, loops, sizes of the model, …); `__{r}_0.distcp` the tensors of process
r; `.metadata` says which rows of which tensor lie where, so any number of processes can read them. torch writes
`.metadata` with pickle; it is read here by an unpickler that builds nothing but these tables.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException

META = "meta.pt"
_TABLES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class SafeReader(FileSystemReader):
    """torch's reader, which refuses a `.metadata` that asks for more than tables."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where every tensor lies.

        Raises:
            ValueError: it is torn, or names code to run.
        """
        file = Path(self.path, ".metadata")
        try:
            with file.open("rb") as opened:
                _TablesOnly(opened).load()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is no table of a sharded checkpoint: {error}") from error
        return super().read_metadata(*args, **kwargs)


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which reads values that are not tensors as `weights_only`."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Put a value into its place."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _TablesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _TABLES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def is_sharded(path: Path) -> bool:
    """Whether there is a sharded checkpoint, as far as its names tell."""
    return (path / META).is_file() and (path / ".metadata").is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """What all processes share.

    Raises:
        ValueError: not a whole sharded checkpoint.
    """
    if not is_sharded(path):
        raise ValueError(f"{path} is not a sharded checkpoint: wanted a folder with {META} and .metadata")
    return torch.load(path / META, map_location="cpu", weights_only=True)


def read_into(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of `state` in place, each process its own parts; all processes call this.

    Raises:
        ValueError: tensors are missing or of another shape; a torn file.
    """
    try:
        dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner())
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path} does not fit this model and optimiser, or is torn: {str(first)[:500]}") from error


def write(
    state: dict[str, Any],
    meta: dict[str, Any],
    path: Path,
    *,
    is_first: bool,
    agree: Callable[[str | None], str | None],
) -> None:
    """Write a folder beside `path` and let it take the name when it is whole; all processes call this.

    An older checkpoint of that name goes last, so there must be room for both. A kill leaves one of the two: under its
    name, or at worst as `last-old.ckpt`, which `--ckpt_path last` finds too.

    Args:
        state: tensors, of which every process holds its parts.
        meta: what all share.
        is_first: whether this is process 0.
        agree: gives every process what process 0 passes.

    Raises:
        ValueError: it could not be written, most often because the disk is full; the older one is still there.
    """
    partial, old = path.with_name(f"{path.name}.partial"), path.with_stem(f"{path.stem}-old")

    def first_does(work: Callable[[], None]) -> None:
        problem = None
        if is_first:
            try:
                work()
            except OSError as error:
                problem = str(error)
        stop_for(agree(problem))

    def stop_for(problem: str | None) -> None:
        if problem is not None:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"{path} was not saved: {problem}. Checkpoints before it are untouched. Make room, or set "
                "autosave.dirpath and checkpoint.dirpath to a larger disk, and go on with --ckpt_path last"
            )

    def begin() -> None:
        if path.exists():  # else the old one is all there is
            _remove(old)
        _remove(partial)
        partial.mkdir(parents=True)

    def finish() -> None:
        with (partial / META).open("wb") as file:
            torch.save(meta, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _remove(old)

    first_does(begin)
    try:
        dcp.save(state, checkpoint_id=partial)
    except CheckpointException as error:  # on all processes
        stop_for(str(next(iter(error.failures.values()))[0]))
    first_does(finish)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
