"""How many of the masked positions are filled at a step: one class for each rule, yours too; and which ones."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dream_lightning.sampling.canvas import ORDER, Canvas
from dream_lightning.sampling.params import SamplingParams


class UnmaskingRule(Protocol):
    """How many of the most certain masked positions every row fills.

    A rule that needs `remaining` only sets `counts_known_on_host = True`. It is called on the host before the forward,
    with `confidence` None, and its counts are taken unmodified: a step that fills nothing costs no forward, and its
    last step has to fill all that remains.

    A rule may restrict a step to some positions, [B, L] bool: `positions(canvas, inside, step, step_of_block)`, where
    `inside` [L] bool are the columns of the block.
    """

    def counts(self, confidence: Tensor, remaining: Tensor, step: int) -> Tensor:
        """[B] int64, clamped to 1 … `remaining`; the last step fills all that remains.

        Args:
            confidence: [B, L] float32, the certainty in [0, 1] of the predicted token; 0 where nothing is masked.
            remaining: [B] int64, masks of the row (in the current block).
            step: counts from 0 in every block.
        """


@dataclass
class AuthorsSchedule:
    """A fixed share of the remaining masks at every step, rounded down in float32."""

    shares: list[float]  # of every step
    averaged: bool  # take the share of the mean of the rows' masks, as the authors do
    counts_known_on_host = True

    def counts(self, confidence: Tensor | None, remaining: Tensor, step: int) -> Tensor:
        masks = (remaining.sum() / len(remaining)).expand(len(remaining)) if self.averaged else remaining.float()
        return (masks * self.shares[step]).long()


@dataclass
class Origin:
    """The authors' `origin`: every masked position is filled independently with the schedule's share as probability."""

    shares: list[float]
    seed: int
    counts_known_on_host = True

    def positions(self, canvas: Canvas, inside: Tensor, step: int, step_of_block: int) -> Tensor:
        return canvas.uniforms(self.seed, step, ORDER) < self.shares[step_of_block]

    def counts(self, confidence: Tensor | None, remaining: Tensor, step: int) -> Tensor:
        return remaining  # which counts the drawn positions only


@dataclass
class TokensPerStep:
    """The same number of positions at every step; the last of `steps` fills all that remains."""

    tokens: int
    steps: int
    counts_known_on_host = True

    def counts(self, confidence: Tensor | None, remaining: Tensor, step: int) -> Tensor:
        return remaining if step == self.steps - 1 else remaining.clamp(max=self.tokens)


@dataclass
class Threshold:
    """All positions that are at least this certain. Source: Fast-dLLM (arXiv:2505.22618)."""

    threshold: float

    def counts(self, confidence: Tensor, remaining: Tensor, step: int) -> Tensor:
        return (confidence >= self.threshold).sum(1)


@dataclass
class FastDllm(Threshold):
    """Fast-dLLM's rule with a KV cache: the first step of a block fills its first token, however certain."""

    steps: int  # of a block

    def positions(self, canvas: Canvas, inside: Tensor, step: int, step_of_block: int) -> Tensor:
        alone = step_of_block == 0 and self.steps > 1
        return (inside & (inside.cumsum(0) == 1) if alone else inside).expand_as(canvas.x)


@dataclass
class Factor:
    """The n most certain, the largest n with (n + 1)(1 − cₙ) < factor. Source: Fast-dLLM (arXiv:2505.22618)."""

    factor: float

    def counts(self, confidence: Tensor, remaining: Tensor, step: int) -> Tensor:
        ordered = confidence.sort(dim=1, descending=True).values  # [B, L]; the left side grows with n, so count
        n = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        return ((n + 1) * (1 - ordered) < self.factor).sum(1)


def rule_of(params: SamplingParams, *, rows_differ: bool = False) -> UnmaskingRule:
    """The rule that `params` names. The mean of the rows' masks is meaningless if `rows_differ` (infilling, hooks)."""
    steps = params.steps // params.blocks
    shares = fill_shares(steps, params.eps)
    if params.tokens_per_step is not None:
        return TokensPerStep(params.tokens_per_step, steps)
    if params.threshold is not None:
        return Threshold(params.threshold)
    if params.fast_dllm_threshold is not None:
        return FastDllm(params.fast_dllm_threshold, steps)
    if params.factor is not None:
        return Factor(params.factor)
    if params.alg == "origin":
        return Origin(shares, params.seed)
    # Noise makes runs of the authors' code irreproducible; without it we follow them to the token.
    return AuthorsSchedule(shares, averaged=not (params.forbid_mask or params.noisy or rows_differ))


def fill_shares(steps: int, eps: float) -> list[float]:
    """Share of the remaining masks to fill at every step: 1 − tᵢ₊₁/tᵢ with t from 1 to eps in equal steps, last 1.

    In float32 on the CPU, so that rounding does not depend on the model's device.
    """
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return [*(1 - t[1:-1] / t[:-2]).tolist(), 1.0]


def choose_positions(order: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [B] largest positions of every row; of a tie, the leftmost. [B, L] → [B, L] bool.

    Ties are common: a trained model gives float32 probability 1.0 to many positions of an eos tail.
    """
    largest = order.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, largest, first)


def reference_topk_overflow(order: Tensor, count: int) -> Tensor:
    """The `count` largest positions of every row, also in rows that have fewer masks. [B, L] → [B, L] bool.

    There topk returns positions of −inf, which the authors' code overwrites with the mask token, prompt included.
    """
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order.topk(count).indices, True)


def perturb(confidence: Tensor, alg_temp: float, uniforms: Tensor) -> Tensor:
    """Confidences whose k largest are a draw of k without replacement from softmax(confidence / alg_temp), in float64.

    Gumbel top-k (arXiv:1903.06059). Unlike a multinomial it cannot run out of probability if the softmax underflows.
    """
    u = uniforms.double() + 2.0**-25  # strictly between 0 and 1
    return confidence.double() / alg_temp - torch.log(-torch.log(u))
