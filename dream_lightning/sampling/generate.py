"""Answering a batch of prompts: ids in, ids out."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dream_lightning.errors import UserError
from dream_lightning.sampling.cached_forward import CachedForward
from dream_lightning.sampling.canvas import Canvas, prepare
from dream_lightning.sampling.denoise import reverse_process
from dream_lightning.sampling.params import SamplingParams
from dream_lightning.sampling.token_sampling import LogitsHook, TokensHook
from dream_lightning.sampling.unmasking import UnmaskingRule, rule_of


@dataclass
class GenerationOutput:
    """Prompts with their answers."""

    sequences: Tensor  # [B, P+N] int64; with `max_length`, N is that of the shortest prompt, and rows end with eos
    history: Tensor | None = None  # [S, B, P+N] int64, the state after every step
    filled_at: Tensor | None = None  # [B, P+N] int64, the step at which a token was filled; -1 = not predicted (prompt)
    confidence: Tensor | None = None  # [B, P+N] float32, see `token_sampling.certainty`; 0 = not predicted
    forwards: Tensor | None = None  # [B] int64, forwards of the model that filled something in this row


def diffusion_generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    params: SamplingParams | None = None,
    return_history: bool = False,
    **options: Any,
) -> GenerationOutput:
    """Answer a batch of prompts; all other arguments and errors are those of `denoising_steps`.

    With `params.forbid_mask` the answer of a row depends on the weights, its prompt, its sample id and `params` only:
    not on the batch, the order of rows or the padding (up to rounding, which may differ with the batch's shape).

    Args:
        return_history: keep the state after every step.
    """
    history = []
    for canvas in denoising_steps(model, input_ids, attention_mask, params=params, **options):
        if return_history:
            history.append(canvas.x)
    states = torch.stack(history) if return_history else None
    return GenerationOutput(canvas.x, states, canvas.filled_at, canvas.confidence, canvas.forwards)


def denoising_steps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    params: SamplingParams | None = None,
    sample_ids: Tensor | None = None,
    infill: bool = False,
    run_every_step: bool = False,
    num_return_sequences: int = 1,
    unmasking: UnmaskingRule | None = None,
    logits_hook: LogitsHook | None = None,
    tokens_hook: TokensHook | None = None,
) -> Iterator[Canvas]:
    """Iterate over the state after each of the `params.steps` steps, see Canvas.

    The model is in eval mode until the iterator is exhausted or closed.

    Args:
        model: a DreamModel or its CompiledDenoiser, on the device of `input_ids`.
        input_ids: [B, P] int64, left-padded if the prompts differ in length.
        attention_mask: [B, P] bool or 0/1, 0 = left padding. None: no padding.
        sample_ids: [B] int64, keys of the rows' noise; 0 … B − 1 by default. Equal prompts and ids get equal answers.
        infill: also fill the masks that the prompt contains; without it they are an error.
        run_every_step: call the model also at steps that fill nothing. Ranks that share a sharded model need it.
        num_return_sequences: answers for every prompt, with different noise; the first is that of one sequence.
        unmasking: a rule of your own, see UnmaskingRule.
        logits_hook, tokens_hook: change logits before tokens are chosen, and tokens after a step; see `token_sampling`.

    Raises:
        UserError: the arguments are wrong or exclude each other; `params.compile` without CUDA; logits are not finite;
            a hook or rule returns another shape or dtype than it should.
    """
    params = params or SamplingParams()
    compiled, sequences = params.compile or hasattr(model, "into_bucket"), num_return_sequences
    causal = getattr(model.config, "causal", False)
    deciding = ", ".join([*params.rules, *(["alg: origin"] if params.alg == "origin" else [])])
    hooks = {"logits_hook": logits_hook, "tokens_hook": tokens_hook}
    for is_wrong, message in (
        (causal and params.cache != "none", "a causal model has no KV cache: set cache to none"),
        (causal and params.block_length != 1, "a causal model answers from left to right: set block_length to 1"),
        (sequences < 1, f"num_return_sequences is {sequences}, wanted at least 1"),
        (sequences > 1 and not params.noisy, "num_return_sequences above 1 needs noise to differ: set temperature"),
        (tokens_hook and params.cache != "none", "tokens_hook may change tokens in the KV cache: set cache to none"),
        (compiled and any(hooks.values()), "hooks would see compiled padding: pass the model without compile"),
        ((compiled or unmasking) and not params.forbid_mask, "compile and unmasking need forbid_mask: set forbid_mask"),
        (unmasking and deciding, f"unmasking and {deciding} both decide what is filled: set one"),
    ):
        if is_wrong:
            raise UserError(message)
    canvas = prepare(model.config, input_ids, attention_mask, params, sample_ids, infill).repeat(sequences)
    rule = unmasking or rule_of(params, rows_differ=bool(infill or tokens_hook or params.max_length))
    # A generator would check all this at the first step only.
    return denoise_canvas(model, canvas, params, rule, infill=infill, run_every_step=run_every_step, **hooks)


def denoise_canvas(
    model: Any, canvas: Canvas, params: SamplingParams, rule: UnmaskingRule, *, infill: bool = False, **options: Any
) -> Iterator[Canvas]:
    """`denoising_steps` for a canvas of the caller's, which is not checked. Blocks begin at its `prompt_length`."""
    if params.top_k is None:
        params = replace(params, top_k=getattr(model.config, "default_top_k", None))
    if (expand := getattr(model.config, "expand_token_id", None)) is not None:  # the length is fixed here
        params = replace(params, banned_tokens=[*(params.banned_tokens or []), expand])
    if params.compile or hasattr(model, "into_bucket"):
        model = _compiled(model)
    return _run(model, canvas, params, rule, infill, **options)


def _run(
    model: Any, canvas: Canvas, params: SamplingParams, rule: UnmaskingRule, infill: bool, **options: Any
) -> Iterator[Canvas]:
    (rows, length), span = canvas.x.shape, None
    if hasattr(model, "into_bucket"):
        canvas = model.into_bucket(canvas)
        if not infill:  # the prompt has no masks; a token is predicted from the column before it
            span = (canvas.prompt_length - 1, canvas.x.shape[1] - 1)
    with evaluating(model):
        for state in reverse_process(CachedForward(model, canvas, params, span), params, rule, **options):
            yield state.cropped(rows, length)


_COMPILED: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()  # model → its CompiledDenoiser


def _compiled(model: Any) -> Any:
    """The model's CompiledDenoiser, with the graphs of earlier calls if they are still valid."""
    if isinstance(model, nn.Module):
        if model not in _COMPILED:
            from dream_lightning.kernels import cuda_graphs  # optional: the core runs without it

            _COMPILED[model] = cuda_graphs.CompiledDenoiser(model, keep_alive=False)
        model = _COMPILED[model]
    model.refresh()
    return model


def release_compiled(model: nn.Module) -> None:
    """Free the CUDA graphs and KV caches of `params.compile`: gigabytes that training needs. Compiled code remains."""
    _COMPILED.pop(model, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
