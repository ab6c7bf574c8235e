"""Answering a batch of prompts: what the reverse process needs is put together, and its result handed out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dream_lightning.errors import UserError
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser, compiled
from dream_lightning.sampling.cached_forward import Network
from dream_lightning.sampling.canvas import Canvas, prepare
from dream_lightning.sampling.constraints import LogitsHook, TokensHook, place_required
from dream_lightning.sampling.denoise import reverse_process
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.rows import State, locate


@dataclass
class GenerationOutput:
    """Prompts with their answers."""

    sequences: Tensor  # [B, P+N] int64
    history: Tensor | None = None  # [S, B, P+N] int64, the state after every step
    filled_at: Tensor | None = None  # [B, P+N] int64, the step at which a token was filled; -1 = not predicted (prompt)
    confidence: Tensor | None = None  # [B, P+N] float32 in [0, 1], see `choosing.certainty`; 0 = not predicted
    forwards: Tensor | None = None  # [B] int64, forwards of the model that filled something in this row


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
    num_return_sequences: int = 1,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
) -> GenerationOutput:
    """Answer a batch of prompts.

    With `params.forbid_mask`, or a model that gives the mask token no chance, a row's answer depends on the weights,
    its prompt, its sample id and `params` only: not on the batch, the order of rows or the padding (up to the
    rounding of the model's own arithmetic, which may differ with the batch's shape).

    Args:
        model: a DreamModel or its CompiledDenoiser, on the device of `input_ids`. It runs in eval mode and gets its
            modes back.
        input_ids: [B, P] int64, left-padded if the prompts differ in length.
        attention_mask: [B, P] bool or 0/1, 0 = left padding. None: no padding.
        params: see SamplingParams; None takes its defaults.
        return_history: keep the state after every step.
        sample_ids: [B] int64, the rows' keys of the noise; 0 … B − 1 by default. Rows with equal prompts and equal
            ids get equal answers.
        infill: fill the masks that the prompt contains, too; without it they are an error.
        run_every_step: call the model also where nothing would be filled, so that the number of forwards is
            `params.steps` (one more with `required_tokens`) whatever the data. Ranks that share a sharded model need
            it.
        num_return_sequences: answers to every prompt, with different noise; they follow each other in the output,
            which has B · num_return_sequences rows. The first is the one that there would be alone.
        logits_hook: changes logits before tokens are chosen, see `control.LogitsHook`.
        tokens_hook: changes tokens after a step, see `control.TokensHook`.

    Raises:
        UserError: see `canvas.prepare`; logits that are not finite; several sequences asked of a process without
            noise; hooks beside what they would break; `params.compile` without CUDA.
    """
    params = params or SamplingParams()
    canvas = prepare(model.config, input_ids, attention_mask, params, sample_ids, infill)
    if num_return_sequences != 1:
        canvas = canvas.repeat(_checked_copies(num_return_sequences, params))
    _check_hooks(params, logits_hook, tokens_hook)
    history = []
    states = _denoise(model, canvas, params, infill, run_every_step, logits_hook, tokens_hook)
    for state in states:
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
    return _tokens(_denoise(model, canvas, params, infill))


def _tokens(states: Iterator[State]) -> Iterator[Tensor]:
    for state in states:
        yield state.x


def _denoise(
    model: nn.Module,
    canvas: Canvas,
    params: SamplingParams,
    infill: bool,
    run_every_step: bool = False,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
) -> Iterator[State]:
    config, (rows, length) = model.config, canvas.x.shape
    if params.top_k is None:
        params = replace(params, top_k=getattr(config, "default_top_k", None))
    fast, span = {}, None
    if params.compile or isinstance(model, CompiledDenoiser):
        if not params.forbid_mask:
            raise UserError("a compiled model pads the batch, which must not count: set forbid_mask to True")
        if logits_hook or tokens_hook:
            raise UserError(
                "hooks would see the rows and columns with which a compiled model pads the batch, and positions that "
                "are predicted in vain: leave out compile, and pass the model itself"
            )
        model = compiled(model)
        canvas = model.into_bucket(canvas)
        fast = {"bucket": model.positions, "best": model.best}
        if not infill:  # the prompt has no masks; a token is predicted from the column before it
            span = (canvas.prompt_length - 1, canvas.x.shape[1] - 1)
    with _evaluating(model):
        network = Network(model, canvas, cache=params.cache, refresh_every=params.refresh_every, span=span)
        if params.required_tokens:
            canvas = _with_required(network, canvas, params, config)
        states = reverse_process(
            network,
            canvas,
            params,
            mask_token_id=config.mask_token_id,
            eos_token_id=config.eos_token_id,
            uneven=infill,
            run_every_step=run_every_step,
            forwards=1 if params.required_tokens else 0,
            logits_hook=logits_hook,
            tokens_hook=tokens_hook,
            **fast,
        )
        for state in states:
            yield State(*(part[:rows, -length:] if part.ndim == 2 else part[:rows] for part in vars(state).values()))


@torch.no_grad()
def _with_required(network: Network, canvas: Canvas, params: SamplingParams, config: Any) -> Canvas:
    """The canvas with `params.required_tokens` in their places."""
    where = canvas.x == config.mask_token_id
    if int(where.sum(1).min()) < len(params.required_tokens):
        raise UserError(
            f"required_tokens are {len(params.required_tokens)}, and a row has {int(where.sum(1).min())} masks: leave "
            "room for them"
        )
    row, column, _ = locate(where, int(where.sum()))
    logits = network(canvas.x, row, column, 0)
    x, last = place_required(logits, row, column, canvas.x, params.required_tokens)
    canvas = replace(canvas, x=x, eos_from=torch.maximum(canvas.eos_from, last + 1))
    network.keep(canvas)
    return canvas


def _checked_copies(number: int, params: SamplingParams) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"num_return_sequences is {number!r}, wanted an integer of at least 1")
    if params.temperature == 0 and not params.alg_temp and params.alg != "origin":
        raise UserError(
            f"num_return_sequences is {number}, but without noise all would be the same: set temperature or alg_temp"
        )
    return number


def _check_hooks(params: SamplingParams, logits_hook: LogitsHook | None, tokens_hook: TokensHook | None) -> None:
    if params.stop_at_eos and (logits_hook or tokens_hook):
        raise UserError("hooks see the whole batch, which rows leave with stop_at_eos: leave one of them out")
    if (params.threshold is not None or params.factor is not None) and (logits_hook or tokens_hook):
        raise UserError("hooks see the whole batch, which rows leave with threshold and factor: use tokens_per_step")
    if tokens_hook and params.cache != "none":
        raise UserError("tokens_hook may change tokens whose keys are kept: set cache to none")


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
