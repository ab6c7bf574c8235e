"""Sharded checkpoints (FSDP2): a folder with a part per GPU, there only when it is whole, read without pickled code.

torch.distributed.checkpoint writes the parts, `__<rank>_<n>.distcp`, and their table of contents `.metadata`, so that
any number of processes can read them. Everything but weights and optimiser states is in `meta.pt`.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dream_lightning.errors import UserError

_TABLE, _REST, _STATE = ".metadata", "meta.pt", "state_dict."
_PARTIAL = ".partial"  # `saving` clears away what is called so
_DATA_CLASSES = {
    "builtins": {"set"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


def is_sharded(path: str | Path) -> bool:
    """Whether this is a folder that a sharded run saved, whole or not."""
    folder = Path(path)
    return folder.is_dir() and ((folder / _REST).is_file() or any(folder.glob("*.distcp")))


def read_sharded(path: str | Path) -> dict[str, Any]:
    """The checkpoint as `torch.load` gives that of one process, without optimiser states; the weights are in memory.

    Raises:
        UserError: not such a folder; it was not finished; it is damaged; it holds more than tensors and plain values.
    """
    folder = Path(path)
    checkpoint, reader = read_rest(folder), _Reader(folder)
    try:
        entries = reader.read_metadata().state_dict_metadata.items()
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries
            if name.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        why = " ".join(str(error).split())[-300:]
        raise UserError(f"{folder} is damaged or not whole: {why}. Take an earlier checkpoint") from error
    return checkpoint | {"state_dict": {name.removeprefix(_STATE): tensor for name, tensor in state.items()}}


def read_rest(path: str | Path) -> dict[str, Any]:
    """Everything but weights and optimiser states.

    Raises:
        UserError: not such a folder; it was not finished; it is damaged; it holds more than plain values.
    """
    folder = Path(path)
    if missing := [name for name in (_TABLE, _REST) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {' and '.join(missing)}: it is no sharded checkpoint, or saving was cut short. Take an "
            "earlier one"
        )
    try:
        return torch.load(folder / _REST, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = " ".join(str(error).split())[-300:]
        raise UserError(f"{folder / _REST} is damaged: {why}. Take an earlier checkpoint") from error


def read_into(state: dict[str, Any], path: str | Path) -> None:
    """Fill the tensors of `state` in place, each process its own parts; all processes call this.

    Raises:
        UserError: tensors are missing or of another shape; it is damaged; it holds more than tensors and values.
    """
    reader = _Reader(path)
    try:
        dcp.load(state, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        why = " ".join(str(reader.problem or next(iter(error.failures.values()))[0]).split())[:500]
        raise UserError(f"{path} does not fit this model and optimiser, or is damaged: {why}") from error


def write(
    state: dict[str, Any],
    rest: dict[str, Any],
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
        rest: what all share.
        is_first: whether this is process 0.
        agree: gives every process what process 0 passes.

    Raises:
        UserError: it could not be written, most often because the disk is full; the older one is still there.
    """
    partial, old = path.with_name(f"{path.name}{_PARTIAL}"), path.with_stem(f"{path.stem}-old")

    def on_rank_zero(work: Callable[[], None]) -> None:
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
            raise UserError(
                f"{path} was not saved: {problem}. Checkpoints before it are untouched. Make room, or set "
                "autosave.dirpath and checkpoint.dirpath to a larger disk, and go on with --ckpt_path last"
            )

    def begin() -> None:
        if path.exists():  # else the old one is all there is
            _remove(old)
        _remove(partial)
        partial.mkdir(parents=True)

    def finish() -> None:
        with (partial / _REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _remove(old)

    on_rank_zero(begin)
    try:
        dcp.save(state, checkpoint_id=partial)
    except CheckpointException as error:  # on all processes
        stop_for(str(next(iter(error.failures.values()))[0]))
    on_rank_zero(finish)


def _remove(path: Path) -> None:
    """What a kill leaves half removed is not called a checkpoint any more: changed last, it would be the newest."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.suffix == _PARTIAL:
        shutil.rmtree(path)
    else:
        going = path.with_name(path.name + _PARTIAL)
        _remove(going)
        path.rename(going)
        shutil.rmtree(going)


class _Reader(dcp.FileSystemReader):
    """Torch's, except that the pickled table of contents may name nothing but the classes that it is made of."""

    problem: Exception | None = None
    """why there is no table of contents; torch 2.11 keeps it to itself"""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        try:
            with Path(self.path, _TABLE).open("rb") as file:
                return _TableUnpickler(file).load()
        except Exception as error:
            self.problem = error
            raise


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _DATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{_TABLE} names {module}.{name}, which no table of contents does")
        return super().find_class(module, name)


class _Planner(dcp.DefaultLoadPlanner):
    """Torch's, except that what is not a tensor must be a plain value."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Put a value into its place."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
