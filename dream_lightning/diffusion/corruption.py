"""The forward process: x_0 → x_t."""

import torch
from torch import Tensor

from dream_lightning.batch import Batch, NoisedBatch
from dream_lightning.errors import UserError


def corrupt(
    x_0: Tensor,
    maskable: Tensor,
    *,
    mask_token_id: int,
    t: Tensor,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    eos_as_one: int | None = None,
    document_ids: Tensor | None = None,
) -> NoisedBatch:
    """Replace each maskable position by the mask token, independently with probability t.

    Args:
        x_0: [B, L] int64, clean ids.
        maskable: [B, L] bool; prompt and padding are not, and never change.
        t: [B] or [B, L] float, the masking probability.
        u: [B, L] uniform numbers, masked where u < t; by default drawn from `generator`. With the share of a response
            that a teacher filled after each of its tokens (`Batch.trajectory`), x_t is one of the teacher's states.
        eos_as_one: the eos id, to mask or keep the final run of eos of a response as one unit, decided by its first
            token (the authors' `treat_eos_as_one`); None treats eos like any token.
        document_ids: [B, L] int64, the document of each position; needed with `eos_as_one` in packed rows.

    Raises:
        UserError: the shapes disagree, or neither `u` nor `generator` is given.

    Source: the forward process of masked diffusion, Sahoo et al. 2024 (MDLM) eq. 1 with α_t = 1 − t; Dream's trainer.
    """
    if u is None and generator is None:
        raise UserError("corrupt needs its noise: pass u [B, L] or a torch.Generator")
    if maskable.shape != x_0.shape or maskable.dtype != torch.bool:
        raise UserError(f"maskable is {maskable.dtype} {list(maskable.shape)}, wanted torch.bool {list(x_0.shape)}")
    if u is not None and u.shape != x_0.shape:
        raise UserError(f"u has shape {list(u.shape)}, wanted {list(x_0.shape)}: one number a position")
    if t.shape not in (x_0.shape, x_0.shape[:1]):
        raise UserError(f"t has shape {list(t.shape)}, wanted {list(x_0.shape[:1])} or {list(x_0.shape)}")
    if u is None:
        u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    t = (t[:, None] if t.dim() == 1 else t).expand(x_0.shape)  # [B, L]
    is_masked = maskable & (u < t)
    if eos_as_one is not None:
        is_masked = _tie_final_eos(is_masked, maskable & (x_0 == eos_as_one), maskable, document_ids)
    return NoisedBatch(x_t=torch.where(is_masked, mask_token_id, x_0), is_masked=is_masked, t=t)


def next_tokens(batch: Batch) -> NoisedBatch:
    """The clean rows, of which every maskable token but a document's first is predicted: for a causal model."""
    if batch.trajectory is not None:
        raise UserError("model.causal has no masks, data.trajectories says which to use: set one of them to false")
    is_predicted = batch.maskable & (batch.position_ids > 0)
    return NoisedBatch(batch.input_ids, is_predicted, torch.ones_like(is_predicted, dtype=torch.float32))


def with_complements(batch: Batch, noised: NoisedBatch, *, mask_token_id: int) -> NoisedBatch:
    """Append the same rows with the complementary masks: [B, L] → [2B, L], for `batch.twice()`.

    A token is masked there with probability 1 − t, so every maskable token is predicted once. t needs an upper bound
    below 1, so that the weight 1/(1 − t) is bounded.
    """
    is_masked = batch.maskable & ~noised.is_masked
    x_t = torch.where(is_masked, mask_token_id, batch.input_ids)
    return NoisedBatch(
        x_t=torch.cat([noised.x_t, x_t]),
        is_masked=torch.cat([noised.is_masked, is_masked]),
        t=torch.cat([noised.t, 1 - noised.t]),
    )


def _tie_final_eos(is_masked: Tensor, is_eos: Tensor, maskable: Tensor, document_ids: Tensor | None) -> Tensor:
    """Mask every position of a response's final run of eos if, and only if, the run's first position is masked."""
    length = is_eos.shape[1]
    column = torch.arange(length, device=is_eos.device).expand(is_eos.shape)
    segment = maskable.long() if document_ids is None else torch.where(maskable, document_ids + 1, 0)
    ends = torch.ones_like(is_eos)
    ends[:, :-1] = segment[:, 1:] != segment[:, :-1]  # [B, L] last position of a response
    # A position is in the final run if the next position that is not eos or ends a response is an eos that ends one.
    stop = torch.where(~is_eos | ends, column, length)
    next_stop = stop.flip(1).cummin(1).values.flip(1)
    in_run = is_eos & (is_eos & ends).gather(1, next_stop.clamp(max=length - 1))
    starts = torch.ones_like(in_run)
    starts[:, 1:] = ~in_run[:, :-1] | (segment[:, 1:] != segment[:, :-1])
    first = torch.where(in_run & starts, column, 0).cummax(1).values  # [B, L] where the run began
    return torch.where(in_run, is_masked.gather(1, first), is_masked)
