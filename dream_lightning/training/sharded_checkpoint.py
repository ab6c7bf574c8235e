"""Sharded checkpoints (FSDP2): a folder with the shards of each process, written atomically, read without pickled code.

torch.distributed.checkpoint writes the shards, `__<rank>_<n>.distcp`, and their table of contents `.metadata`, so that
any number of processes can read them. Everything but weights and optimizer states is in `meta.pt`.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dream_lightning.atomic import atomic_write, not_written, on_rank_zero
from dream_lightning.errors import UserError
from dream_lightning.training.checkpointing import tensor_bytes

_TABLE, _REST, _STATE = ".metadata", "meta.pt", "state_dict."
# The classes of a pickled table of contents; anything else in it is refused.
_TABLE_CLASSES = {
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


def write(state: dict[str, Any], rest: dict[str, Any], path: Path, strategy: Strategy) -> None:
    """Write the folder atomically; all processes of the strategy call this, with their shards in `state`.

    Raises:
        UserError: the disk is full or read-only, on every process; an older folder is unchanged.
    """

    def rank_zero(work: Callable[[], Any]) -> Any:
        def written() -> Any:
            try:
                return work()
            except (OSError, RuntimeError) as error:
                raise not_written(path, error) from error

        return on_rank_zero(strategy, written)

    with ExitStack() as stack:
        folder = atomic_write(path, needed_bytes=tensor_bytes(state))
        partial = rank_zero(lambda: stack.enter_context(folder))
        try:
            dcp.save(state, checkpoint_id=partial)
        except CheckpointException as error:  # on all processes
            raise not_written(path, _reason(error)) from error
        rank_zero(lambda: torch.save(rest, partial / _REST))
        rank_zero(stack.pop_all().close)


def read_rest(path: str | Path) -> dict[str, Any]:
    """Everything but weights and optimizer states.

    Raises:
        UserError: no sharded checkpoint; it is incomplete or damaged; it holds more than plain values.
    """
    if missing := [name for name in (_TABLE, _REST) if not (Path(path) / name).is_file()]:
        raise UserError(f"{path} lacks {' and '.join(missing)}: it is no sharded checkpoint, or an incomplete one")
    with _user_errors(path):
        return torch.load(Path(path) / _REST, map_location="cpu", weights_only=True)


def read_sharded(path: str | Path) -> dict[str, Any]:
    """The checkpoint as `torch.load` returns that of one process, without optimizer states.

    Raises:
        UserError: as `read_rest`.
    """
    checkpoint, reader = read_rest(path), _Reader(path)
    with _user_errors(path):
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    return checkpoint | {"state_dict": {name.removeprefix(_STATE): tensor for name, tensor in state.items()}}


def read_into(state: dict[str, Any], path: str | Path) -> None:
    """Fill the tensors of `state` in place, each process its own shards; all processes call this.

    Raises:
        UserError: tensors are missing or of another shape; it is damaged; it holds more than tensors and values.
    """
    reader = _Reader(path)
    with _user_errors(path):
        reader.read_metadata()  # torch 2.11 does not pass on why it cannot be read
        dcp.load(state, storage_reader=reader, planner=_Planner())


class _Reader(dcp.FileSystemReader):
    """torch's reader, but the pickled table of contents may name only the classes that it consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, _TABLE).open("rb") as file:
            return _TableUnpickler(file).load()


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # its name in Python 3.13
        if name not in _TABLE_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{_TABLE} names {module}.{name}, which no table of contents does")
        return super().find_class(module, name)


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, but what is not a tensor must be a plain value."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


@contextmanager
def _user_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        why = " ".join(str(_reason(error)).split())[-500:]
        raise UserError(f"{path} is damaged, or does not fit this model and optimizer: {why}") from error


def _reason(error: Exception) -> Exception:
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
