"""What the model predicts at a step: what is computed, what comes from a KV cache, and the tokens."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dream_lightning.diffusion.denoiser import shifted
from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import ORDER, TOKEN, Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import LogitsHook, certainty, choose_tokens, constrain, same_kind
from dream_lightning.sampling.unmasking import perturb

# Positions whose tokens are chosen at a time: a float32 [256, 152064] temporary is 156 MB, and a few are alive at once.
_POSITIONS = 256


class CachedForward:
    """Logits of masked positions; calls the trunk and the head exactly once for each prediction.

    Dream predicts a token from the position before it, and within a block positions change at every step. So the
    columns computed at a step begin one before the block: the hidden state there, which predicts the block's first
    token, is always a current one.

    Args:
        model: a DreamModel or its CompiledDenoiser.
        span: without a cache, the first column and the one after the last whose hidden states are needed; None: all.
    """

    def __init__(self, model: Any, canvas: Canvas, params: SamplingParams, span: tuple[int, int] | None = None) -> None:
        self.model, self.params, self.span = model, params, span
        # A CompiledDenoiser has its own argmax, and its own number of positions to predict for M masked ones.
        self.best_tokens = getattr(model, "best_tokens", None)
        self.positions = getattr(model, "positions", lambda number: number)
        self.select(canvas)

    def select(self, canvas: Canvas) -> None:
        """Predict for the rows of this canvas from now on, with a new cache."""
        self.canvas, self.cache, self.period = canvas, None, None

    def start_block(self, first: int, last: int) -> None:
        """Predict columns first … last − 1 from now on; the next prediction computes the whole cache."""
        self.first, self.last, self.period = first, last, None
        self.inside = torch.zeros_like(self.canvas.x[0], dtype=torch.bool)  # [L]
        self.inside[first:last] = True

    def __call__(self, x: Tensor, row: Tensor, column: Tensor, step_of_block: int) -> Tensor:
        """Logits [M, V] for the tokens of x [B, L] at (row [M], column [M]), in the head's dtype."""
        hidden, first = self._hidden(x, step_of_block)
        if self.canvas.padded:  # a row's first token has only padding before it, and is predicted from itself
            column = column + (self.canvas.positions[row, column] == 0)
        return self.model.lm_head(shifted(hidden, row, column - first))

    def _hidden(self, x: Tensor, step_of_block: int) -> tuple[Tensor, int]:
        """Hidden states [B, W, D] of the columns that were computed, and the first of these columns."""
        real = self.canvas.real if self.canvas.padded else None
        if self.params.cache == "none":
            return self.model.model(x, real, self.canvas.positions, span=self.span), self.span[0] if self.span else 0
        length = x.shape[1]
        if self.cache is None:
            self.cache = self.model.model.new_cache(len(x), length)
            self.cache.generation += 1
            self.generation = self.cache.generation
        if self.generation != self.cache.generation:
            raise UserError("another generation by this compiled model overwrote the KV cache: finish one at a time")
        # Steps without a forward change nothing, so it does not matter at which step of a period the refresh falls.
        period = step_of_block // self.params.refresh_every if self.params.refresh_every else 0
        first = self.first - (self.params.fast_dllm_threshold is None)
        last = self.last if self.params.cache == "dual" else length
        if period != self.period:
            self.period, first, last = period, 0, length
        columns, window = torch.arange(first, last, device=x.device), self.canvas.positions[:, first:last]
        return self.model.model(x[:, first:last], real, window, self.cache, columns), first


class Proposer:
    """Predicts tokens, and remembers whether their confidences are finite."""

    def __init__(self, predict: CachedForward, params: SamplingParams, hook: LogitsHook | None) -> None:
        self.predict, self.params, self.hook = predict, params, hook
        self._sums: dict[int, Tensor] = {}  # step → sum of its confidences []

    def __call__(
        self, canvas: Canvas, where: Tensor, remaining: Tensor, step: int, step_of_block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward, and tokens for the positions `where` [b, L] bool, of which rows have `remaining` [b].

        Returns:
            tokens [b, L] int64, the mask token elsewhere; their certainty [b, L] float32 in [0, 1], 0 elsewhere; and
            the order [b, L] in which positions are filled, the largest first, −inf elsewhere.
        """
        p, elsewhere, number = self.params, ~where, int(remaining.sum())  # M
        row, column, index = locate(where, self.predict.positions(number))  # [≥ M], [≥ M], [b, L]
        logits = self.predict(canvas.x, row, column, step_of_block)  # [≥ M, V]
        uniforms = canvas.uniforms(p.seed, step, TOKEN)[row, column] if p.temperature > 0 else None
        parts = []
        for start in range(0, len(row), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            some = constrain(logits[part], column[part], canvas, p)
            if self.hook is not None:
                some = some.float()
                some = same_kind("logits_hook", self.hook(step, canvas.x, some, row[part], column[part]), some)
            noise = None if uniforms is None else uniforms[part]
            parts.append(choose_tokens(some, noise, p, best=self.predict.best_tokens))
        tokens, confidence = (torch.cat(x) for x in zip(*parts, strict=True))  # [≥ M] each
        self._sums[step] = confidence[:number].sum()

        order = confidence[index].masked_fill(elsewhere, -torch.inf)
        sure = certainty(order, p.alg)
        if p.alg_temp:
            order = perturb(order, p.alg_temp, canvas.uniforms(p.seed, step, ORDER))
        return tokens[index].masked_fill(elsewhere, canvas.mask_token_id), sure, order

    def check_finite(self) -> None:
        """Raise UserError if a confidence since the last check is not finite. Synchronizes with the GPU."""
        sums = torch.stack([*self._sums.values()]).tolist() if self._sums else []
        wrong = [step for step, value in zip(self._sums, sums, strict=True) if not isfinite(value)]
        self._sums.clear()
        if wrong:
            raise UserError(f"the logits are not finite at step {wrong[0]}: check the weights (diverged? float16?)")


def locate(where: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `where.nonzero()` of [B, L] bool, without synchronizing with the GPU.

    Returns:
        Rows and columns of the True positions, padded with (0, 0) to [number] each; and for every True position its
        index in these, [B, L], between −1 and number − 1 also elsewhere.
    """
    flat = where.flatten()
    index = flat.cumsum(0) - 1  # [B · L]
    # masked_fill, because torch.where copies a number to the device, which synchronizes.
    target = index.masked_fill(~flat, number)  # False positions go after the end
    found = flat.new_zeros(number + 1, dtype=torch.int64)
    found = found.scatter(0, target, torch.arange(len(flat), device=flat.device))[:number]
    return found // where.shape[1], found % where.shape[1], index.view(where.shape)
