"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B); blocks, parallel acceptance and
caches as in Fast-dLLM (arXiv:2505.22618).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dream_lightning.batch import send
from dream_lightning.errors import UserError
from dream_lightning.sampling.cached_forward import CachedForward, locate
from dream_lightning.sampling.canvas import ORDER, TOKEN, Canvas
from dream_lightning.sampling.constraints import LogitsHook, TokensHook, constrain, hooked_tokens
from dream_lightning.sampling.mask_counts import ActiveRows, Plan, mask_counts
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import certainty, choose_tokens
from dream_lightning.sampling.unmasking import (
    UnmaskingRule,
    choose_positions,
    clamped,
    perturb,
    reference_topk_overflow,
)

# Positions whose tokens are chosen at a time: a float32 [256, 152064] temporary is 156 MB, and a few are alive at once.
_POSITIONS = 256


@torch.no_grad()
def reverse_process(
    predict: CachedForward,
    canvas: Canvas,
    params: SamplingParams,
    rule: UnmaskingRule,
    *,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
    run_every_step: bool = False,
) -> Iterator[Canvas]:
    """Yield the batch after each of `params.steps` steps.

    A step predicts the masked positions of the block, and fills as many of them as the rule says. The rows of a batch
    go through the blocks together, so what a row computes at a step does not depend on the others.

    Args:
        predict: the model, see CachedForward.
        canvas: the rows to fill.
        params: see SamplingParams.
        rule: how many positions are filled.
        logits_hook: see `constraints.LogitsHook`.
        tokens_hook: see `constraints.TokensHook`.
        run_every_step: call `predict` also at steps that fill nothing.

    Raises:
        UserError: a confidence is not finite; a hook or a rule returns something else than it should.
    """
    steps = params.steps // params.blocks  # of one block
    rows = ActiveRows(canvas, predict)
    masks = mask_counts(rows, rule, params, hooked=bool(logits_hook or tokens_hook))
    propose = Proposer(predict, params, logits_hook)
    for step in range(params.steps):
        block, i = divmod(step, steps)
        if i == 0:
            inside = _start_block(predict, canvas, params, block)  # [L] bool
        plan = masks.plan(inside, step, i)
        if plan is not None:
            proposal = propose(rows.canvas, plan, step, i)
            chosen = _choose(rule, plan, proposal, i, last=i == steps - 1)
            rows.canvas = rows.canvas.fill(chosen, proposal.tokens, proposal.certainty, step)
        elif run_every_step:
            nowhere = canvas.x.new_zeros(0)
            predict(rows.canvas.x, nowhere, nowhere, i)
        if tokens_hook is not None:
            rows.canvas = replace(rows.canvas, x=hooked_tokens(tokens_hook, step, rows.canvas.x))
        if i == steps - 1:
            propose.check_finite()
        yield rows.batch


@dataclass(frozen=True)
class Proposal:
    """What the model predicts at a step, on the grid of the active rows."""

    tokens: Tensor  # [b, L] int64, the mask token where nothing is predicted
    certainty: Tensor  # [b, L] float32 in [0, 1], 0 where nothing is predicted
    order: Tensor  # [b, L], the largest are filled first; −inf where nothing is predicted


class Proposer:
    """Predicts tokens, and remembers whether their confidences are finite."""

    def __init__(self, predict: CachedForward, params: SamplingParams, hook: LogitsHook | None) -> None:
        self.predict, self.params, self.hook = predict, params, hook
        self._sums: dict[int, Tensor] = {}  # step → sum of its confidences []

    def __call__(self, canvas: Canvas, plan: Plan, step: int, step_of_block: int) -> Proposal:
        """One forward, and tokens for the positions of the plan."""
        p, number = self.params, int(plan.remaining.sum())  # M
        row, column, index = locate(plan.where, self.predict.positions(number))  # [≥ M], [≥ M], [b, L]
        logits = self.predict(canvas.x, row, column, step_of_block)  # [≥ M, V]
        uniforms = canvas.uniforms(p.seed, step, TOKEN)[row, column] if p.temperature > 0 else None
        parts = []
        for start in range(0, len(row), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            some = constrain(logits[part], row[part], column[part], canvas, p, self.hook, step)
            noise = None if uniforms is None else uniforms[part]
            parts.append(choose_tokens(some, noise, p, best=self.predict.best_tokens))
        tokens, confidence = (torch.cat(x) for x in zip(*parts, strict=True))  # [≥ M] each
        self._sums[step] = confidence[:number].sum()

        order = confidence[index].masked_fill(~plan.where, -torch.inf)
        sure = certainty(order, p.alg)
        if p.alg_temp:
            order = perturb(order, p.alg_temp, canvas.uniforms(p.seed, step, ORDER))
        return Proposal(tokens[index].masked_fill(~plan.where, canvas.mask_token_id), sure, order)

    def check_finite(self) -> None:
        """Raise UserError if a confidence since the last check is not finite. Synchronizes with the GPU."""
        if not self._sums:
            return
        finite = torch.stack([*self._sums.values()]).isfinite().tolist()
        wrong = [step for step, is_finite in zip(self._sums, finite, strict=True) if not is_finite]
        self._sums.clear()
        if wrong:
            raise UserError(
                f"the model's logits are not finite at step {wrong[0]}: check the weights (a diverged run?), and use "
                "bfloat16 or float32 rather than float16"
            )


def _choose(rule: UnmaskingRule, plan: Plan, proposal: Proposal, step_of_block: int, *, last: bool) -> Tensor:
    """The positions that are filled: [b, L] bool."""
    if plan.counts is None:
        remaining = plan.where.sum(1)
        counts = remaining if last else rule.counts(proposal.certainty, remaining, step_of_block)
        return choose_positions(proposal.order, clamped(counts, remaining))
    if (plan.counts > plan.remaining).any():  # of the averaged schedule only
        return reference_topk_overflow(proposal.order, int(plan.counts[0]))
    return choose_positions(proposal.order, send(plan.counts, plan.where.device))


def _start_block(predict: CachedForward, canvas: Canvas, params: SamplingParams, block: int) -> Tensor:
    """Start the block in the predictor, and return which columns belong to it: [L] bool."""
    first, last = 0, canvas.x.shape[1]
    if params.block_length is not None:
        first = canvas.prompt_length + block * params.block_length
        last = first + params.block_length
    predict.start_block(first, last)
    inside = torch.zeros_like(canvas.x[0], dtype=torch.bool)
    inside[first:last] = True
    return inside
