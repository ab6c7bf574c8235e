"""Which records are used: filters, the split into training and validation, mixtures, overlap with a test set."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from dream_lightning.batch import Example
from dream_lightning.data.prompt_format import response_text
from dream_lightning.data.sources import Row
from dream_lightning.errors import UserError

T = TypeVar("T", Row, Example)
Filters = dict[str, list[str]]  # column → values, of which a record must have one


def passes(record: dict[str, Any], filters: Filters) -> bool:
    """Whether the value in every named column, as text, is one of the listed ones."""
    return all(name in record and str(record[name]) in map(str, values) for name, values in filters.items())


def keep(items: list[T], filters: Filters) -> list[T]:
    """The rows or examples whose record passes. Raises UserError if nothing is left."""
    for column, values in filters.items():
        present = sorted({str(item.record[column]) for item in items if column in item.record})
        if not present:
            names = ", ".join(items[0].record)
            raise UserError(f"{items[0].origin} has no column {column!r}, it has {names}: correct the filters")
        items = [item for item in items if passes(item.record, {column: values})]
        if not items:
            found = ", ".join(present[:10])
            raise UserError(f"filters leave nothing: no row has {column} in {values}; values found: {found}")
    return items


def split(
    examples: list[Example], *, validation_fraction: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, disjoint in their questions and each in the old order.

    Questions are ranked by a hash of (seed, question) and go to validation, with all their repetitions, until it holds
    `validation_fraction` of the examples. Raises UserError if one of the two sides is empty.
    """
    keys = list(map(question_key, examples))
    counts = Counter(keys)
    wanted, taken, held = round(validation_fraction * len(examples)), 0, set()
    for key in sorted(counts, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).hexdigest()):
        if taken >= wanted:
            break
        held.add(key)
        taken += counts[key]
    training, validation = _partition(examples, keys, held)
    if not training or not validation:
        raise UserError(
            f"validation_fraction {validation_fraction} of {len(counts)} different questions leaves {len(training)} "
            f"examples for training and {len(validation)} for validation: change it, or set validation_source"
        )
    return training, validation


def mix(parts: list[list[Example]], weights: dict[str, float]) -> list[Example]:
    """An epoch of several sources, in which the weights are the shares of the text.

    Every example occurs at least once; those of a source with more weight than text are repeated, evenly.
    """
    sizes = [sum(len(m["content"]) for e in p for m in (*e.prompt, {"content": response_text(e)})) for p in parts]
    if empty := [name for name, size in zip(weights, sizes, strict=True) if not size]:
        raise UserError(f"{empty[0]} has no text left to train on: change filters or validation_fraction, or drop it")
    repeats = [weight / size for weight, size in zip(weights.values(), sizes, strict=True)]
    counts = [round(len(part) * r / min(repeats)) for part, r in zip(parts, repeats, strict=True)]
    return [part[k * len(part) // n] for part, n in zip(parts, counts, strict=True) for k in range(n)]


def warn_of_overlap(training: list[Example], validation: list[Example]) -> None:
    """Warn if questions are in both: scores of the validation are then too good."""
    same = without_overlap(validation, training)[1]
    if same:
        rank_zero_warn(
            f"{len(same)} of {len(validation)} validation questions are in the training data too, first "
            f"{same[0].origin}: remove them, with dream_lightning.data.splits.without_overlap or by hand, or leave "
            "validation_source out to split the training data"
        )


def without_overlap(examples: list[Example], other: list[Example]) -> tuple[list[Example], list[Example]]:
    """(kept, dropped): an example is dropped if its question occurs in `other`. Of s1K, MATH-500 drops 3."""
    return _partition(examples, map(question_key, examples), set(map(question_key, other)))


def _partition(examples: list[Example], keys: Iterable[str], chosen: set[str]) -> tuple[list[Example], list[Example]]:
    """The examples whose key is not chosen, and the others."""
    parts: tuple[list[Example], list[Example]] = [], []
    for example, key in zip(examples, keys, strict=True):
        parts[key in chosen].append(example)
    return parts


def question_key(example: Example) -> str:
    """Equal for copies of a question: words, digits and operators of the user messages, without case and spacing.

    A plain text is its own question.
    """
    asked = "\n".join(message["content"] for message in example.prompt if message["role"] == "user")
    return text_key(asked if example.prompt else example.answer)


def text_key(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+|[-+*/^=<>]", text.casefold())) or "".join(text.split())
