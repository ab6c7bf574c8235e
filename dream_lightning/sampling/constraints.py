"""What the caller demands of the tokens: banned tokens, a minimum length, hooks."""

from collections.abc import Callable

import torch
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams

LogitsHook = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(step, x [B, L], logits [m, V], row [m], column [m]) → logits [m, V], float32.

logits[j] predicts x[row[j], column[j]], a masked position. A step may call the hook several times. Unlike the authors'
`generation_logits_hook_func` it never gets the logits of filled positions: they are not computed.
"""

TokensHook = Callable[[int, Tensor], Tensor]
"""(step, x [B, L]) → x [B, L] int64, after every step, as the authors' `generation_tokens_hook_func`."""


def constrain(
    logits: Tensor,
    row: Tensor,
    column: Tensor,
    canvas: Canvas,
    params: SamplingParams,
    hook: LogitsHook | None,
    step: int,
) -> Tensor:
    """Logits [m, V] of positions (row [m], column [m]), changed in-place; float32 with a hook."""
    for token in [*(params.banned_tokens or []), *([canvas.mask_token_id] if params.forbid_mask else [])]:
        logits[:, token].fill_(-torch.inf)
    if params.min_new_tokens:
        early = column < canvas.prompt_length + params.min_new_tokens  # [m]
        logits[:, canvas.eos_token_id].masked_fill_(early, -torch.inf)
    if hook is None:
        return logits
    changed = hook(step, canvas.x, logits.float(), row, column)
    if not isinstance(changed, Tensor) or changed.shape != logits.shape:
        raise UserError(
            f"logits_hook returned {_described(changed)}, wanted the logits {list(logits.shape)} that it got"
        )
    return changed


def hooked_tokens(hook: TokensHook, step: int, x: Tensor) -> Tensor:
    """x as the caller's hook returns it; UserError if that is no tensor of x's shape and dtype."""
    changed = hook(step, x.clone())
    if not isinstance(changed, Tensor) or changed.shape != x.shape or changed.dtype != x.dtype:
        raise UserError(f"tokens_hook returned {_described(changed)}, wanted {x.dtype} {list(x.shape)} as it got")
    return changed


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
