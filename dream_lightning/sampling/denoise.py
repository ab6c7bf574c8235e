"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B); blocks, parallel acceptance and
caches as in Fast-dLLM (arXiv:2505.22618).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from dream_lightning.sampling.active_rows import ActiveRows
from dream_lightning.sampling.cached_forward import CachedForward
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.proposer import LogitsHook, Proposer, TokensHook, hooked_tokens
from dream_lightning.sampling.unmasking import UnmaskingRule


@torch.no_grad()
def reverse_process(
    predict: CachedForward,
    params: SamplingParams,
    rule: UnmaskingRule,
    *,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
    run_every_step: bool = False,
) -> Iterator[Canvas]:
    """Yield the batch after each of `params.steps` steps; arguments as in `generate.denoising_steps`.

    A step predicts the masked positions of the block, and fills as many of them as the rule says. The rows of a batch
    go through the blocks together, so what a row computes at a step does not depend on the others.
    """
    steps = params.steps // params.blocks  # of one block
    canvas = predict.canvas
    rows = ActiveRows(predict, params, rule, hooked=bool(logits_hook or tokens_hook))
    propose = Proposer(predict, params, logits_hook)
    for step in range(params.steps):
        block, i = divmod(step, steps)
        if i == 0:
            first, last = 0, canvas.x.shape[1]
            if params.block_length is not None:
                first = canvas.prompt_length + block * params.block_length
                last = first + params.block_length
            predict.start_block(first, last)
        plan = rows.plan(step, i)
        if plan is not None:
            tokens, sure, order = propose(rows.canvas, plan, step, i)  # [b, L] each
            chosen = rows.choose(plan, sure, order, i, last=i == steps - 1)
            rows.canvas = rows.canvas.fill(chosen, tokens, sure, step)
        elif run_every_step:
            nowhere = canvas.x.new_zeros(0)
            predict(rows.canvas.x, nowhere, nowhere, i)
        if tokens_hook is not None:
            rows.canvas = replace(rows.canvas, x=hooked_tokens(tokens_hook, step, rows.canvas.x))
        if i == steps - 1:
            propose.check_finite()
        yield rows.batch
