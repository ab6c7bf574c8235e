"""Sources that do not fit in memory, cut into shards: byte ranges of .jsonl and .txt files, rows of .parquet files."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from dream_lightning.data.sources import Row, check_file, files_of, numbered, parse_line, split_texts
from dream_lightning.errors import UserError, reading

_KINDS = (".jsonl", ".txt", ".parquet")


class Shard(NamedTuple):
    """A part of a file that is read, tokenized and cached on its own."""

    file: str
    changed: int  # when the file was changed, in ns: a changed file is tokenized again
    first: int  # byte of a text file, row of a group of a parquet file
    last: int  # the one after the last
    size: int  # bytes of text, in a parquet file of all columns
    group: int = 0  # row group of a parquet file
    number: int = 1  # of its first row; in a text file rows count from the shard's first byte

    @property
    def name(self) -> str:
        name = Path(self.file).name
        return name if name.endswith(".parquet") or not self.first else f"{name} from byte {self.first}"


def find_shards(source: str | Path, size: int, split: str = "train") -> list[Shard]:
    """The shards of a file or of the files of a split in a folder, about `size` bytes each; reads no record.

    Raises UserError for a source that does not exist or cannot be cut.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist, and a stream reads local files only: download it, or correct it")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        raise UserError(f"{path} is a folder of save_to_disk, which is not streamed: write it with Dataset.to_parquet")
    shards = []
    for file in files_of(path, split) if path.is_dir() else [path]:
        check_file(file)
        if file.suffix not in _KINDS:
            raise UserError(f"{file} is a {file.suffix} file, of which no stream reads a part: convert it to .jsonl")
        shards += _parquet_shards(file, size) if file.suffix == ".parquet" else _text_shards(file, size)
    if not shards:
        raise UserError(f"{source} has no rows: check that it was written completely, or name another source")
    return shards


def _text_shards(file: Path, size: int) -> list[Shard]:
    status = file.stat()
    bounds = [*range(0, status.st_size, size), status.st_size]
    return [Shard(str(file), status.st_mtime_ns, a, b, b - a) for a, b in pairwise(bounds)]


def _parquet_shards(file: Path, size: int) -> list[Shard]:
    with reading(file, "a .parquet file"):
        metadata = pyarrow.parquet.read_metadata(file)
        groups = [
            (metadata.row_group(g).num_rows, metadata.row_group(g).total_byte_size)
            for g in range(metadata.num_row_groups)
        ]
    shards, number, changed = [], 1, file.stat().st_mtime_ns
    for group, (rows, whole) in enumerate(groups):
        parts = min(-(-whole // size), rows)
        bounds = [rows * part // parts for part in range(parts + 1)] if rows else []
        for a, b in pairwise(bounds):
            shards.append(Shard(str(file), changed, a, b, whole * (b - a) // rows, group, number + a))
        number += rows
    return shards


def read_shard(shard: Shard) -> Iterator[Row]:
    """The rows of a shard, whose errors name the file and the row, or the shard's first byte and the row after it."""
    path = Path(shard.file)
    with reading(path, f"a {path.suffix} file"):
        yield from numbered(_RECORDS[path.suffix](shard), shard.name, shard.number)


def _lines(shard: Shard) -> Iterator[bytes]:
    """The lines that start in the shard's bytes."""
    with open(shard.file, "rb") as file:
        if shard.first:
            file.seek(shard.first - 1)
            file.readline()
        while file.tell() < shard.last and (line := file.readline()):
            yield line


def _jsonl_records(shard: Shard) -> Iterator[Any]:
    for number, line in enumerate(_lines(shard), shard.number):
        yield parse_line(line, f"{shard.name}, row {number}")


def _text_records(shard: Shard) -> Iterator[Any]:
    yield from split_texts(b"".join(_lines(shard)))


def _parquet_records(shard: Shard) -> Iterator[Any]:
    start = 0
    with pyarrow.parquet.ParquetFile(shard.file) as file:
        for batch in file.iter_batches(batch_size=256, row_groups=[shard.group]):
            first, last = (min(max(row - start, 0), len(batch)) for row in (shard.first, shard.last))
            yield from batch.slice(first, last - first).to_pylist()
            if (start := start + len(batch)) >= shard.last:
                break


_RECORDS = {".jsonl": _jsonl_records, ".txt": _text_records, ".parquet": _parquet_records}
