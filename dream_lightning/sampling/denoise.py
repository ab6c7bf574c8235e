"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B); blocks, parallel acceptance and
caches as in Fast-dLLM (arXiv:2505.22618).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dream_lightning.diffusion.noise import uniform
from dream_lightning.errors import UserError
from dream_lightning.sampling.cached_forward import Predictor
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.constraints import LogitsHook, TokensHook, hooked_tokens, rules_for
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.rows import Rows, State, locate
from dream_lightning.sampling.token_sampling import Rules, best_tokens, candidates, certainty
from dream_lightning.sampling.unmasking import (
    adaptive_counts,
    choose_positions,
    fill_shares,
    perturb,
    reference_topk_overflow,
    scheduled,
)

_TOKEN, _ORDER = 0, 1  # the last key of a random number's address: what it is used for


@torch.no_grad()
def reverse_process(
    predict: Predictor,
    canvas: Canvas,
    params: SamplingParams,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    uneven: bool = False,
    run_every_step: bool = False,
    forwards: int = 0,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
    bucket: Callable[[int], int] = lambda positions: positions,
    best: Callable = best_tokens,
) -> Iterator[State]:
    """The steps of denoising over any predictor; yields the state after each of `params.steps`.

    Step i fills `fill_shares[i]` of the positions that are still masked. These are looked up again at every step, for
    a model may predict the mask token itself.

    In that case, and at temperature 0, where a run of the authors' code is reproducible, we follow it to the token:
    the number to fill is an average over the batch's rows, and a row with fewer masks than that gets other positions
    overwritten by the mask token, prompt included. `forbid_mask`, any noise, or `uneven` counts every row for itself.

    The rows of a batch go through the blocks together, so what a row computes at a step does not depend on the others:
    one that is ready with its block waits. Rows that are ready altogether leave the batch as soon as half of it (rows
    in powers of two) suffices; with a cache, at the start of a block.

    The host waits for the device once a step where it must know how many masks are left or which rows have ended: for
    `threshold`, `factor`, `stop_at_eos`, `origin`, a `tokens_hook`, and without `forbid_mask`. Otherwise never.

    Args:
        predict: see Predictor.
        canvas: the rows to fill.
        params: see SamplingParams.
        mask_token_id: the id of the mask token.
        eos_token_id: the id that ends an answer, for what in `params` needs it.
        uneven: rows begin with different numbers of masks (infilling).
        run_every_step: call `predict` also where nothing would be filled.
        forwards: how many there were already.
        logits_hook: see control.
        tokens_hook: see control.
        bucket: number of positions → number to predict, with some in vain, so that shapes are few.
        best: see `choosing.candidates`.

    Raises:
        UserError: a confidence is not finite; a hook returns something else than it should.
    """
    steps = params.steps // params.blocks  # of one block
    shares = fill_shares(steps, params.eps).tolist()
    noisy = params.temperature > 0 or bool(params.alg_temp)
    as_authors = not (params.forbid_mask or uneven or noisy or tokens_hook)
    stops = params.threshold is not None or params.factor is not None or params.stop_at_eos  # rows end when they end
    counts_known_on_host = params.forbid_mask and params.alg != "origin" and not stops and tokens_hook is None
    lasting = params.forbid_mask and params.alg != "origin" and tokens_hook is None  # what is full stays full
    rows = Rows(canvas, forwards)
    sums: dict[int, Tensor] = {}  # step → sum of its confidences [], not looked at yet

    for step in range(params.steps):
        (block, i), where = divmod(step, steps), None
        if i == 0:
            inside, full = _start_block(predict, canvas, params, block), False  # [L] bool, whether the block is full
        if params.stop_at_eos and not full:
            rows.fill_after_eos(mask_token_id, eos_token_id)
        if i == 0 or not (counts_known_on_host or full):
            masked = rows.state.x == mask_token_id  # [b, L]
            where = _where(masked & inside, rows.canvas, params, step, shares[i])
            # The one wait: how many positions of every row to predict, whether a row has any left, whether all is well.
            answer = torch.cat([where.sum(1), masked.any(1), _finite(sums, where)]).cpu()
            left, is_open, finite = answer.tensor_split([len(where), 2 * len(where)])
            _check_finite(sums, finite)
            if stops and (params.cache == "none" or i == 0):
                stay = compact_batch(rows, predict, is_open)
                if len(stay) < len(left):
                    left, where = left[stay], None
        full = full or (lasting and not left.any())
        counts = left if params.adaptive or params.alg == "origin" else scheduled(left, shares[i], averaged=as_authors)

        if counts.any():
            if where is None:
                where = _where((rows.state.x == mask_token_id) & inside, rows.canvas, params, step, shares[i])  # [b, L]
            number = int(left.sum())  # M
            row, column, place = locate(where, bucket(number))  # [≥ M], [≥ M], [b, L]
            logits = predict(rows.state.x, row, column, i)  # [≥ M, V]
            rules = rules_for(params, rows.canvas, eos_token_id, hook=logits_hook, step=step, x=rows.state.x)
            proposal, confidence = _propose(
                logits, row, column, where, place, rows.canvas, params, step, mask_token_id, rules, best
            )
            sums[step] = confidence[:number].sum()
            if params.alg == "origin" or (params.adaptive and i == steps - 1):
                chosen = where
            elif params.adaptive:
                there = adaptive_counts(proposal.order, where.sum(1), params)
                chosen = choose_positions(proposal.order, there, most=params.tokens_per_step)
            elif (counts > left).any():
                chosen = reference_topk_overflow(proposal.order, int(counts[0]))
            else:  # on the device the same counts again: copying them there would wait
                there = counts.to(where.device) if as_authors else scheduled(where.sum(1), shares[i])
                chosen = choose_positions(proposal.order, there, most=int(counts.max()))
            may_be_mask = None if params.forbid_mask else mask_token_id
            rows.state = rows.state.fill(
                chosen, proposal.tokens, proposal.certainty, step=step, mask_token_id=may_be_mask
            )
            if counts_known_on_host:
                left = left - (left.clamp(max=params.tokens_per_step) if params.adaptive else counts)
        elif run_every_step:
            nowhere = canvas.x.new_zeros(0)
            predict(rows.state.x, nowhere, nowhere, i)
        if tokens_hook is not None:
            rows.state = replace(rows.state, x=hooked_tokens(tokens_hook, step, rows.state.x))
        if step == params.steps - 1:
            _check_finite(sums, _finite(sums, canvas.x).cpu())
        yield rows.batch


