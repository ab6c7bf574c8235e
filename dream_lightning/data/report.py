"""Lengths of a set of documents, and what `max_length` and `overflow` do to them, as Markdown tables."""

import numpy as np

from dream_lightning.data.document_cache import TokenizedSet

_LIMITS = (1024, 2048, 4096, 8192)


def report(documents: TokenizedSet, *, max_length: int | None, overflow: str) -> str:
    """Lengths before truncation, how many documents fit, and what happened to the examples; aligned for a terminal."""
    full, prompt, cut = documents.full_length, documents.prompt_length, documents.cut_tokens
    whole, lost = documents.is_kept & (cut == 0), ~documents.is_kept
    kept_tokens = documents.lengths.sum() - documents.filled[documents.is_kept].sum()

    def outcome(name: str, examples: np.ndarray, tokens: int) -> list[str]:
        count = examples.sum()
        return [name, f"{count:,}", _share(count, len(full)), f"{tokens:,}", _share(tokens, full.sum())]

    limit = f"max_length {max_length:,}" if max_length is not None else "no max_length"
    return "\n\n".join(
        [
            "**Tokens before truncation**",
            _table(
                ["", "min", "25 %", "median", "75 %", "max", "sum"],
                _quartiles("prompt", prompt),
                _quartiles("response with eos", full - prompt),
                _quartiles("document", full),
            ),
            "**Documents that fit whole**",
            _table(
                ["tokens", "documents", "share"],
                *([f"{n:,}", f"{(full <= n).sum():,}", _share((full <= n).sum(), len(full))] for n in _LIMITS),
            ),
            f"**With {limit}, overflow {overflow}**",
            _table(
                ["", "documents", "share", "tokens", "share"],
                outcome("whole", whole, full[whole].sum()),
                outcome("shortened: kept part", cut > 0, kept_tokens - full[whole].sum()),
                outcome("shortened: cut part", cut > 0, cut.sum()),
                outcome("dropped", lost, full[lost].sum()),
                ["eos filled in", f"{(documents.filled > 0).sum():,}", "", f"{documents.filled.sum():,}", ""],
            ),
        ]
    )


def _table(*rows: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in rows
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _quartiles(name: str, values: np.ndarray) -> list[str]:
    numbers = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return [name, *(f"{round(number):,}" for number in numbers), f"{values.sum():,}"]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
