"""A file → raw records: .jsonl, .txt and .parquet files whole or in shards, .json and .csv files whole."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from dream_lightning.errors import UserError, reading

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")  # only so can bytes of UTF-8 hold one
BLANK = object()  # an empty line of a .jsonl file, which counts
_MAGIC = {
    **{b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"},
    **{b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PAR1": "parquet", b"ARROW1": "arrow"},
    **{b"version https://git-lfs": "the pointer of a git-lfs file", b"<!DOCTYPE": "a web page", b"<html": "a web page"},
}


class Shard(NamedTuple):
    """A part of a file: bytes of a .jsonl or .txt file, rows of a row group of a .parquet file, else the whole."""

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


def check_file(path: Path) -> None:
    """Raise UserError for a file of a kind that is not read, or with the content of another kind."""
    if not path.is_file():  # a pipe would block and cannot be read twice
        kind = "folder" if path.is_dir() else "pipe or device"
        raise UserError(f"{path} is a {kind}, wanted a regular file: write its content to one")
    if path.suffix not in READERS:
        raise UserError(f"{path.name} is a {path.suffix or 'nameless'} file, wanted {', '.join(READERS)}: convert it")
    with reading(path, f"a {path.suffix} file"):
        with path.open("rb") as file:
            head = file.read(1000)
        kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if kind is None and b"\0" in head and path.suffix != ".parquet":
            kind = "binary data or UTF-16 text"
        if kind and f".{kind}" != path.suffix:
            raise UserError(f"{path} is {kind}, wanted a {path.suffix} file: unpack, convert or download it")


def shards_of(file: Path, size: int) -> list[Shard]:
    """The shards of a file, about `size` bytes each; no record is read."""
    status = file.stat()
    if file.suffix != ".parquet":
        bounds = [*range(0, status.st_size, size), status.st_size]
        return [Shard(str(file), status.st_mtime_ns, a, b, b - a) for a, b in pairwise(bounds)]
    metadata, shards, number = pyarrow.parquet.read_metadata(file), [], 1
    for group in range(metadata.num_row_groups):
        rows, whole = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
        parts = min(-(-whole // size), rows)
        for a, b in pairwise(rows * part // parts for part in range(parts + 1 if rows else 0)):
            shards.append(Shard(str(file), status.st_mtime_ns, a, b, whole * (b - a) // rows, group, number + a))
        number += rows
    return shards


def _lines(shard: Shard) -> Iterator[bytes]:
    """The lines that start in the shard's bytes. They end at \\n only: str.splitlines also splits inside of texts."""
    with open(shard.file, "rb") as file:
        if shard.first:
            file.seek(shard.first - 1)
            file.readline()
        while file.tell() < shard.last and (line := file.readline()):
            yield line


def _read_jsonl(shard: Shard) -> Iterator[Any]:
    name = shard.name
    for number, line in enumerate(_lines(shard), shard.number):
        yield parse_json(line, f"{name}, row {number}") if line.strip() else BLANK


def _read_txt(shard: Shard) -> Iterator[Any]:
    """Documents end at a line `<|endoftext|>`, or at the end."""
    content = b"".join(_lines(shard)).decode("utf-8-sig")
    for text in re.split(r"^<\|endoftext\|>(?:\r?\n|\Z)", content, flags=re.MULTILINE):
        if text.strip():
            yield {"text": text}


def _read_parquet(shard: Shard) -> Iterator[Any]:
    start = 0
    with pyarrow.parquet.ParquetFile(shard.file) as file:
        _refuse_repeated(file.schema_arrow.names, shard.name)
        for batch in file.iter_batches(batch_size=256, row_groups=[shard.group]):
            first, last = (min(max(row - start, 0), len(batch)) for row in (shard.first, shard.last))
            yield from batch.slice(first, last - first).to_pylist()
            if (start := start + len(batch)) >= shard.last:
                break


def _read_json(shard: Shard) -> Iterator[Any]:
    records = parse_json(Path(shard.file).read_bytes(), shard.name)
    if not isinstance(records, list):
        raise UserError(f"{shard.name} holds a {type(records).__name__}, wanted a list of objects: use .jsonl instead")
    yield from records


def _read_csv(shard: Shard) -> Iterator[Any]:
    with open(shard.file, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        try:
            _refuse_repeated(table.fieldnames or [], shard.name)
            for record in table:
                if None in record or None in record.values():
                    raise csv.Error(f"wanted {len(table.fieldnames)} fields as in the header; quote those with commas")
                yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{shard.name}, line {table.line_num}: {error}; correct it, or use UTF-8 .jsonl") from error


READERS = {
    **{".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv},
    ".txt": _read_txt,
}


def parse_json(content: bytes, origin: str) -> Any:
    """Raises UserError for what is no JSON, has a key twice, or holds a text that no encoding can store."""
    with reading(origin, "valid JSON", "correct it (.jsonl holds one object a line)"):
        value = _DECODER.decode(content.decode("utf-8-sig"))
        if _SURROGATE_ESCAPE.search(content):
            _refuse_surrogates(value, origin)
        return value


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"{_repeated([key for key, _ in pairs])!r} more than once, and one value would be lost")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_read_object)  # one for all rows: to make one takes as long as to read


def _refuse_repeated(names: Sequence[str], origin: str) -> None:
    if len(names) > len(set(names)):
        name = _repeated(names)
        raise UserError(f"{origin} has {name!r} more than once, and one value would be lost: rename or remove one")


def _repeated(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _refuse_surrogates(value: Any, origin: str) -> None:
    """One half of a surrogate pair in a value or, of the list in a .json file, in one of its rows."""
    if isinstance(value, list):
        for number, record in enumerate(value, 1):
            _refuse_surrogates(record, f"{origin}, row {number}")
    elif half := _SURROGATE.search(text := json.dumps(value, ensure_ascii=False)):
        near = ascii(text[max(half.start() - 20, 0) : half.end() + 20])
        raise UserError(f"{origin} has half a surrogate pair in {near}: correct or delete that row")
