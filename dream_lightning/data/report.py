"""Lengths of a set of documents, and what `max_length` and `overflow` do to them, as Markdown tables."""

import numpy as np

from dream_lightning.data.document_cache import TokenizedSet

_LIMITS = (1024, 2048, 4096, 8192)


def report(documents: TokenizedSet, *, max_length: int | None, overflow: str) -> str:
    full, prompt, cut = documents.full_length, documents.prompt_length, documents.cut_tokens
    whole, lost = documents.is_kept & (cut == 0), ~documents.is_kept
    kept_tokens = documents.lengths.sum() - documents.filled[documents.is_kept].sum()

    def lengths(values: np.ndarray) -> list[str]:
        return [f"{round(n):,}" for n in (*np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), values.sum())]

    def share(part: int, total: int) -> list[str]:
        return [f"{part:,}", f"{100 * part / total:.1f} %"]

    def outcome(examples: np.ndarray, tokens: int) -> list[str]:
        return share(examples.sum(), len(full)) + share(tokens, full.sum())

    tables = {
        "Tokens before truncation": [
            ["", "min", "25 %", "median", "75 %", "max", "sum"],
            ["prompt", *lengths(prompt)],
            ["response with eos", *lengths(full - prompt)],
            ["document", *lengths(full)],
        ],
        "Documents that fit whole": [
            ["tokens", "documents", "share"],
            *([f"{n:,}", *share((full <= n).sum(), len(full))] for n in _LIMITS),
        ],
        f"With {f'max_length {max_length:,}' if max_length else 'no max_length'}, overflow {overflow}": [
            ["", "documents", "share", "tokens", "share"],
            ["whole", *outcome(whole, full[whole].sum())],
            ["shortened: kept part", *outcome(cut > 0, kept_tokens - full[whole].sum())],
            ["shortened: cut part", *outcome(cut > 0, cut.sum())],
            ["dropped", *outcome(lost, full[lost].sum())],
            ["eos filled in", f"{(documents.filled > 0).sum():,}", "", f"{documents.filled.sum():,}", ""],
        ],
    }
    return "\n\n".join(f"**{title}**\n\n{_table(rows)}" for title, rows in tables.items())


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
