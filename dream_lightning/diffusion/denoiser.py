"""From a noised row to predictions for its masked tokens. The only place of Dream's logit shift."""

from typing import Protocol

import torch
from torch import Tensor, nn

from dream_lightning.batch import DocumentBounds


class Denoiser(Protocol):
    """What the mathematics needs of a model; DreamModel is one."""

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

    Dream kept the alignment of the autoregressive model it grew from: the output at position i − 1 predicts the
    token at position i. Position 0 has nothing before it and uses its own output.

    Args:
        x_t: [B, L] int64.
        where: [B, L] bool, the M positions to predict; or their rows and columns, where these are known.

    Returns:
        [M, D]; row m belongs to the m-th position of `where`, in reading order.
    """
    hidden = denoiser.model(x_t, attention_mask, position_ids)  # [B, L, D]
    return shifted(hidden, *(where if isinstance(where, tuple) else where.nonzero(as_tuple=True)))


def shifted(hidden: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Of hidden states [B, L, D], those that predict the tokens at (row [M], column [M]): [M, D]."""
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
    """Full unshifted logits [B, L, V] → logits whose position i predicts token i, for code that holds them anyway."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
