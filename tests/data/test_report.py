"""The data report and the coloured row say what is in the documents, with colours and without."""

import io
import runpy
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dream_lightning.data.report import as_markdown, as_tables, report
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.tokenization import tokenize
from dream_lightning.model.tokenizer import load_tokenizer
from dream_lightning.viewer.row import render

BYTES = load_tokenizer("bytes")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def printed(renderable, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(renderable, soft_wrap=True)
    return console.file.getvalue()


def cells(markdown, name):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_real_rows_have_the_known_lengths(shared):
    tokenizer = load_tokenizer(shared("data/dream-v0-instruct-7b"))
    examples = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))
    sections = report(tokenize(examples, tokenizer, max_length=4096), max_length=4096, overflow="truncate_trace")
    text = as_markdown(sections)
    lengths = cells(text, "document")
    assert (lengths[0], lengths[2], lengths[4]) == ("969", "4,986", "9,098")  # FACTS §6
    assert (cells(text, "2,048")[0], cells(text, "4,096")[0]) == ("13", "37")
    assert (cells(text, "whole")[0], cells(text, "shortened: cut part")[0], cells(text, "dropped")[0]) == (
        "37",
        "54",
        "0",
    )
    table = printed(as_tables(sections))
    assert all(cell in table for section in sections for row in section.rows for cell in row)


@pytest.mark.parametrize("overflow", ["drop", "truncate_trace_else_drop", "truncate_right"])
def test_every_token_is_accounted_for(shared, overflow):
    examples = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))[:15]
    documents = tokenize(examples, BYTES, max_length=9000, overflow=overflow, eos_fill_to=100)
    text = as_markdown(report(documents, max_length=9000, overflow=overflow))

    def number(name, column):
        return int(cells(text, name)[column].replace(",", ""))

    parts = ("whole", "shortened: kept part", "shortened: cut part", "dropped")
    assert sum(number(part, 2) for part in parts) == number("document", 5) == documents.full_length.sum()
    assert sum(number(part, 0) for part in ("whole", "shortened: cut part", "dropped")) == 15


def test_row_without_colours_tells_the_parts_apart():
    prompt, response = list(b"q?"), [*b"ab \xc3\xa9", BYTES.eos_token_id, BYTES.eos_token_id, BYTES.eos_token_id]
    flags = {"maskable": [False] * 2 + [True] * 8}
    plain = printed(render(prompt + response, BYTES, **flags), no_color=True)
    assert "document 1 · 2 prompt and 8 response tokens, 0 masked" in plain
    assert "┌ prompt\nq?\n" in plain and "┌ response\nab é⏹×3\n" in plain
    masked = [False] * 3 + [True, True] + [False] * 2 + [True, False, False]
    shown = printed(render(prompt + response, BYTES, **flags, is_masked=masked), no_color=True)
    assert "3 masked" in shown and "a⟦b ⟧é⟦⏹⟧⏹×2" in shown
    assert "\x1b[" not in shown
    coloured = printed(render(prompt + response, BYTES, **flags, is_masked=masked), force_terminal=True)
    assert "\x1b[" in coloured


def test_packed_row_shows_boundaries_and_padding():
    text = printed(
        render(
            list(b"abcdef") + [BYTES.pad_token_id] * 2,
            BYTES,
            maskable=[False, True, True, False, True, True, False, False],
            document_ids=[4, 4, 4, 9, 9, 9, -1, -1],
        )
    )
    assert [
        text.index(part) for part in ("document 1", "a\n", "bc", "document 2", "d\n", "ef", "2 of padding")
    ] == sorted(text.index(part) for part in ("document 1", "a\n", "bc", "document 2", "d\n", "ef", "2 of padding"))
    with pytest.raises(ValueError, match="pass one row"):
        render([1, 2], BYTES, maskable=[True])


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_scripts(monkeypatch, capsys, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1+1?", "response": "<think>one and one</think>2"}\n')
    given = ("--source", str(path), "--tokenizer", "bytes")
    run_script(monkeypatch, "data_report.py", *given, "--max_length", "35", "--markdown", "true")
    assert cells(capsys.readouterr().out, "shortened: cut part")[0] == "1"
    monkeypatch.setenv("NO_COLOR", "1")
    run_script(monkeypatch, "show.py", *given, "--t", "0")
    shown = capsys.readouterr().out
    assert "train.jsonl, row 1" in shown and "<think>\none and one\n</think>\n2⏹" in shown
    run_script(monkeypatch, "show.py", *given, "--t", "1")
    assert "⟦<think>\none and one\n</think>\n2⟧⟦⏹⟧" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "show.py", *given, "--row", "2")
    assert "error: row is 2" in capsys.readouterr().err
