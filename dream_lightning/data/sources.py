"""Rows as they stand in a file, a folder or on the hub, each with the place to name when something is wrong with it."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dream_lightning.data.additions import sample_rows
from dream_lightning.errors import UserError

BUNDLED = "bundled"  # the source's name of the package's own set


class Row(NamedTuple):
    """One raw record. `number` counts from 1; in a .jsonl file it is the line."""

    values: dict[str, Any]
    file: str
    number: int

    @property
    def origin(self) -> str:
        """As users read it in a message."""
        return f"{self.file}, row {self.number}"


def read_rows(source: str | Path, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .parquet or .csv file, of a folder, or of a hub data set; `bundled` gives `sample_set`.

    A folder is either one that `datasets.save_to_disk` wrote, or one with such files: then those whose name starts with
    `split` are read, in it or in its `data/`. Anything else that looks like `owner/name` is asked of the hub, or of its
    local cache when HF_HUB_OFFLINE is set; some data sets there need a `subset`, as GSM8K its `main`.

    Raises:
        UserError: nothing there, an unknown kind of file, a broken line, no rows.
    """
    path = Path(source).expanduser()
    if source == BUNDLED:
        part = "train" if split == "train" else "validation"
        rows = (Row(values, f"{BUNDLED}-{part}", i) for i, values in enumerate(sample_rows(part), 1))
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


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in _READERS:
        raise UserError(f"{path.name} is a {path.suffix or 'nameless'} file, wanted {', '.join(_READERS)}: convert it")
    for number, values in _READERS[path.suffix](path):
        yield Row(values, path.name, number)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as file:  # by line break only: str.splitlines would also split inside a text
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, f"{path.name}, row {number}")


def _read_json(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        records = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not valid JSON ({error}): one object a line belongs in .jsonl") from error
    if not isinstance(records, list):
        raise UserError(f"{path.name} holds a {type(records).__name__}, wanted a list of objects: use .jsonl instead")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path.name}, row {number} is a {type(record).__name__}, wanted an object: correct it")
        yield number, record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path.name} is not a parquet file ({error}): download or write it again") from error
    yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        number = 0
        try:
            for number, record in enumerate(table, 1):
                if None in record or None in record.values():
                    raise UserError(
                        f"{path.name}, row {number} has not as many fields as the header ({len(table.fieldnames)}): "
                        "quote fields that contain commas"
                    )
                yield number, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path.name}, row {number + 1}: {error}; write the file as UTF-8 .jsonl") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _json_object(line: bytes, origin: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: not valid JSON ({error}); correct or delete that line") from error
    if not isinstance(record, dict):
        raise UserError(f"{origin} is a {type(record).__name__}, wanted a JSON object: correct or delete that line")
    return record


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise UserError(
                    f"{folder} has no split {split!r}, it has {', '.join(data)}: name the folder of one of them"
                )
            data = data[split]
        yield from _rows_of(data, folder.name)
        return
    files = sorted(f for place in (folder, folder / "data") for f in place.glob("*") if f.suffix in _READERS)
    chosen = [file for file in files if file.name.startswith(split)]
    if not chosen:
        raise UserError(
            f"{folder} has no {', '.join(_READERS)} file whose name starts with {split!r}, it has "
            f"{', '.join(f.name for f in files) or 'none of any name'}: name the file itself"
        )
    for file in chosen:
        yield from _read_file(file)


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(tuple(_READERS)):
        raise UserError(f"{name} does not exist: name a file, a folder, or a hub data set as owner/name")
    try:
        data = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"no data from {name!r}: there is no such file or folder, and the hub gave {type(error).__name__}: "
            f"{error}. Check the name, the subset ({subset}) and the network (HF_ENDPOINT, HF_HUB_OFFLINE), or name a "
            "local file"
        ) from error
    yield from _rows_of(data, name)


def _rows_of(data: datasets.Dataset, name: str) -> Iterator[Row]:
    for number, values in enumerate(data, 1):
        yield Row(values, name, number)
