"""What a set of documents looks like and what the length limit does to it, as a table for the terminal or Markdown."""

from dataclasses import dataclass

import numpy as np
from rich.console import Group
from rich.table import Table

from dream_lightning.data.tokenization import TokenizedSet

_LIMITS = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Section:
    """One table: a title, the heads of its columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report(documents: TokenizedSet, *, max_length: int | None, overflow: str) -> list[Section]:
    """Lengths before any cut, what would fit, and what became of the examples under `max_length` and `overflow`."""
    full, prompt = documents.full_length, documents.prompt_length
    cut = documents.cut_tokens
    lost = full[~documents.is_kept]
    lengths = Section(
        "Tokens before any cut",
        ("", "min", "25 %", "median", "75 %", "max", "sum"),
        (
            _quartiles("prompt", prompt),
            _quartiles("response with eos", full - prompt),
            _quartiles("document", full),
        ),
    )
    fits = Section(
        "Documents that fit whole",
        ("tokens", "documents", "share"),
        tuple(
            (f"{limit:,}", f"{(full <= limit).sum():,}", _share((full <= limit).sum(), len(full))) for limit in _LIMITS
        ),
    )
    limit = f"max_length {max_length:,}" if max_length is not None else "no max_length"
    kept_tokens = int(documents.lengths.sum() - documents.filled[documents.is_kept].sum())
    outcome = Section(
        f"With {limit}, overflow {overflow}",
        ("", "documents", "share", "tokens", "share"),
        (
            _outcome("whole", (documents.is_kept & (cut == 0)).sum(), full[documents.is_kept & (cut == 0)].sum(), full),
            _outcome(
                "shortened: kept part", (cut > 0).sum(), kept_tokens - full[documents.is_kept & (cut == 0)].sum(), full
            ),
            _outcome("shortened: cut part", (cut > 0).sum(), cut.sum(), full),
            _outcome("dropped", len(lost), lost.sum(), full),
            ("eos filled in", f"{(documents.filled > 0).sum():,}", "", f"{documents.filled.sum():,}", ""),
        ),
    )
    return [lengths, fits, outcome]


def as_tables(sections: list[Section]) -> Group:
    """For `rich.print`."""
    tables = []
    for section in sections:
        table = Table(title=section.title, title_justify="left")
        for number, column in enumerate(section.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in section.rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables)


def as_markdown(sections: list[Section]) -> str:
    """For a README or an issue."""
    blocks = []
    for section in sections:
        lines = [section.columns, ("---", *["---:"] * (len(section.columns) - 1)), *section.rows]
        blocks.append("\n".join([f"**{section.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(blocks)


def _quartiles(name: str, values: np.ndarray) -> tuple[str, ...]:
    numbers = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return (name, *(f"{round(number):,}" for number in numbers), f"{values.sum():,}")


def _outcome(name: str, documents: int, tokens: int, full: np.ndarray) -> tuple[str, ...]:
    return (name, f"{documents:,}", _share(documents, len(full)), f"{tokens:,}", _share(tokens, full.sum()))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
