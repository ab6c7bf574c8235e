"""How many masks the rows of a batch have left, and which rows are still active.

The host has to know the counts, because tensor shapes depend on them, and reading them synchronizes with the GPU. Where
they follow from the rule alone, `KnownCounts` reads them once a block, otherwise `ReadCounts` once a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dream_lightning.sampling.cached_forward import CachedForward
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.unmasking import Origin, UnmaskingRule


class ActiveRows:
    """The rows of a batch that still have masks. The others leave, so that a forward computes fewer rows."""

    def __init__(self, canvas: Canvas, predict: CachedForward) -> None:
        self.canvas, self._predict = canvas, predict
        self._batch, self._rows = canvas, None

    @property
    def batch(self) -> Canvas:
        return self.canvas if self._rows is None else self._batch.put(self._rows, self.canvas)

    def compact(self, is_open: Tensor) -> Tensor | None:
        """Drop rows that are not open [b] bool so that a power of two remains; returns these rows, None if all remain.

        Both on the host.
        """
        size = 1 << max(0, int(is_open.sum()) - 1).bit_length()
        if size >= len(is_open):
            return None
        stay = is_open.int().argsort(descending=True, stable=True)[:size].sort().values
        rows = stay.to(self.canvas.x.device)
        self._batch = self.batch
        self._rows = rows if self._rows is None else self._rows[rows]
        self.canvas = self.canvas.select(rows)
        self._predict.select(self.canvas)
        return stay


@dataclass(frozen=True)
class Plan:
    """The work of a step."""

    where: Tensor  # [b, L] bool, the positions to predict
    remaining: Tensor  # [b] int64 on the host, how many these are
    counts: Tensor | None  # [b] int64 on the host, how many are filled; None = the rule decides after the prediction

    @classmethod
    def of(cls, rule: UnmaskingRule, where: Tensor, remaining: Tensor, step_of_block: int) -> "Plan | None":
        """None where nothing is filled."""
        known = getattr(rule, "counts_known_on_host", False)
        counts = rule.counts(None, remaining, step_of_block) if known else None
        fills_something = (remaining if counts is None else counts).any()
        return cls(where, remaining, counts) if fills_something else None


class KnownCounts:
    """Reads the counts at the start of a block and subtracts what the rule fills."""

    def __init__(self, rows: ActiveRows, rule: UnmaskingRule) -> None:
        self.rows, self.rule = rows, rule

    def plan(self, inside: Tensor, step: int, step_of_block: int) -> Plan | None:
        """What to fill in the columns `inside` [L] bool; None if nothing."""
        where = self.rows.canvas.masked & inside  # [b, L]
        if step_of_block == 0:
            self._remaining = where.sum(1).cpu()  # [b]
        plan = Plan.of(self.rule, where, self._remaining, step_of_block)
        if plan is not None:
            self._remaining = self._remaining - plan.counts
        return plan


class ReadCounts:
    """Reads the counts at every step until the block is full.

    Rows without masks leave the batch as soon as half of it (rounded up to a power of two) suffices; with a KV cache,
    at the start of a block. With hooks, which see the whole batch and may mask positions again, or where the model may
    predict the mask token, no row leaves and every step is counted.
    """

    def __init__(self, rows: ActiveRows, rule: UnmaskingRule, params: SamplingParams, *, hooked: bool) -> None:
        self.rows, self.rule, self.params = rows, rule, params
        self._final = params.forbid_mask and not hooked  # what is filled remains filled

    def plan(self, inside: Tensor, step: int, step_of_block: int) -> Plan | None:
        if step_of_block > 0 and self._full:
            return None
        if self.params.stop_at_eos:
            self.rows.canvas = self.rows.canvas.fill_after_eos()
        masked = self.rows.canvas.masked  # [b, L]
        where = in_block = masked & inside
        if isinstance(self.rule, Origin):
            where = where & self.rule.drawn(self.rows.canvas, step, step_of_block)
        remaining, in_block, in_row = torch.stack([m.sum(1) for m in (where, in_block, masked)]).cpu()  # [b] each
        self._full = self._final and not in_block.any()
        if self._final and (self.params.cache == "none" or step_of_block == 0):
            stay = self.rows.compact(in_row > 0)
            if stay is not None:
                remaining, where = remaining[stay], where[stay.to(where.device)]
        return Plan.of(self.rule, where, remaining, step_of_block)


def mask_counts(
    rows: ActiveRows, rule: UnmaskingRule, params: SamplingParams, *, hooked: bool
) -> KnownCounts | ReadCounts:
    """KnownCounts where possible."""
    follow = getattr(rule, "counts_known_on_host", False) and not isinstance(rule, Origin)
    if follow and params.forbid_mask and not (params.stop_at_eos or hooked):
        return KnownCounts(rows, rule)
    return ReadCounts(rows, rule, params, hooked=hooked)
