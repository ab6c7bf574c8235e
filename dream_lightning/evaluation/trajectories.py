"""A model's own answers as training data: texts, and the order in which their tokens were filled."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dream_lightning.atomic import write_texts
from dream_lightning.batch import Example, SampleKey
from dream_lightning.data import read_examples
from dream_lightning.data.packing import collate_prompts
from dream_lightning.data.prompt_format import Style, encode_prompt
from dream_lightning.data.schemas import choose_reader
from dream_lightning.data.sources import numbered
from dream_lightning.data.tokenization import encode
from dream_lightning.errors import UserError, check_range
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, diffusion_generate
from dream_lightning.tasks import grade_response
from dream_lightning.viewer.commands import open_model, parse


def write_trajectories(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write right answers, and the order in which they were filled."""
    parser.add_argument("--out", type=str, required=True, help="the file, JSON lines")
    parser.add_argument("--count", type=int | None, default=None, help="answer only so many questions, the first ones")
    options, opened, reading, answering = parse(
        parser, arguments, open_model, read_examples, trajectories, skip={"model", "tokenizer", "examples"}
    )
    check_range("count", options.count, least=1, whole=True)
    examples = read_examples(**reading)[: options.count]
    rows = list(trajectories(*open_model(**opened), examples, **answering))
    out = Path(options.out)
    write_texts(out.parent, {out.name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)})
    print(f"wrote {out}: {len(rows):,} of {len(examples):,} answers are right, end, and are tokenized as written")


def trajectories(
    model: DreamModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    sampling: SamplingParams = SamplingParams(forbid_mask=True),  # noqa: B008 (frozen)
    style: Style = "chat",
    system_prompt: str | None = None,
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """Records of the schema `messages` with `filled_at`, the step at which each token of the response was filled.

    An answer is left out if it is wrong, has no eos, or other tokens after it, or if its text is not tokenized into the
    same ids. To train on the others, set `data.trajectories`, `data.eos_fill_to` to `sampling.max_new_tokens`, and
    `data.max_length` to `sampling.max_length` if it is set.

    Args:
        examples: questions; those without a reference are not graded.
        sampling: how they are answered; few tokens a step give an order that is easy to follow.
        style: style of the prompt.
        system_prompt: replaces the record's or the template's.
        batch_size: questions answered at once.

    Raises:
        UserError: `sampling.stop_at_eos`, which fills positions at no step; as `diffusion_generate`.
    """
    check_range("batch_size", batch_size, least=1, whole=True)
    if sampling.stop_at_eos:
        raise UserError("sampling.stop_at_eos fills the rest of an answer at no step: set it to false")
    prompting = {"style": style, "system_prompt": system_prompt}
    encoding = {**prompting, "eos_fill_to": sampling.room(0), "max_length": sampling.max_length, "trajectories": True}
    for start in tqdm(range(0, len(examples), batch_size), desc="Answering", unit=" batches", disable=None):
        part = enumerate(examples[start : start + batch_size], start)
        prompts = [[(SampleKey(0, n, n), (e, encode_prompt(e, tokenizer, **prompting)))] for n, e in part]
        batch = collate_prompts(prompts, pad_token_id=tokenizer.pad_token_id).to(model.device)
        inputs = batch.input_ids, batch.attention_mask
        out = diffusion_generate(model, *inputs, params=sampling, sample_ids=batch.sample_ids)
        new = [x[:, inputs[0].shape[1] :].tolist() for x in (out.sequences, out.filled_at)]
        for example, length, *answer in zip(batch.examples, inputs[1].sum(1).tolist(), *new, strict=True):
            ids, filled_at = (x[: sampling.room(length)] for x in answer)
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else 0
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            if text.strip() and grade_response(text, example).correct is not False:
                messages = [*example.prompt, {"role": "assistant", "content": text}]
                row = {"id": example.id, "messages": messages, "filled_at": filled_at}
                if _response_ids(row, tokenizer, **encoding) == ids:
                    yield row


def _response_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **encoding: Any) -> list[int]:
    """As training will see them."""
    rows = list(numbered([row], "an answer"))
    read = choose_reader(rows, "messages").read(*rows)
    return encode(read, tokenizer, **encoding).document.response_ids if read.answer.strip() else []
