"""Answers to prompts, graded; and gaps in a text filled."""

import time
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Answers, Prediction, PromptBatch
from dream_lightning.errors import UserError
from dream_lightning.sampling import SamplingParams, diffusion_generate
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

    Args:
        model: a DreamModel or its CompiledDenoiser.
        with_history: keep the states of denoising.
    """
    start = time.perf_counter()
    options = {"return_history": with_history, "sample_ids": batch.sample_ids, "run_every_step": run_every_step}
    out = diffusion_generate(model, batch.input_ids, batch.attention_mask, params=params, **options)
    prompt_length = batch.input_ids.shape[1]
    rows = out.sequences[:, prompt_length:].tolist()
    seconds = (time.perf_counter() - start) / len(rows)
    predictions = []
    filled, forwards = (out.filled_at >= 0).sum(1).tolist(), out.forwards.tolist()
    for b, (example, ids) in enumerate(zip(batch.examples, rows, strict=True)):
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
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
                **vars(grade_response(text, example)),
            )
        )
    return Answers(predictions, batch.counted.tolist(), out.history, prompt_length)


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens_per_gap: int = 8,
    marker: str = "…",
    params: SamplingParams | None = None,
) -> str:
    """Fill the gaps of a text from both sides: `complete(model, tokenizer, "The … is blue.")`.

    Args:
        text: with a `marker` for every gap; special tokens in it are plain text.
        tokens_per_gap: tokens in each gap, none of them eos.
        params: `max_new_tokens` is not used. None fills one token a step, the most certain first.

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
    if params is None:
        steps = len(gap) * (len(pieces) - 1)
        params = SamplingParams(max_new_tokens=0, steps=steps, tokens_per_step=1, forbid_mask=True)
    params = replace(params, max_new_tokens=0, banned_tokens=[*(params.banned_tokens or []), tokenizer.eos_token_id])
    out = diffusion_generate(model, torch.tensor([ids], device=model.device), params=params, infill=True)
    return tokenizer.decode(out.sequences[0])
