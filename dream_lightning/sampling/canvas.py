"""Prompts with room for their answers, checked."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.errors import UserError
from dream_lightning.sampling.params import SamplingParams


@dataclass(frozen=True)
class Canvas:
    """Prompts with room for their answers; L = P + N."""

    x: Tensor  # [B, L] int64, the state at t = 1
    real: Tensor  # [B, L] bool, False = left padding
    positions: Tensor  # [B, L] int64, counted from the row's first real token; padding has position 1
    sample_ids: Tensor  # [B] int64, keys of the noise
    copies: Tensor  # [B] int64, number of the returned sequence among those of its prompt
    eos_from: Tensor  # [B] int64, the first column where eos may be predicted; 0 = anywhere
    prompt_length: int  # P
    padded: bool  # whether `real` has a False: without one, attention needs no mask

    def select(self, rows: Tensor) -> "Canvas":
        """These rows [b] int64 only, in this order."""
        return replace(self, **{n: getattr(self, n)[rows] for n in _BY_ROW})

    def repeat(self, times: int) -> "Canvas":
        """Every row so many times, one after the other, each copy with noise of its own."""
        repeated = {n: getattr(self, n).repeat_interleave(times, 0) for n in _BY_ROW}
        repeated["copies"] = torch.arange(times, device=self.x.device).repeat(len(self.x))
        return replace(self, **repeated)

    def padded_to(self, rows: int, length: int, pad_token_id: int) -> "Canvas":
        """More padding on the left and copies of the last row below: neither changes the answers of the others."""
        extra = length - self.x.shape[1]
        canvas = self.select(torch.arange(rows, device=self.x.device).clamp(max=len(self.x) - 1))
        return replace(
            canvas,
            x=F.pad(canvas.x, (extra, 0), value=pad_token_id),
            real=F.pad(canvas.real, (extra, 0), value=False),
            positions=F.pad(canvas.positions, (extra, 0), value=1),
            eos_from=canvas.eos_from + extra,
            prompt_length=self.prompt_length + extra,
            padded=self.padded or extra > 0,
        )


_BY_ROW = ("x", "real", "positions", "sample_ids", "copies", "eos_from")


def prepare(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: SamplingParams,
    sample_ids: Tensor | None = None,
    infill: bool = False,
) -> Canvas:
    """Append `params.max_new_tokens` masks to the prompts, after checking them.

    Args:
        config: a DreamConfig.
        input_ids: [B, P] int64.
        attention_mask: [B, P] bool or 0/1, 0 = left padding. None: no padding.
        sample_ids: [B] int64, 0 … B − 1 by default.
        infill: the prompts may contain masks.

    Raises:
        UserError: a shape or dtype is wrong, an id is outside the vocabulary, padding is not on the left, a row has
            no real token or is padded with masks, prompt and answer are longer than the model's context, the prompt
            contains masks without `infill`, there is nothing to fill, infilling is asked for beside what goes from
            left to right, or `params` names ids that the model lacks.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise UserError(f"input_ids has shape {list(input_ids.shape)}, wanted [B, P] with at least one row and token")
    if input_ids.dtype != torch.int64:
        raise UserError(f"input_ids is {input_ids.dtype}, wanted torch.int64: pass token ids, input_ids.long()")
    if not infill and params.max_new_tokens == 0:
        raise UserError("max_new_tokens is 0, so there is nothing to fill: raise it, or pass infill=True")
    batch, length = input_ids.shape[0], input_ids.shape[1] + params.max_new_tokens
    if length > config.max_position_embeddings:
        raise UserError(
            f"{input_ids.shape[1]} prompt tokens and {params.max_new_tokens} new ones are {length}, the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings): shorten one of them"
        )
    low, high = input_ids.aminmax()
    if low < 0 or high >= config.vocab_size:
        raise UserError(
            f"input_ids holds ids from {int(low)} to {int(high)}, the vocabulary is 0 … {config.vocab_size - 1}: "
            "was another tokenizer used?"
        )
    prompt_is_real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        prompt_is_real = _left_padding(attention_mask, input_ids)
    if not infill and (masks := (input_ids == config.mask_token_id).sum()):
        raise UserError(
            f"input_ids contains the mask token {config.mask_token_id} {int(masks)} times: pass infill=True to fill "
            "these positions too, or escape special tokens in the prompt's text"
        )
    if ((input_ids == config.mask_token_id) & ~prompt_is_real).any():
        raise UserError("input_ids is padded with the mask token: pad with another one, such as the pad token")
    if infill:
        _refuse_left_to_right(params)
    _check_ids(config, params)
    if sample_ids is None:
        sample_ids = torch.arange(batch)
    if sample_ids.shape != (batch,) or sample_ids.dtype != torch.int64:
        raise UserError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}, wanted torch.int64 [{batch}]: one id per row"
        )
    real = F.pad(prompt_is_real, (0, params.max_new_tokens), value=True)  # [B, L]
    x = F.pad(input_ids, (0, params.max_new_tokens), value=config.mask_token_id)  # [B, L]
    prompt_length = input_ids.shape[1]
    if params.forced_prefix:
        x[:, prompt_length : prompt_length + len(params.forced_prefix)] = x.new_tensor(params.forced_prefix)
    if params.forced_suffix:
        x[:, length - len(params.forced_suffix) :] = x.new_tensor(params.forced_suffix)
    return Canvas(
        x=x,
        real=real,
        positions=(real.long().cumsum(-1) - 1).masked_fill(~real, 1),
        sample_ids=sample_ids.to(input_ids.device),
        copies=x.new_zeros(batch),
        eos_from=x.new_full((batch,), prompt_length + params.min_new_tokens if params.min_new_tokens else 0),
        prompt_length=prompt_length,
        padded=not bool(real.all()),
    )


