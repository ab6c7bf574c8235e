"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B); blocks, parallel acceptance and
caches as in Fast-dLLM (arXiv:2505.22618).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling.accepting import (
    adaptive_counts,
    choose_positions,
    choose_too_many,
    fill_shares,
    perturb,
    scheduled,
)
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.choosing import best_tokens, candidates, certainty
from dream_lightning.sampling.control import LogitsHook, TokensHook, hooked_tokens, rules_for
from dream_lightning.sampling.network import Predictor
from dream_lightning.sampling.params import SamplingParams

_TOKEN, _ORDER = 0, 1  # the last key of a random number's address: what it is used for
_NEVER = 2**62


@dataclass(frozen=True)
class State:
    """The rows between two steps; tensors of a State are never changed."""

    x: Tensor  # [B, L] int64
    filled_at: Tensor  # [B, L] int64
    confidence: Tensor  # [B, L] float32
    forwards: Tensor  # [B] int64

    def select(self, rows: Tensor) -> "State":
        """These rows [b] int64 only."""
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def put(self, rows: Tensor, other: "State") -> "State":
        """The same with `other` in these rows."""
        return State(*(getattr(self, f.name).index_copy(0, rows, getattr(other, f.name)) for f in fields(self)))


def first_state(x: Tensor, forwards: int = 0) -> State:
    """Nothing filled yet."""
    nothing = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return State(x, torch.full_like(x, -1), nothing, x.new_full((len(x),), forwards))


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
        ValueError: a confidence is not finite; a hook returns something else than it should.
    """
    steps = params.steps // params.blocks  # of one block
    shares = fill_shares(steps, params.eps).tolist()
    noisy = params.temperature > 0 or bool(params.alg_temp)
    as_authors = not (params.forbid_mask or uneven or noisy or tokens_hook)
    asks = params.threshold is not None or params.factor is not None or params.stop_at_eos
    foreseen = params.forbid_mask and params.alg != "origin" and not asks and tokens_hook is None
    rows, alive = first_state(canvas.x, forwards), None  # the rows at work, and which of the batch these are
    whole = rows
    trouble = torch.full((), _NEVER, device=canvas.x.device)  # [] the first step with confidences that are not finite
    left: Tensor  # [b] int64 on the host, masks of the rows inside the block

    for step in range(params.steps):
        block, i = divmod(step, steps)
        share, x = shares[i], rows.x
        if i == 0:
            inside = _start_block(predict, canvas, params, block)  # [L] bool
        masked = x == mask_token_id  # [b, L]
        if params.stop_at_eos:
            ended = has_ended(x[:, canvas.prompt_length :], mask_token_id, eos_token_id)  # [b]
            x = torch.where(ended[:, None] & masked, eos_token_id, x)
            rows, masked = replace(rows, x=x), masked & ~ended[:, None]
        where = masked & inside  # [b, L], what to predict
        if params.alg == "origin":
            where &= _noise(canvas, params.seed, step, _ORDER) < share
        left_there = where.sum(1)  # [b] on the device
        if not (foreseen and i > 0):
            counted = torch.cat([left_there, masked.any(1), trouble[None]]).cpu()
            left, is_open = counted[: len(x)], counted[len(x) : -1].bool()
            _check_finite(int(counted[-1]))
            size = _rows_for(int(is_open.sum()))
            if asks and size < len(x) and (params.cache == "none" or i == 0):
                whole = rows if alive is None else whole.put(alive, rows)
                some = is_open.long().argsort(descending=True, stable=True)[:size].sort().values
                left, there = left[some], some.to(x.device)
                rows, where, left_there, canvas = (
                    rows.select(there),
                    where[there],
                    left_there[there],
                    canvas.select(there),
                )
                alive = there if alive is None else alive[there]
                x = rows.x
                predict.keep(canvas)
        # On the host for the host, on the device for the device: copying would wait.
        counts = scheduled(left, share, averaged=as_authors) if not params.adaptive else left
        if not (counts if params.alg != "origin" else left).any():
            if run_every_step:
                nowhere = left_there.new_zeros(0)
                predict(x, nowhere, nowhere, i)
            if tokens_hook is not None:
                rows = replace(rows, x=hooked_tokens(tokens_hook, step, rows.x))
            whole = rows if alive is None else whole.put(alive, rows)
            if step == params.steps - 1:
                _check_finite(int(trouble))
            yield whole
            continue

        number = int(left.sum())  # M
        row, column = locate(where, number, bucket(number))  # [≥ M], [≥ M]
        logits = predict(x, row, column, i)  # [≥ M, V]
        token, confidence = candidates(
            logits,
            _noise(canvas, params.seed, step, _TOKEN)[row, column] if params.temperature > 0 else None,
            alg=params.alg,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            forbidden=mask_token_id if params.forbid_mask else None,
            rules=rules_for(params, canvas, eos_token_id, hook=logits_hook, step=step, x=x),
            places=(row, column),
            best=best,
        )  # [≥ M], [≥ M]
        row, column, token, confidence = (v[:number] for v in (row, column, token, confidence))
        trouble = torch.where(confidence.isfinite().all(), trouble, trouble.clamp(max=step))
        sure = certainty(confidence, params.alg)
        if params.alg_temp and params.alg != "origin":
            confidence = perturb(confidence, params.alg_temp, _noise(canvas, params.seed, step, _ORDER)[row, column])
        grid = torch.full(x.shape, -torch.inf, dtype=confidence.dtype, device=x.device)  # [b, L]
        grid[row, column] = confidence
        if params.alg == "origin" or (params.adaptive and i == steps - 1):
            chosen = where
        elif as_authors and (counts > left).any():
            chosen = choose_too_many(grid, int(counts[0]))
        elif params.adaptive:
            chosen = choose_positions(grid, adaptive_counts(grid, left_there, params)) & where
        elif as_authors:
            chosen = choose_positions(grid, counts.to(x.device))
        else:
            chosen = choose_positions(grid, scheduled(left_there, share)) & where
        rows = _fill(rows, chosen, row, column, token, sure, step, mask_token_id)
        if foreseen:
            left = left - (left.clamp(max=params.tokens_per_step) if params.adaptive else counts)
        if tokens_hook is not None:
            rows = replace(rows, x=hooked_tokens(tokens_hook, step, rows.x))
        whole = rows if alive is None else whole.put(alive, rows)
        if step == params.steps - 1:
            _check_finite(int(trouble))
        yield whole


def locate(where: Tensor, number: int, at_least: int) -> tuple[Tensor, Tensor]:
    """Row and column of the True positions in reading order, without waiting for the device as `nonzero` does.

    Args:
        where: [B, L] bool with `number` True positions.
        at_least: length of the result; what is over is (0, 0).
    """
    flat = where.flatten()
    target = torch.where(flat, flat.long().cumsum(0) - 1, at_least)  # [B · L], the others go behind the end
    places = flat.new_zeros(at_least + 1, dtype=torch.int64)
    places = places.scatter(0, target, torch.arange(len(flat), device=flat.device))[:at_least]
    if number < at_least:
        places[number:] = 0
    return places // where.shape[1], places % where.shape[1]


def has_ended(new: Tensor, mask_token_id: int, eos_token_id: int) -> Tensor:
    """Rows whose text up to the first eos is decided: no mask stands left of it. [B, N] → [B] bool."""
    ends = (new == eos_token_id).long().cumsum(1) > 0  # [B, N], from the first eos on
    return ends[:, -1] & ~((new == mask_token_id) & ~ends).any(1)


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


def _fill(
    rows: State, chosen: Tensor, row: Tensor, column: Tensor, token: Tensor, sure: Tensor, step: int, mask: int
) -> State:
    """The state with the tokens [M] of (row, column) where `chosen` [B, L]."""
    proposal, certainties = torch.full_like(rows.x, mask), torch.zeros_like(rows.confidence)
    proposal[row, column], certainties[row, column] = token, sure
    x = torch.where(chosen, proposal, rows.x)
    filled = chosen & (x != mask)
    return State(
        x,
        rows.filled_at.masked_fill(filled, step),
        torch.where(filled, certainties, rows.confidence),
        rows.forwards + filled.any(1),
    )


def _rows_for(number: int) -> int:
    """The smallest power of two that holds so many rows, so that batches have few shapes."""
    return 1 << max(0, number - 1).bit_length()


def _check_finite(first: int) -> None:
    if first < _NEVER:
        raise ValueError(
            f"the model's logits are not finite at step {first}: check the weights (a diverged run?), and use bfloat16 "
            "or float32 rather than float16"
        )


def _noise(canvas: Canvas, seed: int, step: int, purpose: int) -> Tensor:
    """Uniform numbers [B, L] of the rows' samples at this step."""
    return uniform(seed, canvas.sample_ids[:, None], step, canvas.positions, canvas.copies[:, None] * 2 + purpose)
