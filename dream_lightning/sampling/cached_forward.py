"""The model under the reverse process: what a step computes anew, and what it takes from a cache."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dream_lightning.diffusion.denoiser import shifted
from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import CacheMode


class Predictor(Protocol):
    """What the reverse process asks for predictions."""

    def start_block(self, first: int, last: int) -> None:
        """From now on only columns first … last − 1 are predicted."""

    def keep(self, canvas: Canvas) -> None:
        """The rows are now those of this canvas."""

    def __call__(self, x: Tensor, row: Tensor, column: Tensor, step_of_block: int) -> Tensor:
        """Logits [M, V] for the tokens of x [B, L] at (row [M], column [M])."""


class Network:
    """A Denoiser as Predictor; calls the trunk and the head exactly once a prediction.

    Dream predicts a token from the position before it, and within a block positions change at every step. So the
    columns computed anew begin one before the block: the hidden state there, which predicts the block's first token,
    is never an old one.

    Args:
        model: has `model`, (ids, attention_mask, position_ids, cache, columns) → hidden states, with `new_cache`; and
            `lm_head`.
        canvas: the rows.
        cache: see SamplingParams.
        refresh_every: see SamplingParams.
        span: where all is computed without a cache: the columns, first … last − 1, whose hidden states are needed. The
            model then has to take it, too.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        *,
        cache: CacheMode = "none",
        refresh_every: int | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.mode, self.refresh_every, self.span = model, cache, refresh_every, span
        self.first, self.last = 0, canvas.x.shape[1]
        self.keep(canvas)

    def keep(self, canvas: Canvas) -> None:
        """Predict for other rows; what was remembered is forgotten."""
        self.canvas, self.cache, self.period = canvas, None, None
        self._windows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def start_block(self, first: int, last: int) -> None:
        """Work on columns first … last − 1; everything is computed at the next prediction."""
        self.first, self.last, self.period = first, last, None

    def __call__(self, x: Tensor, row: Tensor, column: Tensor, step_of_block: int) -> Tensor:
        """Logits [M, V] in the head's dtype."""
        hidden, first = self._hidden(x, step_of_block)
        if self.canvas.padded:  # a row's first token has only padding before it, and is predicted from itself
            column = column + (self.canvas.positions[row, column] == 0)
        return self.model.lm_head(shifted(hidden, row, column - first))

    def _hidden(self, x: Tensor, step_of_block: int) -> tuple[Tensor, int]:
        """Hidden states of the columns that were computed, and the first of these."""
        real = self.canvas.real if self.canvas.padded else None
        if self.mode == "none":
            inputs = (x, real, None if real is None else self.canvas.positions)
            if self.span is None:
                return self.model.model(*inputs), 0
            return self.model.model(*inputs, span=self.span), self.span[0]
        length = x.shape[1]
        if self.cache is None:
            self.cache = self.model.model.new_cache(len(x), length)
            self.cache.generation += 1
            self.generation = self.cache.generation
        if self.generation != self.cache.generation:
            raise UserError(
                "another generation by this compiled model has begun and overwritten what this one keeps: let one end "
                "before the next, or set cache to none"
            )
        # Steps without a forward change nothing, so it does not matter at which step of a period the refresh falls.
        period = step_of_block // self.refresh_every if self.refresh_every else 0
        first, last = self.first - 1, self.last if self.mode == "dual" else length
        if period != self.period:
            self.period, first, last = period, 0, length
        columns, positions = self._window(first, last)
        return self.model.model(x[:, first:last], real, positions, self.cache, columns), first

    def _window(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Columns [W] and positions [B, W], the same tensors at every step: compiled models copy new ones only."""
        if (first, last) not in self._windows:
            columns = torch.arange(first, last, device=self.canvas.x.device)
            self._windows[first, last] = (columns, self.canvas.positions[:, first:last])
        return self._windows[first, last]
