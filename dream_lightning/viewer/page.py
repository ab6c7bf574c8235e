"""A self-contained HTML page that steps through the denoising of one answer."""

import html
import json
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError
from dream_lightning.model.tokenizer import byte_characters
from dream_lightning.sampling import GenerationOutput

_PAGE = Path(__file__).with_name("page.html")


def denoising_page(
    output: GenerationOutput,
    prompt: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str = "Denoising",
    notes: dict[str, Any] | None = None,
) -> str:
    """The page of one row: a slider over the steps, tokens colored by step or by confidence.

    Args:
        output: of one prompt without padding, [1, L], with its history.
        prompt: [P] int64, unmodified; masks in it are positions to fill.
        tokenizer: decodes the tokens.
        title: of the page.
        notes: names and values shown below the title.

    Raises:
        UserError: no history, several rows, or a prompt longer than the rows.
    """
    if output.history is None:
        raise UserError("the output has no history: call diffusion_generate with return_history=True")
    steps, rows, length = output.history.shape
    if rows != 1 or len(prompt) > length:
        raise UserError(f"the history has {rows} rows of {length} and the prompt {len(prompt)} tokens: pass one answer")
    states = output.history[:, 0].tolist()  # [S][L]
    start = prompt.tolist() + [tokenizer.mask_token_id] * (length - len(prompt))
    eos = tokenizer.eos_token_id
    tokens = []
    for position, first in enumerate(start):
        changes, before = [], first
        for step, state in enumerate(states, start=1):
            if state[position] != before:
                before = state[position]
                changes.append([step, before])
        tokens.append(
            {
                "prompt": position < len(prompt),
                "start": first,
                "changes": changes,
                "confidence": round(float(output.confidence[0, position]), 4),
            }
        )
    texts = {i: _text(i, tokenizer) for token in tokens for i in (token["start"], *(c[1] for c in token["changes"]))}
    data = {"steps": steps, "mask": tokenizer.mask_token_id, "eos": eos, "texts": texts, "tokens": tokens}
    # "<" is the only character that could end the script element.
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    listed = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in (notes or {}).items()
    )
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title), notes=listed, data=encoded)


def _text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token's text; bytes of a character that several tokens share as ⟨E2⟩."""
    text = tokenizer.decode([token_id])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    characters = tokenizer.convert_ids_to_tokens(token_id)
    table = {character: byte for byte, character in enumerate(byte_characters())}
    return "".join(chr(byte) if (byte := table[c]) < 0x80 else f"⟨{byte:02X}⟩" for c in characters)
