"""A self-contained HTML page that steps through the denoising of one answer."""

import html
import json
from pathlib import Path
from string import Template
from typing import Any

import torch
import torch.nn.functional as F
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
    """The page of one row: a slider over the steps, tokens coloured by step or by confidence.

    Args:
        output: of one prompt without padding, [1, L], with its history.
        prompt: [P] int64; masks in it are positions to fill.
        notes: names and values shown below the title.

    Raises:
        UserError: no history, or several rows.
    """
    if output.history is None or output.history.shape[1] != 1:
        raise UserError("the output is not one row with a history: call diffusion_generate with return_history=True")
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    start = F.pad(prompt.cpu(), (0, output.history.shape[2] - len(prompt)), value=mask)  # [L]
    states = torch.cat([start[None], output.history[:, 0].cpu()])  # [S + 1, L]
    tokens = []
    for position, ids in enumerate(states.T.tolist()):
        changes = [[step, ids[step]] for step in range(1, len(ids)) if ids[step] != ids[step - 1]]
        confidence = round(float(output.confidence[0, position]), 4)
        is_prompt = position < len(prompt)
        tokens.append({"prompt": is_prompt, "start": ids[0], "changes": changes, "confidence": confidence})
    texts = {i: token_text(i, tokenizer) for i in states.unique().tolist()}
    data = {"steps": len(states) - 1, "mask": mask, "eos": eos, "texts": texts, "tokens": tokens}
    # "<" is the only character that could end the script element.
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    pairs = [(html.escape(str(name)), html.escape(str(value))) for name, value in (notes or {}).items()]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title), notes=listed, data=encoded)


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token's text; bytes of a character that several tokens share as ⟨E2⟩."""
    text = tokenizer.decode([token_id])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    characters = tokenizer.convert_ids_to_tokens(token_id)
    table = {character: byte for byte, character in enumerate(byte_characters())}
    return "".join(chr(byte) if (byte := table[c]) < 0x80 else f"⟨{byte:02X}⟩" for c in characters)
