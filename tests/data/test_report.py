"""The data report accounts for every token."""

import pytest

from dream_lightning.data.document_cache import tokenize
from dream_lightning.data.report import report
from dream_lightning.data.schemas import read_examples
from dream_lightning.model.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def cells(markdown, name):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    (row,) = [row for row in rows if row[0] == name]
    return row[1:]


def test_real_rows_have_the_known_lengths(shared):
    tokenizer = load_tokenizer(shared("data/dream-v0-instruct-7b"))
    examples = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))
    text = report(tokenize(examples, tokenizer, max_length=4096), max_length=4096, overflow="truncate_trace")
    lengths = cells(text, "document")
    assert (lengths[0], lengths[2], lengths[4]) == ("969", "4,986", "9,098")  # FACTS §6
    assert (cells(text, "2,048")[0], cells(text, "4,096")[0]) == ("13", "37")
    assert [cells(text, name)[0] for name in ("whole", "shortened: cut part", "dropped")] == ["37", "54", "0"]
    assert len({len(line) for line in text.split("\n\n")[1].splitlines()}) == 1  # aligned


@pytest.mark.parametrize("overflow", ["drop", "truncate_trace_else_drop", "truncate_right"])
def test_every_token_is_accounted_for(shared, overflow):
    examples = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))[:15]
    documents = tokenize(examples, BYTES, max_length=9000, overflow=overflow, eos_fill_to=100)
    text = report(documents, max_length=9000, overflow=overflow)

    def number(name, column):
        return int(cells(text, name)[column].replace(",", ""))

    parts = ("whole", "shortened: kept part", "shortened: cut part", "dropped")
    assert sum(number(part, 2) for part in parts) == number("document", 5) == documents.full_length.sum()
    assert sum(number(part, 0) for part in ("whole", "shortened: cut part", "dropped")) == 15
