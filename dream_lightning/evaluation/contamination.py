"""Overlap of training data with a benchmark: equal questions, and questions that share long word sequences."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dream_lightning.batch import Example
from dream_lightning.errors import check_range


class Overlap(NamedTuple):
    """A question of the benchmark that the training data holds."""

    question: str  # id
    training: str  # id of the first training row that shares it
    kind: str  # exact (the same words) or ngram


def contamination(training: Iterable[Example], questions: Sequence[Example], *, n: int = 13) -> list[Overlap]:
    """Questions with the words of a training row's prompt, or n consecutive words in common with one of its texts.

    Words are lower case, runs of letters or digits, so that spaces, LaTeX commands and punctuation do not hide a copy.
    13 is the length that GPT-3 used (Brown et al., arXiv:2005.14165). Shorter questions are found by equality only.
    """
    check_range("n", n, least=2)
    wanted: dict[tuple[str, ...], list[int]] = {}
    whole: dict[tuple[str, ...], list[int]] = {}
    for number, example in enumerate(questions):
        words = _words(example.prompt[-1]["content"])
        whole.setdefault(tuple(words), []).append(number)
        for gram in set(_grams(words, n)):
            wanted.setdefault(gram, []).append(number)
    found: dict[int, Overlap] = {}
    for example in training:
        prompt = _words(example.prompt[-1]["content"])
        for number in whole.get(tuple(prompt), ()):
            found[number] = Overlap(questions[number].id, example.id, "exact")
        for text in (prompt, _words(f"{example.thinking or ''} {example.answer}")):
            for gram in _grams(text, n):
                for number in wanted.get(gram, ()):
                    found.setdefault(number, Overlap(questions[number].id, example.id, "ngram"))
    return [found[number] for number in sorted(found)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _grams(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
