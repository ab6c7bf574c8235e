"""One real row as the model sees it: prompt, response, masked tokens, boundaries.

python scripts/show.py --source train.jsonl --tokenizer Dream-org/Dream-v0-Instruct-7B --row 3 --t 0.4
"""

import torch
from jsonargparse import auto_cli
from rich.console import Console

from dream_lightning.data.prompt_format import Style
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.tokenization import Overflow, encode
from dream_lightning.diffusion import corrupt
from dream_lightning.model.tokenizer import load_tokenizer
from dream_lightning.readable_errors import readable_errors
from dream_lightning.viewer.row import LEGEND, render


def main(
    source: str,
    tokenizer: str,
    row: int = 1,
    t: float = 0.5,
    seed: int = 0,
    schema: str = "auto",
    prompt_column: str | None = None,
    response_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    style: Style = "chat",
    thinking: bool = True,
    max_length: int | None = None,
    overflow: Overflow = "truncate_trace",
    eos_fill_to: int | None = None,
) -> None:
    """Print the row.

    Args:
        source: file, folder or hub id of the records.
        tokenizer: folder or hub id, or bytes.
        row: number of the record, from 1.
        t: share of the response to mask, 0 for none.
        seed: of the mask.
        schema: how a record is read; auto goes by its columns.
        prompt_column: of prompt/response records.
        response_column: of prompt/response records.
        split: of a folder or hub data set.
        subset: of a hub data set that has several, such as main of openai/gsm8k.
        style: chat or plain.
        thinking: false leaves the thinking out.
        max_length: of prompt and response in tokens.
        overflow: what happens to a longer document.
        eos_fill_to: fill a shorter response with eos to this many tokens.
    """
    examples = read_examples(
        source,
        schema=schema,
        prompt_column=prompt_column,
        response_column=response_column,
        split=split,
        subset=subset,
    )
    if not 1 <= row <= len(examples):
        raise ValueError(f"row is {row}, {source} has 1 to {len(examples)}")
    words = load_tokenizer(tokenizer)
    encoded = encode(
        examples[row - 1],
        words,
        style=style,
        thinking=thinking,
        max_length=max_length,
        overflow=overflow,
        eos_fill_to=eos_fill_to,
    )
    if encoded.document is None:
        raise ValueError(f"row {row} has {encoded.full_length:,} tokens and is dropped: raise max_length to see it")
    prompt, response = encoded.document.prompt_ids, encoded.document.response_ids
    x_0 = torch.tensor([prompt + response])
    maskable = torch.tensor([[False] * len(prompt) + [True] * len(response)])
    noised = corrupt(
        x_0,
        maskable,
        mask_token_id=words.mask_token_id,
        t=torch.tensor([t]),
        generator=torch.Generator().manual_seed(seed),
    )
    console = Console()
    console.print(examples[row - 1].origin, "·", examples[row - 1].id, "·", LEGEND, highlight=False)
    console.print(
        render(x_0[0].tolist(), words, maskable=maskable[0].tolist(), is_masked=noised.is_masked[0].tolist()),
        soft_wrap=True,
    )


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