def _refuse_left_to_right(params: SamplingParams) -> None:
    for name in ("block_length", "stop_at_eos"):
        if getattr(params, name):
            raise UserError(
                f"infill=True with {name}: masks may stand anywhere in the prompt, and {name} goes from left to right "
                "through the new tokens only; leave it out"
            )
    if params.max_new_tokens == 0:
        for name in ("forced_prefix", "forced_suffix"):
            if getattr(params, name):
                raise UserError(f"{name} is part of the new tokens, and max_new_tokens is 0: write it into the prompt")


def _check_ids(config: Any, params: SamplingParams) -> None:
    for name in ("banned_tokens", "required_tokens", "forced_prefix", "forced_suffix"):
        for token in getattr(params, name) or []:
            if not 0 <= token < config.vocab_size:
                raise UserError(f"{name} holds {token}, the vocabulary is 0 … {config.vocab_size - 1}")
            if token == config.mask_token_id and name != "banned_tokens":
                raise UserError(f"{name} holds the mask token {token}, which is no token of an answer: take it out")
    if len({config.mask_token_id, *(params.banned_tokens or [])}) == config.vocab_size:
        raise UserError("banned_tokens holds the whole vocabulary: leave some tokens to answer with")
    if (params.stop_at_eos or params.min_new_tokens or params.eos_penalty) and config.eos_token_id is None:
        raise UserError("the model's config has no eos_token_id, which stop_at_eos, min_new_tokens and eos_penalty use")


def _left_padding(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask as bool [B, P], or an error that says what is wrong with it."""
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, wanted that of input_ids, "
            f"{list(input_ids.shape)}: the new positions are added here"
        )
    real = attention_mask.to(input_ids.device).bool()
    if (attention_mask != attention_mask.bool()).any():
        raise UserError("attention_mask has values other than 0 and 1: pass 1 for real tokens and 0 for padding")
    if (empty := ~real.any(-1)).any():
        raise UserError(f"row {int(empty.nonzero()[0])} of attention_mask has no real token: drop the row")
    if (broken := (real[:, 1:] < real[:, :-1]).any(-1)).any():
        raise UserError(
            f"row {int(broken.nonzero()[0])} of attention_mask has a 0 after a 1: the answer follows the last column, "
            'so pad on the left (tokenizer.padding_side = "left") and leave no holes'
        )
    return real
