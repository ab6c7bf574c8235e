"""The model as the reverse process calls it: what a step computes, and what it takes from a KV cache."""

from typing import Any

import torch
from torch import Tensor

from dream_lightning.diffusion.denoiser import shifted
from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import best_tokens


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
        # How tokens are chosen, and how many positions are predicted for M masked ones: a CompiledDenoiser has its own.
        self.best_tokens = getattr(model, "best_tokens", best_tokens)
        self.positions = getattr(model, "positions", lambda number: number)
        self.select(canvas)

    def select(self, canvas: Canvas) -> None:
        """Predict for the rows of this canvas from now on, with a new cache."""
        self.canvas, self.cache, self.period = canvas, None, None
        # Columns [W] and positions [B, W]: the same tensors at every step, since CUDA graphs copy only new ones.
        self._windows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

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
            positions = self.canvas.positions if self.canvas.padded else None
            return self.model.model(x, real, positions, span=self.span), self.span[0] if self.span else 0
        length = x.shape[1]
        if self.cache is None:
            self.cache = self.model.model.new_cache(len(x), length)
            self.cache.generation += 1
            self.generation = self.cache.generation
        if self.generation != self.cache.generation:
            raise UserError(
                "another generation by this compiled model has overwritten the KV cache: finish one before the next"
            )
        # Steps without a forward change nothing, so it does not matter at which step of a period the refresh falls.
        period = step_of_block // self.params.refresh_every if self.params.refresh_every else 0
        first, last = self.first - 1, self.last if self.params.cache == "dual" else length
        if period != self.period:
            self.period, first, last = period, 0, length
        if (first, last) not in self._windows:
            columns = torch.arange(first, last, device=x.device)
            self._windows[first, last] = columns, self.canvas.positions[:, first:last]
        columns, positions = self._windows[first, last]
        return self.model.model(x[:, first:last], real, positions, self.cache, columns), first


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
