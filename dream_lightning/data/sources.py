"""A source of records, which is a file, a folder or a hub data set → rows, each with its origin for error messages."""

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from dream_lightning.data.additions import sample_rows
from dream_lightning.data.records import BLANK, READERS, Shard, check_file, shards_of
from dream_lightning.errors import UserError, reading

_STREAMED = (".jsonl", ".txt", ".parquet")


class Row(NamedTuple):
    """One raw record."""

    record: dict[str, Any]
    file: str
    number: int  # from 1; in a .jsonl file the line

    @property
    def origin(self) -> str:
        return f"{self.file}, row {self.number}"

    def value(self, column: str) -> Any:
        if column not in self.record:
            names = ", ".join(self.record)
            raise UserError(f"{self.origin} has no column {column!r}, it has {names}: set the schema or column options")
        return self.record[column]

    def text(self, column: str) -> str:
        value = self.value(column)
        if not isinstance(value, str):
            raise self.no_text(column, value)
        return value

    def optional_text(self, column: str | None) -> str | None:
        """A text, or a number as text; None if the record has no such column or if it is null, NaN or blank."""
        value = self.record.get(column)
        if value is None or value != value:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(int(value) if value % 1 == 0 else value)  # pandas makes floats of integers next to a null
        if not isinstance(value, str):
            raise self.no_text(column, value)
        return value if value.strip() else None

    def no_text(self, column: str, value: Any) -> UserError:
        got = "null" if value is None else f"a {type(value).__name__}"
        return UserError(f"{self.origin}: {column} is {got}, wanted text: correct or delete that row")


def read_rows(source: str | Path, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """Rows of a file (.jsonl, .json, .parquet, .csv, .txt), a folder, or a hub data set; `bundled` gives `sample_rows`.

    A folder was written by `datasets.save_to_disk`, or holds such files: those in it and in its `data/` are read that
    are called `split`, alone or with a number as in train-00000-of-00004.parquet. Raises UserError for a source that
    does not exist, is broken or has no rows.
    """
    path = Path(source)
    with reading(str(source), "a file, a folder or the name of a hub data set", "correct the name"):
        path = path.expanduser()
        exists = path.exists()
    if source == "bundled":
        part = "train" if split == "train" else "validation"
        rows = numbered(sample_rows(part), f"bundled-{part}")
    elif not exists:
        rows = _read_hub(str(source), split, subset)
    elif _was_saved_to_disk(path):
        rows = _read_saved(path, split)
    else:
        rows = chain.from_iterable(map(read_shard, _shards(path, split, sys.maxsize, tuple(READERS))))
    first = next(rows, None)
    if first is None:
        raise no_rows(source)
    yield first
    yield from rows


def numbered(records: Iterable[Any], name: str, first: int = 1) -> Iterator[Row]:
    """Rows of the records, which count from `first`; blank lines count, too. Raises UserError for what is no record."""
    for number, record in enumerate(records, first):
        if record is BLANK:
            continue
        if not isinstance(record, dict):
            raise UserError(f"{name}, row {number} is a {type(record).__name__}, wanted a JSON object: correct it")
        yield Row(record, name, number)


def find_shards(source: str | Path, size: int, split: str = "train") -> list[Shard]:
    """The shards of a file or of the files of a split in a folder, about `size` bytes each; no record is read.

    Raises UserError for a source that does not exist or cannot be cut.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist, and a stream reads local files only: download it, or correct it")
    if _was_saved_to_disk(path):
        raise UserError(f"{path} is a folder of save_to_disk, which is not streamed: write it with Dataset.to_parquet")
    shards = list(_shards(path, split, size, _STREAMED))
    if not shards:
        raise no_rows(source)
    return shards


def _shards(path: Path, split: str, size: int, kinds: tuple[str, ...]) -> Iterator[Shard]:
    for file in _files_of(path, split):
        check_file(file)
        if file.suffix not in kinds:
            raise UserError(f"{file} is a {file.suffix} file, of which no stream reads a part: convert it to .jsonl")
        with reading(file, f"a {file.suffix} file"):
            yield from shards_of(file, size)


def read_shard(shard: Shard) -> Iterator[Row]:
    """The rows of a shard, whose errors name the file and the row, or the shard's first byte and the row after it."""
    path = Path(shard.file)
    with reading(path, f"a {path.suffix} file"):
        yield from numbered(READERS[path.suffix](shard), shard.name, shard.number)


def no_rows(source: str | Path) -> UserError:
    return UserError(f"{source} has no rows: check that the file was written completely, or name another source")


def _was_saved_to_disk(path: Path) -> bool:
    with reading(str(path), "a file or a folder of data files"):
        return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets  # takes half a second

    with reading(folder, "a folder of save_to_disk"):
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise UserError(f"{folder} has no split {split!r}, it has {', '.join(data)}: name the folder of one")
            data = data[split]
        yield from numbered(data, folder.name)


def _files_of(path: Path, split: str) -> list[Path]:
    """A file, or those of a split in a folder or in its `data/`; warns if similar ones are left out."""
    if not path.is_dir():
        return [path]
    with reading(path, "a folder of data files"):
        files = sorted(f for place in (path, path / "data") for f in place.glob("*") if f.suffix in READERS)
    of_split = re.compile(rf"{re.escape(split)}([-._]\d+)?(-of-\d+)?(-[0-9a-f]{{16}})?")  # the last: older hub files
    chosen = [file for file in files if of_split.fullmatch(file.stem)]
    similar = ", ".join(file.name for file in files if file.name.startswith(split) and file not in chosen)
    if not chosen:
        found = ", ".join(file.name for file in files) or "no data file"
        raise UserError(
            f"{path} has {found}, wanted {split}.jsonl, {split}-00000-of-00004.parquet or such: name the file itself"
        )
    if similar:
        names = ", ".join(file.name for file in chosen)
        rank_zero_warn(f"{path}: {names} are read, {similar} are not: rename a file, or name one as the source")
    return chosen


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(tuple(READERS)):
        raise UserError(f"{name} does not exist: name a file, a folder, or a hub data set as owner/name")
    remedy = f"check the name, the subset ({subset}) and the network (HF_ENDPOINT, HF_HUB_OFFLINE)"
    import datasets

    with reading(name, "a file, folder or hub data set", remedy):
        yield from numbered(datasets.load_dataset(name, subset, split=split), name)
