"""Infilling with DreamOn, whose gaps grow and shrink: the model predicts how long the missing text is.

Every step fills the most certain mask. If the expand token is predicted there, the mask becomes two masks; if eos is,
the position is removed. Source: DreamOn (arXiv:2602.01326) and the authors' evaluation code.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.cached_forward import CachedForward, Proposer
from dream_lightning.sampling.canvas import prepare
from dream_lightning.sampling.generate import evaluating
from dream_lightning.sampling.params import SamplingParams


@torch.no_grad()
def infill_variable_length(
    model: Any, input_ids: Tensor, *, params: SamplingParams, longest: int, delete_rest: bool = True, sample_id: int = 0
) -> Tensor:
    """Fill the masks of one text; [L] → [L'] int64.

    Args:
        model: a DreamModel whose config has an `expand_token_id`.
        input_ids: [L] int64 with masks, the initial gaps.
        params: how a token is chosen. `max_new_tokens` and `steps` are not used, and the mask token is never predicted.
        longest: most masks and new tokens in all gaps together; also the number of expansions.
        delete_rest: a removed position takes all masks right of it with it, as in the authors' evaluation.
        sample_id: key of the noise.

    Raises:
        UserError: the model has no expand or eos token; `longest` is less than the number of masks; options of `params`
            for blocks, caches and several tokens a step; as `diffusion_generate`.
    """
    config = model.config
    mask, expand, delete = config.mask_token_id, config.expand_token_id, config.eos_token_id
    if expand is None or delete is None:
        raise UserError("the model's config has no expand_token_id and eos_token_id: use a DreamOn, or infill=True")
    if unused := [*params.rules, *(n for n in ("block_length", "stop_at_eos", "compile") if getattr(params, n))]:
        raise UserError(f"{unused[0]} is set, and variable lengths are filled one token a step: leave it out")
    if params.alg == "origin" or params.min_new_tokens:
        raise UserError("alg is 'origin' or min_new_tokens is set, which variable lengths do not know: leave them out")
    x, room = input_ids, longest - int((input_ids == mask).sum())
    if room < 0:
        raise UserError(f"longest is {longest}, and the text has {longest - room} masks: raise longest")
    if len(x) + room > config.max_position_embeddings:
        raise UserError(f"{len(x) + room} tokens exceed the model's {config.max_position_embeddings}: lower longest")
    top_k = params.top_k or getattr(config, "default_top_k", None)
    params = replace(params, max_new_tokens=0, max_length=None, forbid_mask=True, top_k=top_k)
    step, expansions, ids = 0, 0, torch.tensor([sample_id])
    with evaluating(model):
        while masks := int((x == mask).sum()):
            full = room == 0 or expansions == longest
            now = replace(params, banned_tokens=[*(params.banned_tokens or []), *[expand] * full])
            canvas = prepare(config, x[None], None, now, ids, infill=True)
            predict = CachedForward(model, canvas, now)
            predict.start_block(0, len(x))
            propose = Proposer(predict, now, None)
            tokens, _, order = propose(canvas, canvas.masked, torch.tensor([masks]), step, 0)  # [1, L] each
            propose.check_finite()
            at = int(order[0].argmax())
            token, left, right = int(tokens[0, at]), x[:at], x[at + 1 :]
            if token == delete and delete_rest:
                right = right[right != mask]
            filled = {expand: [mask, mask], delete: []}.get(token, [token])
            grown = torch.cat([left, x.new_tensor(filled), right])
            room, x = room + len(x) - len(grown), grown
            step, expansions = step + 1, expansions + (token == expand)
    return x
