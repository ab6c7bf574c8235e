"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B); blocks, parallel acceptance and
caches as in Fast-dLLM (arXiv:2505.22618).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dream_lightning.batch import send
from dream_lightning.errors import UserError
from dream_lightning.sampling.cached_forward import CachedForward, Proposer
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import LogitsHook, TokensHook, same_kind
from dream_lightning.sampling.unmasking import UnmaskingRule, choose_positions, reference_topk_overflow


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
                first, last = min(first, last - 1), min(first + params.block_length, last)  # rows may end before it
            predict.start_block(first, last)
        if rows.plan(step, i):
            tokens, certainty, order = propose(rows.canvas, rows.where, rows.remaining, step, i)  # [b, L] each
            rows.fill(tokens, certainty, order, step, i, last=i == steps - 1)
        elif run_every_step:
            nowhere = canvas.x.new_zeros(0)
            predict(rows.canvas.x, nowhere, nowhere, i)
        if tokens_hook is not None:
            x = rows.canvas.x
            rows.canvas = replace(rows.canvas, x=same_kind("tokens_hook", tokens_hook(step, x.clone()), x))
        if i == steps - 1:
            propose.check_finite()
        yield rows.batch


class ActiveRows:
    """The rows that still have masks, and how many.

    The host has to know the numbers, because tensor shapes depend on them, and reading them synchronizes with the GPU.
    They are read once a block if they follow from the rule alone, otherwise once a step.

    Rows without masks leave the batch as soon as half of it (rounded up to a power of two) suffices; with a KV cache,
    at the start of a block. With hooks, which see the whole batch and may mask positions again, or where the model may
    predict the mask token, no row leaves.
    """

    canvas: Canvas  # the active rows
    where: Tensor  # [b, L] bool, the positions to predict
    remaining: Tensor  # [b] int64 on the host, how many these are
    counts: Tensor | None  # [b] int64 on the host, how many are filled; None = the rule decides after the prediction

    def __init__(self, predict: CachedForward, params: SamplingParams, rule: UnmaskingRule, *, hooked: bool) -> None:
        self.canvas, self._predict, self._params, self._rule = predict.canvas, predict, params, rule
        self._batch, self._rows = predict.canvas, None
        self._final = params.forbid_mask and not hooked  # what is filled remains filled
        self._on_host = getattr(rule, "counts_known_on_host", False)
        self._restrict = getattr(rule, "positions", None)
        self._known = self._on_host and self._final and not (params.stop_at_eos or self._restrict)

    @property
    def batch(self) -> Canvas:
        return self.canvas if self._rows is None else self._batch.put(self._rows, self.canvas)

    def plan(self, step: int, step_of_block: int) -> bool:
        """Set `where`, `remaining` and `counts` for the current block; False if nothing is filled."""
        if step_of_block > 0 and self._full:
            return False
        if step_of_block > 0 and self._known:
            self.where = self.canvas.masked & self._predict.inside
            self.remaining = self.remaining - self.counts
        else:
            self._read(step, step_of_block)
        self.counts = self._rule.counts(None, self.remaining, step_of_block) if self._on_host else None
        return bool((self.remaining if self.counts is None else self.counts).any())

    def _read(self, step: int, step_of_block: int) -> None:
        if self._params.stop_at_eos:
            self.canvas = self.canvas.fill_after_eos()
        masked = self.canvas.masked  # [b, L]
        self.where = in_block = masked & self._predict.inside
        if self._restrict:
            self.where = self.where & self._restrict(self.canvas, self._predict.inside, step, step_of_block)
        numbers = torch.stack([m.sum(1) for m in (self.where, in_block, masked)])  # [3, b]
        self.remaining, in_block, in_row = numbers.cpu()
        self._full = self._final and not in_block.any()
        rows = 1 << max(0, int((in_row > 0).sum()) - 1).bit_length()
        if rows < len(in_row) and self._final and (self._params.cache == "none" or step_of_block == 0):
            stay = (in_row > 0).int().argsort(descending=True, stable=True)[:rows].sort().values
            self.remaining, self._batch, stay = self.remaining[stay], self.batch, stay.to(masked.device)
            self._rows = stay if self._rows is None else self._rows[stay]
            self.canvas, self.where = self.canvas.select(stay), self.where[stay]
            self._predict.select(self.canvas)

    def fill(self, tokens: Tensor, certainty: Tensor, order: Tensor, step: int, step_of_block: int, last: bool) -> None:
        """Fill as many of the tokens as planned, those of the largest order; all [b, L], see Proposer."""
        if self.counts is None:
            remaining = self.where.sum(1)
            counts = remaining if last else self._rule.counts(certainty, remaining, step_of_block)
            if counts.shape != remaining.shape:
                raise UserError(f"unmasking returned counts {list(counts.shape)}, wanted {list(remaining.shape)}")
            chosen = choose_positions(order, torch.minimum(counts.clamp(min=1), remaining))
        elif (self.counts > self.remaining).any():  # of the averaged schedule only
            chosen = reference_topk_overflow(order, int(self.counts[0]))
        else:
            chosen = choose_positions(order, send(self.counts, order.device))
        self.canvas = self.canvas.fill(chosen, tokens, certainty, step)
