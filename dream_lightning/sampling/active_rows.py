"""The rows of a batch that still have masks, and what they fill at a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dream_lightning.batch import send
from dream_lightning.sampling.cached_forward import CachedForward
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.unmasking import (
    Origin,
    UnmaskingRule,
    choose_positions,
    clamped,
    reference_topk_overflow,
)


@dataclass(frozen=True)
class Plan:
    """The work of a step."""

    where: Tensor  # [b, L] bool, the positions to predict
    remaining: Tensor  # [b] int64 on the host, how many these are
    counts: Tensor | None  # [b] int64 on the host, how many are filled; None = the rule decides after the prediction


class ActiveRows:
    """The rows that still have masks, and how many.

    The host has to know the numbers, because tensor shapes depend on them, and reading them synchronizes with the GPU.
    They are read once a block if they follow from the rule alone, otherwise once a step.

    Rows without masks leave the batch as soon as half of it (rounded up to a power of two) suffices; with a KV cache,
    at the start of a block. With hooks, which see the whole batch and may mask positions again, or where the model may
    predict the mask token, no row leaves.
    """

    def __init__(self, predict: CachedForward, params: SamplingParams, rule: UnmaskingRule, *, hooked: bool) -> None:
        self.canvas, self._predict, self._params, self._rule = predict.canvas, predict, params, rule
        self._batch, self._rows = predict.canvas, None
        self._final = params.forbid_mask and not hooked  # what is filled remains filled
        self._on_host = getattr(rule, "counts_known_on_host", False)
        self._known = self._on_host and self._final and not (params.stop_at_eos or isinstance(rule, Origin))

    @property
    def batch(self) -> Canvas:
        """All rows, in their order."""
        return self.canvas if self._rows is None else self._batch.put(self._rows, self.canvas)

    def plan(self, step: int, step_of_block: int) -> Plan | None:
        """What to fill in the current block; None if nothing."""
        if step_of_block > 0 and self._full:
            return None
        if step_of_block > 0 and self._known:
            where = self.canvas.masked & self._predict.inside  # [b, L]
        else:
            where, self._remaining = self._read(step, step_of_block)
        remaining = self._remaining
        counts = self._rule.counts(None, remaining, step_of_block) if self._on_host else None
        if not (remaining if counts is None else counts).any():
            return None
        if counts is not None:
            self._remaining = remaining - counts
        return Plan(where, remaining, counts)

    def _read(self, step: int, step_of_block: int) -> tuple[Tensor, Tensor]:
        """Positions to predict [b, L], and how many [b] on the host."""
        if self._params.stop_at_eos:
            self.canvas = self.canvas.fill_after_eos()
        masked = self.canvas.masked  # [b, L]
        where = in_block = masked & self._predict.inside
        if isinstance(self._rule, Origin):
            where = where & self._rule.drawn(self.canvas, step, step_of_block)
        remaining, in_block, in_row = torch.stack([m.sum(1) for m in (where, in_block, masked)]).cpu()  # [b] each
        self._full = self._final and not in_block.any()
        rows = 1 << max(0, int((in_row > 0).sum()) - 1).bit_length()
        may_leave = self._final and (self._params.cache == "none" or step_of_block == 0)
        if not may_leave or rows >= len(in_row):
            return where, remaining
        stay = (in_row > 0).int().argsort(descending=True, stable=True)[:rows].sort().values
        self._select(stay.to(where.device))
        return where[stay.to(where.device)], remaining[stay]

    def _select(self, rows: Tensor) -> None:
        self._batch = self.batch
        self._rows = rows if self._rows is None else self._rows[rows]
        self.canvas = self.canvas.select(rows)
        self._predict.select(self.canvas)

    def choose(self, plan: Plan, certainty: Tensor, order: Tensor, step_of_block: int, *, last: bool) -> Tensor:
        """The positions that are filled, [b, L] bool, of certainty and order [b, L]."""
        if plan.counts is None:
            remaining = plan.where.sum(1)
            counts = remaining if last else self._rule.counts(certainty, remaining, step_of_block)
            return choose_positions(order, clamped(counts, remaining))
        if (plan.counts > plan.remaining).any():  # of the averaged schedule only
            return reference_topk_overflow(order, int(plan.counts[0]))
        return choose_positions(order, send(plan.counts, order.device))
