"""The reverse process: from masks to tokens, some at every step.

Source: the authors' `diffusion_generate` (generation_utils.py of Dream-v0-Instruct-7B).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dream_lightning.diffusion import denoiser
from dream_lightning.diffusion.noise import uniform
from dream_lightning.sampling.choosing import candidates, certainty, choose_positions, fill_shares, perturb
from dream_lightning.sampling.params import Canvas, SamplingParams, prepare

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t [B, L], where [B, L] bool → logits [M, V] for the True positions

_TOKEN, _ORDER = 0, 1  # the last key of a random number's address: what it is used for


@dataclass
class GenerationOutput:
    """Prompts with their answers."""

    sequences: Tensor  # [B, P+N] int64
    history: Tensor | None = None  # [S, B, P+N] int64, the state after every step
    filled_at: Tensor | None = None  # [B, P+N] int64, the step at which a token was filled; -1 = not predicted (prompt)
    confidence: Tensor | None = None  # [B, P+N] float32 in [0, 1], see `choosing.certainty`; 0 = not predicted
    forwards: Tensor | None = None  # [B] int64, forwards of the model that filled something in this row


@dataclass(frozen=True)
class State:
    """The rows between two steps; tensors of a State are never changed."""

    x: Tensor  # [B, L] int64
    filled_at: Tensor  # [B, L] int64
    confidence: Tensor  # [B, L] float32
    forwards: Tensor  # [B] int64


def diffusion_generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    params: SamplingParams | None = None,
    return_history: bool = False,
    sample_ids: Tensor | None = None,
    infill: bool = False,
    run_every_step: bool = False,
) -> GenerationOutput:
    """Answer a batch of prompts.

    With `params.forbid_mask`, or a model that gives the mask token no chance, a row's answer depends on the weights,
    its prompt, its sample id and `params` only: not on the batch, the order of rows or the padding (up to the
    rounding of the model's own arithmetic, which may differ with the batch's shape).

    Args:
        model: a DreamModel, on the device of `input_ids`. It runs in eval mode and gets its modes back.
        input_ids: [B, P] int64, left-padded if the prompts differ in length.
        attention_mask: [B, P] bool or 0/1, 0 = left padding. None: no padding.
        params: see SamplingParams; None takes its defaults.
        return_history: keep the state after every step.
        sample_ids: [B] int64, the rows' keys of the noise; 0 … B − 1 by default. Rows with equal prompts and equal
            ids get equal answers.
        infill: fill the masks that the prompt contains, too; without it they are an error.
        run_every_step: call the model also where nothing would be filled, so that the number of forwards is
            `params.steps` whatever the data. Ranks that share a sharded model need it.

    Raises:
        ValueError: see `params.prepare`; logits that are not finite.
    """
    params = params or SamplingParams()
    canvas = prepare(model.config, input_ids, attention_mask, params, sample_ids, infill)
    history = []
    for state in _denoise(model, canvas, params, infill, run_every_step):
        if return_history:
            history.append(state.x)
    return GenerationOutput(
        state.x, torch.stack(history) if return_history else None, state.filled_at, state.confidence, state.forwards
    )


def denoising_steps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    params: SamplingParams | None = None,
    sample_ids: Tensor | None = None,
    infill: bool = False,
) -> Iterator[Tensor]:
    """Watch an answer grow: the state x [B, P+N] after each of the `params.steps` steps.

    Arguments and errors as in `diffusion_generate`. A yielded tensor is never changed afterwards. The model is in
    eval mode until the iterator is exhausted or closed.
    """
    params = params or SamplingParams()
    canvas = prepare(model.config, input_ids, attention_mask, params, sample_ids, infill)
    return _tokens(_denoise(model, canvas, params, infill, run_every_step=False))


def _tokens(states: Iterator[State]) -> Iterator[Tensor]:
    for state in states:
        yield state.x


def _denoise(
    model: nn.Module, canvas: Canvas, params: SamplingParams, infill: bool, run_every_step: bool
) -> Iterator[State]:
    attention_mask, position_ids = (canvas.real, canvas.positions) if canvas.padded else (None, None)

    def predict(x: Tensor, where: Tensor) -> Tensor:
        return denoiser.logits(model, x, where, attention_mask, position_ids)

    mask_token_id = model.config.mask_token_id
    if params.top_k is None:
        params = replace(params, top_k=getattr(model.config, "default_top_k", None))
    with _evaluating(model):
        yield from reverse_process(
            predict, canvas, params, mask_token_id=mask_token_id, uneven=infill, run_every_step=run_every_step
        )


@torch.no_grad()
def reverse_process(
    predict: Predict,
    canvas: Canvas,
    params: SamplingParams,
    *,
    mask_token_id: int,
    uneven: bool = False,
    run_every_step: bool = False,
) -> Iterator[State]:
    """The steps of denoising over any predictor; yields the state after each.

    Step i fills `fill_shares[i]` of the positions that are still masked. These are looked up again at every step, for
    a model may predict the mask token itself.

    In that case, and at temperature 0, where a run of the authors' code is reproducible, we follow it to the token:
    the number to fill is an average over the batch's rows, and a row with fewer masks than that gets other positions
    overwritten by the mask token, prompt included. `forbid_mask`, any noise, or `uneven` counts every row for itself.

    Args:
        predict: (x_t [B, L], where [B, L] bool) → logits [M, V] of the True positions in reading order.
        canvas: the rows to fill.
        params: see SamplingParams.
        mask_token_id: the id of the mask token.
        uneven: rows begin with different numbers of masks (infilling).
        run_every_step: call `predict` also where nothing would be filled.

    Raises:
        ValueError: a confidence is not finite.
    """
    x, shares = canvas.x, fill_shares(params.steps, params.eps)
    state = State(
        x, torch.full_like(x, -1), torch.zeros(x.shape, dtype=torch.float32, device=x.device), x.new_zeros(len(x))
    )
    as_authors = not (params.forbid_mask or uneven or params.temperature > 0 or params.alg_temp)
    masks = counts = None  # [B] on the host: how many positions are masked, how many of them to fill now
    for step in range(params.steps):
        where = x == mask_token_id  # [B, L], what to predict
        if params.alg == "origin":
            where &= _noise(canvas, params.seed, step, _ORDER) < shares[step].item()
            idle = not where.any()
        else:
            # Where no position can stay masked, the counts are known without asking the device.
            masks = masks - counts if params.forbid_mask and step > 0 else where.sum(1).cpu()
            remaining = (masks.sum() / len(masks)).expand(len(masks)) if as_authors else masks.float()
            counts = (remaining * shares[step]).long()  # rounds down, in float32 as the authors do
            idle = not counts.any()
        if idle:
            if run_every_step:
                predict(x, torch.zeros_like(where))
            yield state
            continue

        logits = predict(x, where)  # [M, V]
        tokens, confidence = candidates(
            logits,
            _noise(canvas, params.seed, step, _TOKEN)[where] if params.temperature > 0 else None,
            alg=params.alg,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            forbidden=mask_token_id if params.forbid_mask else None,
        )  # [M], [M]
        if not confidence.isfinite().all():
            raise ValueError(
                f"the model's logits are not finite at step {step}: check the weights (a diverged run?), "
                "and use bfloat16 or float32 rather than float16"
            )
        chosen, sure = where, certainty(confidence, params.alg)
        if params.alg != "origin":
            if params.alg_temp:
                confidence = perturb(confidence, params.alg_temp, _noise(canvas, params.seed, step, _ORDER)[where])
            chosen = choose_positions(confidence, where, masks, counts)
        proposal = torch.full_like(x, mask_token_id).masked_scatter(where, tokens)  # [B, L]
        x = torch.where(chosen, proposal, x)
        filled = chosen & (x != mask_token_id)
        state = State(
            x,
            state.filled_at.masked_fill(filled, step),
            torch.where(filled, torch.zeros_like(state.confidence).masked_scatter(where, sure), state.confidence),
            state.forwards + filled.any(1),
        )
        yield state


def _noise(canvas: Canvas, seed: int, step: int, purpose: int) -> Tensor:
    """Uniform numbers [B, L] of the rows' samples at this step."""
    return uniform(seed, canvas.sample_ids[:, None], step, canvas.positions, purpose)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
