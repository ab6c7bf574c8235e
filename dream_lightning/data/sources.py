"""Raw records of a file, a folder or a hub data set, each with its origin for error messages."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dream_lightning.data.additions import sample_rows
from dream_lightning.errors import UserError

_BLANK = object()  # an empty line of a .jsonl file, which counts


class Row(NamedTuple):
    """One raw record."""

    values: dict[str, Any]
    file: str
    number: int  # from 1; in a .jsonl file the line

    @property
    def origin(self) -> str:
        return f"{self.file}, row {self.number}"

    def value(self, column: str) -> Any:
        if column not in self.values:
            names = ", ".join(self.values)
            raise UserError(f"{self.origin} has no column {column!r}, it has {names}: set the schema or column options")
        return self.values[column]

    def text(self, column: str, *, or_integer: bool = False) -> str:
        value = self.value(column)
        if or_integer and type(value) is int:
            return str(value)
        if not isinstance(value, str):
            got = "null" if value is None else f"a {type(value).__name__}"
            raise UserError(f"{self.origin}: {column} is {got}, wanted text: correct or delete that row")
        return value


def read_rows(source: str | Path, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .parquet or .csv file, of a folder, or of a hub data set; `bundled` gives `sample_rows`.

    A folder was written by `datasets.save_to_disk`, or holds such files: those in it and in its `data/` are read whose
    name starts with `split`. Raises UserError for a source that does not exist, is broken or has no rows.
    """
    path = Path(source).expanduser()
    if source == "bundled":
        part = "train" if split == "train" else "validation"
        rows = _numbered(sample_rows(part), f"bundled-{part}")
    elif path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split)
    else:
        rows = _read_hub(str(source), split, subset)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source} has no rows: check that the file was written completely, or name another source")
    yield first
    yield from rows


def _numbered(records: Iterable[Any], name: str) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        if record is _BLANK:
            continue
        if not isinstance(record, dict):
            raise UserError(f"{name}, row {number} is a {type(record).__name__}, wanted a JSON object: correct it")
        yield Row(record, name, number)


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in _READERS:
        raise UserError(f"{path.name} is a {path.suffix or 'nameless'} file, wanted {', '.join(_READERS)}: convert it")
    return _numbered(_READERS[path.suffix](path), path.name)


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # split at \n only: str.splitlines also splits at other separators inside a text
        for number, line in enumerate(file, 1):
            yield _parse_json(line, f"{path.name}, row {number}") if line.strip() else _BLANK


def _read_json(path: Path) -> list[Any]:
    records = _parse_json(path.read_bytes(), path.name)
    if not isinstance(records, list):
        raise UserError(f"{path.name} holds a {type(records).__name__}, wanted a list of objects: use .jsonl instead")
    return records


def _parse_json(content: bytes, origin: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: not valid JSON ({error}); correct it (.jsonl holds one object a line)") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path.name} is not a parquet file ({error}): download or write it again") from error
    return (record for batch in batches for record in batch.to_pylist())


def _read_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        try:
            for record in table:
                if None in record or None in record.values():
                    raise csv.Error(f"wanted {len(table.fieldnames)} fields as in the header; quote those with commas")
                yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path.name}, line {table.line_num}: {error}; correct it, or use UTF-8 .jsonl") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise UserError(f"{folder} has no split {split!r}, it has {', '.join(data)}: name the folder of one")
            data = data[split]
        return _numbered(data, folder.name)
    files = sorted(file for place in (folder, folder / "data") for file in place.glob("*") if file.suffix in _READERS)
    chosen = [file for file in files if file.name.startswith(split)]
    if not chosen:
        found = ", ".join(file.name for file in files) or "no data file"
        raise UserError(f"{folder} has {found}, wanted a file whose name starts with {split!r}: name the file itself")
    return (row for file in chosen for row in _read_file(file))


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(tuple(_READERS)):
        raise UserError(f"{name} does not exist: name a file, a folder, or a hub data set as owner/name")
    try:
        return _numbered(datasets.load_dataset(name, subset, split=split), name)
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"no file, folder or hub data set {name!r} ({type(error).__name__}: {error}): check the name, the subset "
            f"({subset}) and the network (HF_ENDPOINT, HF_HUB_OFFLINE)"
        ) from error
