"""Raw records of a file, a folder or a hub data set, each with its origin for error messages."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from lightning.pytorch.utilities import rank_zero_warn

from dream_lightning.data.additions import sample_rows
from dream_lightning.errors import UserError, reading

_BLANK = object()  # an empty line of a .jsonl file, which counts
_MAGIC = {
    **{b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"},
    **{b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PAR1": "parquet", b"ARROW1": "arrow"},
    **{b"version https://git-lfs": "the pointer of a git-lfs file", b"<!DOCTYPE": "a web page", b"<html": "a web page"},
}
_SURROGATE = re.compile("[\ud800-\udfff]")


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

    def text(self, column: str) -> str:
        value = self.value(column)
        if not isinstance(value, str):
            raise self.no_text(column, value)
        return value

    def optional_text(self, column: str | None) -> str | None:
        """A text, or a number as text; None if the record has no such column or if it is null, NaN or blank."""
        value = self.values.get(column)
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
        is_folder, exists = path.is_dir(), path.exists()
    if source == "bundled":
        part = "train" if split == "train" else "validation"
        rows = numbered(sample_rows(part), f"bundled-{part}")
    elif is_folder:
        rows = _read_folder(path, split)
    elif exists:
        rows = _read_file(path)
    else:
        rows = _read_hub(str(source), split, subset)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source} has no rows: check that the file was written completely, or name another source")
    yield first
    yield from rows


def numbered(records: Iterable[Any], name: str, first: int = 1) -> Iterator[Row]:
    """Rows of the records, which count from `first`; blank lines count, too. Raises UserError for a broken record."""
    for number, record in enumerate(records, first):
        if record is _BLANK:
            continue
        if not isinstance(record, dict):
            raise UserError(f"{name}, row {number} is a {type(record).__name__}, wanted a JSON object: correct it")
        with reading(f"{name}, row {number}", "a flat record", "correct or delete that row"):  # RecursionError
            if text := _lone_surrogate(record):
                at = _SURROGATE.search(text).start()
                near = ascii(text[max(at - 20, 0) : at + 20])
                raise UserError(f"{name}, row {number} has half a surrogate pair in {near}: correct or delete that row")
        yield Row(record, name, number)


def _lone_surrogate(value: Any) -> str | None:
    """A text in a nested value that no encoding can store: JSON may hold one half of a surrogate pair."""
    if isinstance(value, str):
        return value if not value.isascii() and _SURROGATE.search(value) else None
    parts = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_lone_surrogate, parts)), None)


def check_file(path: Path) -> None:
    """Raise UserError for a file of a kind that is not read, or with the content of another kind."""
    if not path.is_file():  # a pipe would block and cannot be read twice
        kind = "folder" if path.is_dir() else "pipe or device"
        raise UserError(f"{path} is a {kind}, wanted a regular file: write its content to one")
    if path.suffix not in _READERS:
        raise UserError(f"{path.name} is a {path.suffix or 'nameless'} file, wanted {', '.join(_READERS)}: convert it")
    with reading(path, f"a {path.suffix} file"):
        with path.open("rb") as file:
            head = file.read(1000)
        kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if kind is None and b"\0" in head and path.suffix != ".parquet":
            kind = "binary data or UTF-16 text"
        if kind and f".{kind}" != path.suffix:
            raise UserError(f"{path} is {kind}, wanted a {path.suffix} file: unpack, convert or download it")


def _read_file(path: Path) -> Iterator[Row]:
    check_file(path)
    with reading(path, f"a {path.suffix} file"):
        yield from numbered(_READERS[path.suffix](path), path.name)


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # split at \n only: str.splitlines also splits at other separators inside a text
        for number, line in enumerate(file, 1):
            yield parse_line(line, f"{path.name}, row {number}")


def parse_line(line: bytes, origin: str) -> Any:
    return parse_json(line, origin) if line.strip() else _BLANK


def _read_json(path: Path) -> list[Any]:
    records = parse_json(path.read_bytes(), path.name)
    if not isinstance(records, list):
        raise UserError(f"{path.name} holds a {type(records).__name__}, wanted a list of objects: use .jsonl instead")
    return records


def parse_json(content: bytes, origin: str) -> Any:
    """Raises UserError for what is no JSON, or has a key twice."""

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in pairs], origin)
        return dict(pairs)

    with reading(origin, "valid JSON", "correct it (.jsonl holds one object a line)"):
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=read_object)


def _refuse_repeated(names: list[str], origin: str) -> None:
    if len(names) > len(set(names)):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{origin} has {repeated!r} more than once, and one value would be lost: rename or remove one")


def _read_parquet(path: Path) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        _refuse_repeated(file.schema_arrow.names, path.name)
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_txt(path: Path) -> Iterator[Any]:
    yield from split_texts(path.read_bytes())


def split_texts(content: bytes) -> Iterator[dict[str, str]]:
    """The documents of a .txt file, which end at a line `<|endoftext|>`, or at its end."""
    for text in re.split(r"^<\|endoftext\|>(?:\r?\n|\Z)", content.decode("utf-8-sig"), flags=re.MULTILINE):
        if text.strip():
            yield {"text": text}


def _read_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        try:
            _refuse_repeated(table.fieldnames or [], path.name)
            for record in table:
                if None in record or None in record.values():
                    raise csv.Error(f"wanted {len(table.fieldnames)} fields as in the header; quote those with commas")
                yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path.name}, line {table.line_num}: {error}; correct it, or use UTF-8 .jsonl") from error


_READERS = {
    **{".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv},
    ".txt": _read_txt,
}


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    with reading(folder, "a folder of data files or of save_to_disk"):
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            import datasets  # takes half a second

            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise UserError(
                        f"{folder} has no split {split!r}, it has {', '.join(data)}: name the folder of one"
                    )
                data = data[split]
            yield from numbered(data, folder.name)
            return
    for file in files_of(folder, split):
        yield from _read_file(file)


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a split in a folder or in its `data/`; warns if similar ones are left out."""
    with reading(folder, "a folder of data files"):
        files = sorted(f for place in (folder, folder / "data") for f in place.glob("*") if f.suffix in _READERS)
    of_split = re.compile(rf"{re.escape(split)}([-._]\d+)?(-of-\d+)?(-[0-9a-f]{{16}})?")  # the last: older hub files
    chosen = [file for file in files if of_split.fullmatch(file.stem)]
    similar = ", ".join(file.name for file in files if file.name.startswith(split) and file not in chosen)
    if not chosen:
        found = ", ".join(file.name for file in files) or "no data file"
        raise UserError(
            f"{folder} has {found}, wanted {split}.jsonl, {split}-00000-of-00004.parquet or such: name the file itself"
        )
    if similar:
        names = ", ".join(file.name for file in chosen)
        rank_zero_warn(f"{folder}: {names} are read, {similar} are not: rename a file, or name one as the source")
    return chosen


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(tuple(_READERS)):
        raise UserError(f"{name} does not exist: name a file, a folder, or a hub data set as owner/name")
    remedy = f"check the name, the subset ({subset}) and the network (HF_ENDPOINT, HF_HUB_OFFLINE)"
    import datasets

    with reading(name, "a file, folder or hub data set", remedy):
        yield from numbered(datasets.load_dataset(name, subset, split=split), name)
