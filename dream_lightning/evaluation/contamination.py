"""Overlap of training data with a benchmark: equal questions, and questions that share long word sequences."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from jsonargparse import ArgumentParser

from dream_lightning.batch import Example
from dream_lightning.data import read_examples
from dream_lightning.data.splits import text_key
from dream_lightning.errors import check_range


class Overlap(NamedTuple):
    """A question of the benchmark that the training data holds."""

    question: str  # id
    training: str  # id of the first training row that shares it
    kind: str  # exact (the same question) or ngram


def contamination(training: Iterable[Example], questions: Sequence[Example], *, n: int = 13) -> list[Overlap]:
    """Questions that are a training row's question, or share n consecutive words with one of its texts.

    Questions are equal without case, spacing and punctuation, as in `data.splits.without_overlap`. Words are lower
    case, runs of letters or digits, so that spaces, LaTeX commands and punctuation do not hide a copy. 13 is the length
    that GPT-3 used (Brown et al., arXiv:2005.14165). Shorter questions are found by equality only.

    Args:
        training: all its messages and responses are searched.
        questions: the last message is the question; examples shown before it do not count.
    """
    found: dict[int, Overlap] = {}
    for number, example, kind in _matches(training, questions, n):
        if number not in found or (kind == "exact" != found[number].kind):
            found[number] = Overlap(questions[number].id, example.id, kind)
    return [found[number] for number in sorted(found)]


def without_contamination(
    training: Sequence[Example], questions: Sequence[Example], *, n: int = 13
) -> tuple[list[Example], list[Example]]:
    """(kept, dropped) training rows: those that share a question or n words with `questions` are dropped."""
    shared = {id(example) for _, example, _ in _matches(training, questions, n)}
    kept = [example for example in training if id(example) not in shared]
    return kept, [example for example in training if id(example) in shared]


def contamination_report(parser: ArgumentParser, arguments: list[str]) -> None:
    """List benchmark questions that are in training data."""
    parser.add_argument("--training", type=str, required=True, help="file, folder or hub id of training records")
    parser.add_argument("--questions", type=str, required=True, help="file, folder or hub id of the benchmark")
    parser.add_argument("--n", type=int, default=13, help="consecutive words in common")
    options = parser.parse_args(arguments)
    training, questions = read_examples(options.training), read_examples(options.questions, split="test")
    overlaps = contamination(training, questions, n=options.n)
    for overlap in overlaps:
        print(f"{overlap.kind:8} {overlap.question}  in training row {overlap.training}")
    kinds = Counter(overlap.kind for overlap in overlaps)
    print(
        f"{len(overlaps):,} of {len(questions):,} questions are in {options.training}: {kinds['exact']:,} equal, "
        f"{kinds['ngram']:,} more share {options.n} words"
    )


def _matches(training: Iterable[Example], questions: Sequence[Example], n: int) -> Iterator[tuple[int, Example, str]]:
    """Number of the question, training row and kind, in the order of the rows; pairs may repeat."""
    check_range("n", n, least=2, whole=True)
    numbers_of_key: dict[str, list[int]] = {}
    numbers_of_gram: dict[tuple[str, ...], list[int]] = {}
    for number, example in enumerate(questions):
        numbers_of_key.setdefault(text_key(example.prompt[-1]["content"]), []).append(number)
        words = _words(example.prompt[-1]["content"])
        for gram in {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}:
            numbers_of_gram.setdefault(gram, []).append(number)
    begins = {gram[:2] for gram in numbers_of_gram}  # most places are none: comparing two words is five times faster
    for example in training:
        for message in example.prompt:
            if message["role"] == "user":
                for number in numbers_of_key.get(text_key(message["content"]), ()):
                    yield number, example, "exact"
        for text in (*(m["content"] for m in example.prompt), f"{example.thinking or ''} {example.answer}"):
            words = _words(text)
            for i, begin in enumerate(pairwise(words)):
                if begin in begins:
                    for number in numbers_of_gram.get(tuple(words[i : i + n]), ()):
                        yield number, example, "ngram"


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
