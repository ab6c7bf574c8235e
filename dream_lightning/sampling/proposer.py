"""What the model predicts at a step: tokens for masked positions, under what the caller demands of them."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.active_rows import Plan
from dream_lightning.sampling.cached_forward import CachedForward, locate
from dream_lightning.sampling.canvas import ORDER, TOKEN, Canvas
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import certainty, choose_tokens
from dream_lightning.sampling.unmasking import perturb

LogitsHook = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(step, x [B, L], logits [m, V], row [m], column [m]) → logits [m, V], float32.

logits[j] predicts x[row[j], column[j]], a masked position. A step may call the hook several times. Unlike the authors'
`generation_logits_hook_func` it never gets the logits of filled positions: they are not computed.
"""

TokensHook = Callable[[int, Tensor], Tensor]
"""(step, x [B, L]) → x [B, L] int64, after every step, as the authors' `generation_tokens_hook_func`."""

# Positions whose tokens are chosen at a time: a float32 [256, 152064] temporary is 156 MB, and a few are alive at once.
_POSITIONS = 256


class Proposer:
    """Predicts tokens, and remembers whether their confidences are finite."""

    def __init__(self, predict: CachedForward, params: SamplingParams, hook: LogitsHook | None) -> None:
        self.predict, self.params, self.hook = predict, params, hook
        self._sums: dict[int, Tensor] = {}  # step → sum of its confidences []

    def __call__(self, canvas: Canvas, plan: Plan, step: int, step_of_block: int) -> tuple[Tensor, Tensor, Tensor]:
        """One forward, and tokens for the positions of the plan.

        Returns:
            tokens [b, L] int64, the mask token elsewhere; their certainty [b, L] float32 in [0, 1], 0 elsewhere; and
            the order [b, L] in which positions are filled, the largest first, −inf elsewhere.
        """
        p, number = self.params, int(plan.remaining.sum())  # M
        row, column, index = locate(plan.where, self.predict.positions(number))  # [≥ M], [≥ M], [b, L]
        logits = self.predict(canvas.x, row, column, step_of_block)  # [≥ M, V]
        uniforms = canvas.uniforms(p.seed, step, TOKEN)[row, column] if p.temperature > 0 else None
        parts = []
        for start in range(0, len(row), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            some = self._constrained(logits[part], row[part], column[part], canvas, step)
            noise = None if uniforms is None else uniforms[part]
            parts.append(choose_tokens(some, noise, p, best=self.predict.best_tokens))
        tokens, confidence = (torch.cat(x) for x in zip(*parts, strict=True))  # [≥ M] each
        self._sums[step] = confidence[:number].sum()

        order = confidence[index].masked_fill(~plan.where, -torch.inf)
        sure = certainty(order, p.alg)
        if p.alg_temp:
            order = perturb(order, p.alg_temp, canvas.uniforms(p.seed, step, ORDER))
        return tokens[index].masked_fill(~plan.where, canvas.mask_token_id), sure, order

    def _constrained(self, logits: Tensor, row: Tensor, column: Tensor, canvas: Canvas, step: int) -> Tensor:
        """Logits [m, V] of positions (row [m], column [m]), changed in-place; float32 with a hook."""
        for token in [*(self.params.banned_tokens or []), *[canvas.mask_token_id] * self.params.forbid_mask]:
            logits[:, token].fill_(-torch.inf)
        if self.params.min_new_tokens:
            early = column < canvas.prompt_length + self.params.min_new_tokens  # [m]
            logits[:, canvas.eos_token_id].masked_fill_(early, -torch.inf)
        if self.hook is None:
            return logits
        logits = logits.float()
        return _same_kind("logits_hook", self.hook(step, canvas.x, logits, row, column), logits)

    def check_finite(self) -> None:
        """Raise UserError if a confidence since the last check is not finite. Synchronizes with the GPU."""
        sums = torch.stack([*self._sums.values()]).tolist() if self._sums else []
        wrong = [step for step, value in zip(self._sums, sums, strict=True) if not isfinite(value)]
        self._sums.clear()
        if wrong:
            raise UserError(
                f"the model's logits are not finite at step {wrong[0]}: check the weights (a diverged run?), and use "
                "bfloat16 or float32 rather than float16"
            )


def hooked_tokens(hook: TokensHook, step: int, x: Tensor) -> Tensor:
    """x [B, L] as the caller's hook returns it."""
    return _same_kind("tokens_hook", hook(step, x.clone()), x)


def _same_kind(name: str, changed: object, given: Tensor) -> Tensor:
    """`changed`, or UserError if it is no tensor of the shape and dtype of `given`."""
    got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
    wanted = f"{given.dtype} {list(given.shape)}"
    if got != wanted:
        raise UserError(f"{name} returned {got}, wanted {wanted} as it got")
    return changed
