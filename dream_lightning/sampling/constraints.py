"""What the caller demands of the tokens: banned, required, no eos too early, hooks."""

from collections.abc import Callable

import torch
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import Rules

LogitsHook = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(step, x [B, L], logits [m, V], row [m], column [m]) → logits [m, V], float32.

The logits are those of some masked positions, logits[j] for x[row[j], column[j]]; a step may call it several times.
Unlike the authors' `generation_logits_hook_func` it never sees the logits of filled positions: they are not computed.
"""

TokensHook = Callable[[int, Tensor], Tensor]
"""(step, x [B, L]) → x [B, L] int64, after every step, as the authors' `generation_tokens_hook_func`."""


def rules_for(
    params: SamplingParams,
    canvas: Canvas,
    eos_token_id: int | None,
    *,
    hook: LogitsHook | None = None,
    step: int = 0,
    x: Tensor | None = None,
) -> Rules | None:
    """How the logits of a step change before a token is chosen; None where they do not."""
    needs_eos = eos_token_id is not None and (params.min_new_tokens or params.eos_penalty or params.required_tokens)
    if not (params.banned_tokens or needs_eos or hook):
        return None

    def rules(logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
        for token in params.banned_tokens or []:
            logits[:, token] = -torch.inf
        if needs_eos:
            logits[:, eos_token_id] -= params.eos_penalty
            early = column < canvas.eos_from[row]  # [m]
            logits[:, eos_token_id] = logits[:, eos_token_id].masked_fill(early, -torch.inf)
        if hook is not None:
            changed = hook(step, x, logits, row, column)
            if not isinstance(changed, Tensor) or changed.shape != logits.shape:
                raise UserError(
                    f"logits_hook returned {_described(changed)}, wanted the logits {list(logits.shape)} that it got, "
                    "changed or not"
                )
            logits = changed
        return logits

    return rules


def hooked_tokens(hook: TokensHook, step: int, x: Tensor) -> Tensor:
    """x as the caller's hook returns it, checked.

    Raises:
        UserError: it is no tensor of x's shape and dtype.
    """
    changed = hook(step, x.clone())
    if not isinstance(changed, Tensor) or changed.shape != x.shape or changed.dtype != x.dtype:
        raise UserError(f"tokens_hook returned {_described(changed)}, wanted {x.dtype} {list(x.shape)} as it got")
    return changed


def place_required(
    logits: Tensor, row: Tensor, column: Tensor, x: Tensor, required: list[int]
) -> tuple[Tensor, Tensor]:
    """Put each required token where it is most probable among the masked positions that are still free.

    Args:
        logits: [M, V] of all masked positions (row [M], column [M]).
        x: [B, L] int64.

    Returns:
        x with the tokens, and the last of their columns of every row, [B] int64.
    """
    x, last = x.clone(), x.new_zeros(len(x))
    rows = torch.arange(len(x), device=x.device)
    log_z = logits.float().logsumexp(-1)  # [M]
    free = torch.full(x.shape, -torch.inf, device=x.device)
    free[row, column] = 0.0
    for token in required:
        score = torch.full(x.shape, -torch.inf, device=x.device)
        score[row, column] = logits[:, token].float() - log_z
        best = (score + free).argmax(1)  # [B]
        x[rows, best] = token
        free[rows, best] = -torch.inf
        last = torch.maximum(last, best)
    return x, last


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
