"""The answering road in one call: prompts → masks filled → text → grade."""

import time

import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, diffusion_generate
from dream_lightning.scoring import grade
from dream_lightning.types import Answers, Prediction, PromptBatch


@torch.no_grad()
def answer_questions(
    model: DreamModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    params: SamplingParams,
    *,
    with_history: bool = False,
    run_every_step: bool = False,
) -> Answers:
    """Generate, decode each response up to its first eos, and grade it against the example's reference.

    `with_history` keeps the states of denoising; `run_every_step` see `diffusion_generate`.
    """
    start = time.perf_counter()
    out = diffusion_generate(
        model,
        batch.input_ids,
        batch.attention_mask,
        params=params,
        return_history=with_history,
        sample_ids=batch.sample_ids,
        run_every_step=run_every_step,
    )
    prompt_length = batch.input_ids.shape[1]
    rows = out.sequences[:, prompt_length:].tolist()
    seconds = (time.perf_counter() - start) / len(rows)
    predictions = []
    filled, forwards = (out.filled_at >= 0).sum(1).tolist(), out.forwards.tolist()
    for b, (example, ids) in enumerate(zip(batch.examples, rows, strict=True)):
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        graded = grade(text, example.reference)
        predictions.append(
            Prediction(
                id=example.id,
                prompt=example.prompt[-1]["content"],
                prediction=text,
                thinking=graded.thinking,
                answer=graded.answer,
                reference=example.reference,
                correct=graded.correct,
                tokens=len(ids),
                seconds=round(seconds, 4),
                forwards=forwards[b],
                filled=filled[b],
            )
        )
    return Answers(predictions, batch.counted.tolist(), out.history, prompt_length)
