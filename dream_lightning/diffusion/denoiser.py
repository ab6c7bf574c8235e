"""From noised rows to predictions for their masked tokens. Dream's logit shift is here and nowhere else."""

from typing import Protocol

import torch
from torch import Tensor, nn

from dream_lightning.batch import Batch, DocumentBounds
from dream_lightning.diffusion.noise import uniform


class Denoiser(Protocol):
    """The part of a model that diffusion uses; DreamModel is one."""

    model: nn.Module  # (input_ids, attention_mask, position_ids) → hidden states [B, L, D]
    lm_head: nn.Module  # [..., D] → [..., V]


def features(
    denoiser: Denoiser,
    x_t: Tensor,
    where: Tensor | tuple[Tensor, Tensor],
    attention_mask: Tensor | DocumentBounds | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Hidden states from which `lm_head` predicts the tokens at `where`.

    Dream kept the alignment of the autoregressive model it was adapted from: the output at position i − 1 predicts the
    token at position i. Position 0 is predicted by its own output.

    Args:
        x_t: [B, L] int64.
        where: [B, L] bool, the M positions to predict; or their rows [M] and columns [M].

    Returns:
        [M, D], in the order of the positions.
    """
    hidden = denoiser.model(x_t, attention_mask, position_ids)  # [B, L, D]
    return shifted(hidden, *(where if isinstance(where, tuple) else where.nonzero(as_tuple=True)))


def shifted(hidden: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The hidden states [M, D] of [B, L, D] that predict the tokens at (row [M], column [M])."""
    return hidden[row, (column - 1).clamp(min=0)]


def logits(
    denoiser: Denoiser,
    x_t: Tensor,
    where: Tensor | tuple[Tensor, Tensor],
    attention_mask: Tensor | DocumentBounds | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Float32 logits [M, V] for the tokens at `where`; arguments as in `features`."""
    return denoiser.lm_head(features(denoiser, x_t, where, attention_mask, position_ids)).float()


def align(logits: Tensor) -> Tensor:
    """Unshifted logits [B, L, V] → logits whose position i predicts token i."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def annealed_mask(batch: Batch, *, visible: float, seed: int) -> Tensor:
    """Bool [B, 1, L, L]: each document's positions up to the query, and each later one with probability `visible`.

    As DiffuLLaMA anneals (Gong et al. 2025, arXiv 2410.17891), but each sample has a mask of its own, a function of
    (seed, epoch, sample).
    """
    query, key = batch.position_ids[:, :, None], batch.position_ids[:, None, :]
    u = uniform(seed, batch.epochs[:, :, None], batch.sample_ids[:, :, None], query, key)  # [B, L, L]
    same = batch.document_ids[:, :, None] == batch.document_ids[:, None, :]
    return (same & ((key <= query) | (u < visible)))[:, None]
