"""Answers to prompts, as texts or graded; and gaps in a text filled."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Answers, Example, Message, Prediction, PromptBatch
from dream_lightning.data.prompt_format import encode_prompt, encode_rendered
from dream_lightning.errors import UserError, check_range
from dream_lightning.sampling import SamplingParams, diffusion_generate, infill_variable_length
from dream_lightning.tasks import grade_response


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    params: SamplingParams,
    *,
    with_history: bool = False,
    run_every_step: bool = False,
) -> Answers:
    """Generate, decode each response up to its first eos, and grade it by its example's task.

    A row without a prompt, a question that is too long, gets an empty answer, which is wrong if it is scored.

    Args:
        model: a DreamModel or its CompiledDenoiser.
        with_history: keep the states of denoising.
    """
    start = time.perf_counter()
    options = {"return_history": with_history, "sample_ids": batch.sample_ids, "run_every_step": run_every_step}
    asked = batch.attention_mask.any(1)  # [B]
    real = batch.attention_mask.clone()
    real[:, -1] = True  # a row needs a token
    out = diffusion_generate(model, batch.input_ids, real, params=params, **options)
    prompt_length = batch.input_ids.shape[1]
    rows = out.sequences[:, prompt_length:].tolist()
    seconds = (time.perf_counter() - start) / len(rows)
    predictions = []
    filled, forwards = ((out.filled_at >= 0).sum(1) * asked).tolist(), (out.forwards * asked).tolist()
    for b, (example, ids) in enumerate(zip(batch.examples, rows, strict=True)):
        ids = _up_to_eos(ids, tokenizer) if asked[b] else []
        text = tokenizer.decode(ids, skip_special_tokens=True)
        predictions.append(
            Prediction(
                id=example.id,
                prompt=example.prompt[-1]["content"],
                prediction=text,
                reference=example.reference,
                tokens=len(ids),
                seconds=round(seconds, 4),
                forwards=forwards[b],
                filled=filled[b],
                too_long=not bool(asked[b]),
                **vars(grade_response(text, example)),
            )
        )
    return Answers(predictions, batch.counted.tolist(), out.history, prompt_length)


def answer_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    style: Literal["chat", "plain", "rendered"] = "chat",
) -> list[str]:
    """Texts → texts: the answers that `predict` gives to these questions, in their order.

    Prompts are bucketed by length. With `forbid_mask`, an answer does not depend on `batch_size`.

    Args:
        model: a DreamModel or its CompiledDenoiser.
        prompts: texts, or their token ids.
        stop: an answer ends before the first of these strings, or at its first eos.
        batch_size: prompts of a forward.
        style: `chat` and `plain` put a question into a prompt as in training; `rendered` is the whole prompt, in which
            only special tokens of the chat template are special.

    Raises:
        UserError: an empty prompt or stop string; as `diffusion_generate`.
    """
    if "" in stop:
        raise UserError("stop has an empty string, before which every answer is empty: remove it")
    answers = []
    for row in answer_ids(model, [_encode(p, tokenizer, style) for p in prompts], params, batch_size=batch_size):
        text = tokenizer.decode(_up_to_eos(row, tokenizer), skip_special_tokens=True)
        answers.append(text[: min((at for word in stop if (at := text.find(word)) >= 0), default=None)])
    return answers


@torch.no_grad()
def answer_ids(
    model: nn.Module, prompts: Sequence[Sequence[int]], params: SamplingParams, *, batch_size: int = 16
) -> list[list[int]]:
    """Token ids → the `params.room(…)` ids of each answer; prompts are bucketed by length."""
    check_range("batch_size", batch_size, least=1, whole=True)
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0)} is empty, wanted at least one token: remove it")
    order = sorted(range(len(prompts)), key=lambda n: -lengths[n])
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [torch.tensor(prompts[n], device=model.device) for n in numbers]
        left = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(rows, padding_value=model.config.pad_token_id or 0, **left)  # [B, P]
        real = pad_sequence([torch.ones_like(row) for row in rows], **left)  # [B, P]
        out = diffusion_generate(model, ids, real, params=params, sample_ids=torch.tensor(numbers))
        for n, row in zip(numbers, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
            answers[n] = row[: params.room(lengths[n])]
    return answers


def _encode(prompt: str | list[int], tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    if style == "rendered":
        return encode_rendered(prompt, tokenizer)
    asked = Example("asked", (Message(role="user", content=prompt),), None, "", None, "a prompt")
    return encode_prompt(asked, tokenizer, style=style)


def _up_to_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens_per_gap: int = 8,
    marker: str = "…",
    params: SamplingParams | None = None,
    longest: int | None = None,
) -> str:
    """Fill the gaps of a text from both sides: `complete(model, tokenizer, "The … is blue.")`.

    Args:
        text: with a `marker` for every gap; special tokens in it are plain text.
        tokens_per_gap: tokens in each gap, none of them eos.
        params: `max_new_tokens` and `max_length` are not used. None fills one token a step, the most certain first.
        longest: with a DreamOn, gaps begin with `tokens_per_gap` tokens, grow and shrink, to this many in all of them.

    Raises:
        UserError: the text has no gap, or a gap no token; as `diffusion_generate`.
    """
    pieces = text.split(marker) if marker else []
    if len(pieces) <= 1:
        raise UserError(f"the text has no {marker!r}, so there is nothing to fill: put it where a gap is")
    if tokens_per_gap < 1:
        raise UserError(f"tokens_per_gap is {tokens_per_gap}, wanted at least 1")
    gap = [tokenizer.mask_token_id] * tokens_per_gap
    ids: list[int] = []
    for n, piece in enumerate(pieces):
        ids += gap * (n > 0) + tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
    if longest is not None:  # the prompt that DreamOn was trained with
        text_ids = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], device=model.device)
        one_each = params or SamplingParams(max_new_tokens=0)
        return tokenizer.decode(infill_variable_length(model, text_ids, params=one_each, longest=longest)[1:-1])
    if params is None:
        steps = len(gap) * (len(pieces) - 1)
        params = SamplingParams(max_new_tokens=0, steps=steps, tokens_per_step=1, forbid_mask=True)
    banned = [*(params.banned_tokens or []), tokenizer.eos_token_id]
    params = replace(params, max_new_tokens=0, max_length=None, banned_tokens=banned)
    out = diffusion_generate(model, torch.tensor([ids], device=model.device), params=params, infill=True)
    return tokenizer.decode(out.sequences[0])
