"""The colored row shows what is in a document, with colors and without."""

import io

import pytest
from rich.console import Console

from dream_lightning.model.tokenizer import load_tokenizer
from dream_lightning.viewer.row import render

BYTES = load_tokenizer("bytes")


def printed(renderable, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(renderable, soft_wrap=True)
    return console.file.getvalue()


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