@dataclass(frozen=True)
class _Proposal:
    """What the model would fill in at a step, on the grid of the rows at work."""

    tokens: Tensor  # [b, L] int64; where nothing is predicted the mask token, or with forbid_mask any
    certainty: Tensor  # [b, L] float32, 0 where nothing is predicted
    order: Tensor  # [b, L], the larger the earlier; −inf where nothing is predicted


def _propose(
    logits: Tensor,
    row: Tensor,
    column: Tensor,
    where: Tensor,
    place: Tensor,
    canvas: Canvas,
    params: SamplingParams,
    step: int,
    mask_token_id: int,
    rules: Rules | None,
    best: Callable,
) -> tuple[_Proposal, Tensor]:
    """Tokens from the logits [≥ M, V] of the positions (row, column), see `locate`; and the confidences [≥ M]."""
    token, confidence = candidates(
        logits,
        _noise(canvas, params.seed, step, _TOKEN)[row, column] if params.temperature > 0 else None,
        alg=params.alg,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        forbidden=mask_token_id if params.forbid_mask else None,
        rules=rules,
        places=(row, column),
        best=best,
    )  # [≥ M], [≥ M]
    nowhere = ~where  # [b, L]
    tokens, order = token[place], confidence[place].masked_fill(nowhere, -torch.inf)
    sure = certainty(order, params.alg)
    if not params.forbid_mask:  # then positions may be chosen that were not asked for, see `reference_topk_overflow`
        tokens = tokens.masked_fill(nowhere, mask_token_id)
    if params.alg_temp:
        order = perturb(order, params.alg_temp, _noise(canvas, params.seed, step, _ORDER))
    return _Proposal(tokens, sure, order), confidence


def _start_block(predict: Predictor, canvas: Canvas, params: SamplingParams, block: int) -> Tensor:
    """Tell the predictor, and return which columns belong to the block: [L] bool."""
    length = canvas.x.shape[1]
    first, last = 0, length
    if params.block_length is not None:
        first = canvas.prompt_length + block * params.block_length
        last = first + params.block_length
    predict.start_block(first, last)
    columns = torch.arange(length, device=canvas.x.device)
    return (columns >= first) & (columns < last)


def _where(masked: Tensor, canvas: Canvas, params: SamplingParams, step: int, share: float) -> Tensor:
    """What to predict: all that is masked, or those that `origin` has drawn. [b, L] bool."""
    if params.alg == "origin":
        return masked & (_noise(canvas, params.seed, step, _ORDER) < share)
    return masked


def compact_batch(rows: Rows, predict: Predictor, is_open: Tensor) -> Tensor:
    """Let rows leave that have no masks, so that a power of two is left; returns which stay [b], on the host.

    Args:
        is_open: [b] on the host, nonzero where a row has masks.
    """
    size = 1 << max(0, int((is_open > 0).sum()) - 1).bit_length()
    if size >= len(is_open):
        return torch.arange(len(is_open))
    stay = is_open.argsort(descending=True, stable=True)[:size].sort().values
    rows.keep(stay.to(rows.state.x.device))
    predict.keep(rows.canvas)
    return stay


def _finite(sums: dict[int, Tensor], like: Tensor) -> Tensor:
    """Which of the sums are finite: bool, on the device of `like`."""
    return torch.stack([*sums.values()]).isfinite() if sums else like.new_zeros(0, dtype=torch.bool)


def _check_finite(sums: dict[int, Tensor], finite: Tensor) -> None:
    """Report the first step with confidences that are not finite, or forget these sums; `finite` is on the host."""
    wrong = [step for step, fine in zip(sums, finite.tolist(), strict=True) if not fine]
    sums.clear()
    if wrong:
        raise UserError(
            f"the model's logits are not finite at step {wrong[0]}: check the weights (a diverged run?), and use "
            "bfloat16 or float32 rather than float16"
        )


def _noise(canvas: Canvas, seed: int, step: int, purpose: int) -> Tensor:
    """Uniform numbers [B, L] of the rows' samples at this step."""
    return uniform(seed, canvas.sample_ids[:, None], step, canvas.positions, canvas.copies[:, None] * 2 + purpose)
