"""One row of tokens for human eyes: prompt, response, masked tokens and document boundaries, in colour and in signs."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError

LEGEND = Text.assemble(
    ("prompt", "cyan"),
    " · ",
    ("response", "green"),
    " · ",
    ("⟦masked⟧", "black on yellow"),
    " · ",
    ("⏹ eos", "bold red"),
)


def render(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    maskable: Sequence[bool],
    is_masked: Sequence[bool] | None = None,
    document_ids: Sequence[int] | None = None,
) -> Text:
    """The clean ids of one row, coloured; without colours the signs of the legend and the rules still tell.

    Args:
        ids: x_0 of the row, length L.
        tokenizer: decodes them.
        maskable: L flags, True in responses.
        is_masked: L flags; masked tokens are shown as what the model has to find, in ⟦ ⟧.
        document_ids: L numbers; where it changes another document begins, and -1 is padding. None is one document.
    """
    is_masked = is_masked if is_masked is not None else [False] * len(ids)
    document_ids = document_ids if document_ids is not None else [0] * len(ids)
    if not len(ids) == len(maskable) == len(is_masked) == len(document_ids):
        raise UserError(
            f"got {len(ids)} ids, {len(maskable)} maskable, {len(is_masked)} is_masked and {len(document_ids)} "
            "document_ids: pass one row, all of one length"
        )
    text = Text()
    rows = list(zip(ids, maskable, is_masked, document_ids, strict=True))
    for number, (place, document) in enumerate(groupby(rows, key=lambda token: int(token[3]))):
        tokens = [(int(i), bool(response), bool(masked)) for i, response, masked, _ in document]
        if place == -1:
            text.append(f"\n── {len(tokens):,} of padding ──\n", "dim")
            continue
        inside = sum(response for _, response, _ in tokens)
        text.append(
            f"\n── document {number + 1} · {len(tokens) - inside:,} prompt and {inside:,} response tokens, "
            f"{sum(masked for _, _, masked in tokens):,} masked ──\n",
            "bold",
        )
        for part, run in groupby(tokens, key=lambda token: token[1]):
            text.append("\n┌ response\n" if part else "┌ prompt\n", "dim")
            _append_part(text, list(run), tokenizer)
            text.append("\n")
    return text


def _append_part(text: Text, tokens: list[tuple[int, bool, bool]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Runs of one kind are decoded together, so that characters of several tokens stay whole."""
    eos = tokenizer.eos_token_id
    for (response, masked, is_eos), run in groupby(tokens, key=lambda token: (token[1], token[2], token[0] == eos)):
        ids = [token for token, _, _ in run]
        shown = f"⏹×{len(ids)}" if is_eos and len(ids) > 1 else "⏹" if is_eos else tokenizer.decode(ids)
        if masked:
            text.append(f"⟦{shown}⟧", "black on yellow")
        else:
            text.append(shown, "bold red" if is_eos else "green" if response else "cyan")
