"""Checkpoints of sharded training (FSDP2) in one process: a folder with a part per GPU, joined without pickled code.

Lightning's model-parallel strategy writes `__<rank>_<n>.distcp` and their table of contents `.metadata` with
torch.distributed.checkpoint, and everything but weights and optimiser states into `meta.pt`.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_TABLE, _REST, _STATE = ".metadata", "meta.pt", "state_dict."
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
        ValueError: not such a folder; it was not finished; it is damaged; it holds more than tensors and plain values.
    """
    folder = Path(path)
    if missing := [name for name in (_TABLE, _REST) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}: it is no sharded checkpoint, or saving was cut short. Take an "
            "earlier one"
        )
    reader = _Reader(folder)
    try:
        checkpoint = torch.load(folder / _REST, map_location="cpu", weights_only=True)
        entries = reader.read_metadata().state_dict_metadata.items()
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries
            if name.startswith(_STATE) and isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        why = " ".join(str(error).split())[-300:]
        raise ValueError(f"{folder} is damaged or not whole: {why}. Take an earlier checkpoint") from error
    return checkpoint | {"state_dict": {name.removeprefix(_STATE): tensor for name, tensor in state.items()}}


class _Reader(dcp.FileSystemReader):
    """Torch's, except that the pickled table of contents may name nothing but the classes that it is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        with Path(self.path, _TABLE).open("rb") as file:
            return _TableUnpickler(file).load()


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _DATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{_TABLE} names {module}.{name}, which no table of contents does")
        return super().find_class(module, name)
