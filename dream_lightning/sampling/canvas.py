"""Rows that are filled: prompts with masks for their answers, and what is known of every position."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_lightning.diffusion.noise import uniform
from dream_lightning.errors import UserError
from dream_lightning.sampling.params import SamplingParams

TOKEN, ORDER = 0, 1  # what noise is for: the tokens drawn, and the order of positions


@dataclass(frozen=True)
class Canvas:
    """The rows between two steps; L = P + N. Its tensors are never changed in place."""

    x: Tensor  # [B, L] int64
    real: Tensor  # [B, L] bool, False = left padding, or after `params.max_length`
    positions: Tensor  # [B, L] int64, counted from the row's first real token; padding has position 1
    sample_ids: Tensor  # [B] int64, keys of the noise
    copies: Tensor  # [B] int64, number of the returned sequence among those of its prompt
    earlier_steps: Tensor  # [B] int64, steps of the row before the first one here: its noise depends on all of them
    filled_at: Tensor  # [B, L] int64, the step at which a position was filled; -1 = not predicted
    confidence: Tensor  # [B, L] float32, the certainty at that step; 0 = not predicted
    forwards: Tensor  # [B] int64, number of forwards that filled something in the row
    prompt_length: int  # P
    padded: bool  # whether `real` has a False: without one, attention needs no mask
    mask_token_id: int
    eos_token_id: int | None

    @property
    def masked(self) -> Tensor:  # [B, L] bool
        return (self.x == self.mask_token_id) & self.real

    def fill(self, chosen: Tensor, tokens: Tensor, certainty: Tensor, step: int) -> "Canvas":
        """Fill `tokens` [B, L] in where `chosen` [B, L]; a predicted mask token does not count as filled."""
        filled = chosen & (tokens != self.mask_token_id)
        return replace(
            self,
            x=torch.where(chosen, tokens, self.x),
            filled_at=self.filled_at.masked_fill(filled, step),
            confidence=torch.where(filled, certainty, self.confidence),
            forwards=self.forwards + filled.any(1),
        )

    def fill_after_eos(self) -> "Canvas":
        """Fill the masks with eos in rows that have an eos and no mask left of the first one."""
        new = slice(self.prompt_length, None)
        after = (self.x[:, new] == self.eos_token_id).long().cumsum(1) > 0  # [B, N], from the first eos on
        ended = after[:, -1] & ~(self.masked[:, new] & ~after).any(1)  # [B]
        return replace(self, x=self.x.masked_fill(ended[:, None] & self.masked, self.eos_token_id))

    def uniforms(self, seed: int, step: int, purpose: int) -> Tensor:
        """Uniform noise [B, L] float32 in [0, 1) of the rows' samples; `purpose` is TOKEN or ORDER."""
        copies, steps = self.copies[:, None] * 2 + purpose, self.earlier_steps[:, None] + step
        return uniform(seed, self.sample_ids[:, None], steps, self.positions, copies)

    def select(self, rows: Tensor) -> "Canvas":
        """These rows [b] int64 only, in this order."""
        return replace(self, **{name: x[rows] for name, x in self._tensors().items()})

    def put(self, rows: Tensor, other: "Canvas") -> "Canvas":
        """The same with `other` in these rows [b] int64."""
        return replace(self, **{n: x.index_copy(0, rows, getattr(other, n)) for n, x in self._tensors().items()})

    def repeat(self, times: int) -> "Canvas":
        """Every row `times` times, one after the other, each copy with noise of its own."""
        rows = torch.arange(len(self.x), device=self.x.device)
        copies = torch.arange(times, device=self.x.device).repeat(len(rows))
        return replace(self.select(rows.repeat_interleave(times)), copies=copies)

    def padded_to(self, rows: int, length: int, pad_token_id: int) -> "Canvas":
        """More left padding, and copies of the last row below: neither changes the answers of the other rows."""
        extra = length - self.x.shape[1]
        canvas = self.select(torch.arange(rows, device=self.x.device).clamp(max=len(self.x) - 1))
        padding = {"x": pad_token_id, "real": False, "positions": 1, "filled_at": -1, "confidence": 0.0}
        grown = {name: F.pad(getattr(canvas, name), (extra, 0), value=value) for name, value in padding.items()}
        return replace(canvas, **grown, prompt_length=self.prompt_length + extra, padded=self.padded or extra > 0)

    def cropped(self, rows: int, length: int) -> "Canvas":
        """The opposite of `padded_to`: the first rows and the last columns."""
        extra = self.x.shape[1] - length
        tensors = {n: x[:rows, extra:] if x.ndim == 2 else x[:rows] for n, x in self._tensors().items()}
        return replace(self, **tensors, prompt_length=self.prompt_length - extra)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def prepare(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    params: SamplingParams,
    sample_ids: Tensor | None = None,
    infill: bool = False,
) -> Canvas:
    """Append masks for new tokens; UserError if an argument of `diffusion_generate` is wrong.

    With `params.max_length`, rows with longer prompts have fewer masks, and eos after them, which nothing attends to.
    """
    if sample_ids is None:
        sample_ids = torch.arange(len(input_ids))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    for is_wrong, message in _problems(config, input_ids, mask, params, sample_ids, infill):
        if is_wrong:
            raise UserError(message)
    new = params.room(int(mask.sum(1).min()))
    real = F.pad(mask.bool(), (0, new), value=True)  # [B, L]
    x = F.pad(input_ids, (0, new), value=config.mask_token_id)  # [B, L]
    positions = real.long().cumsum(-1) - 1
    if params.max_length is not None:
        after = positions >= params.max_length
        real, x = real & ~after, x.masked_fill(after, config.eos_token_id)
    return Canvas(
        x=x,
        real=real,
        positions=positions.masked_fill(~real, 1),
        sample_ids=sample_ids.to(x.device),
        copies=x.new_zeros(len(x)),
        earlier_steps=x.new_zeros(len(x)),
        filled_at=torch.full_like(x, -1),
        confidence=torch.zeros_like(x, dtype=torch.float32),
        forwards=x.new_zeros(len(x)),
        prompt_length=input_ids.shape[1],
        padded=not bool(real.all()),
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
    )


def _problems(
    config: Any, ids: Tensor, mask: Tensor, params: SamplingParams, sample_ids: Tensor, infill: bool
) -> Iterator[tuple[bool, str]]:
    """Whether arguments are wrong, and the error; later checks rely on earlier ones."""
    got, vocabulary = list(ids.shape), f"the vocabulary is 0 … {config.vocab_size - 1}"
    yield ids.ndim != 2 or 0 in got, f"input_ids has shape {got}, wanted [B, P] with at least one row and token"
    yield ids.dtype != torch.int64, f"input_ids is {ids.dtype}, wanted torch.int64: pass token ids, input_ids.long()"
    low, high = (int(i) for i in ids.aminmax())
    wrong = low < 0 or high >= config.vocab_size
    yield wrong, f"input_ids holds ids from {low} to {high}, {vocabulary}: was another tokenizer used?"

    yield list(mask.shape) != got, f"attention_mask has shape {list(mask.shape)}, wanted that of input_ids, {got}"
    real = mask.bool()
    yield (mask != real).any(), "attention_mask has values other than 0 and 1: pass 1 for tokens and 0 for padding"
    empty, broken = ~real.any(1), (real[:, 1:] < real[:, :-1]).any(1)  # [B]
    yield empty.any(), f"row {int(empty.int().argmax())} of attention_mask has no real token: drop the row"
    row = int(broken.int().argmax())
    yield broken.any(), f'row {row} of attention_mask has a 0 after a 1: set tokenizer.padding_side = "left"'

    longest, end = int(real.sum(1).max()), params.max_length
    too_long = end is not None and longest >= end
    yield too_long, f"a prompt has {longest} tokens and max_length is {end}: raise it, or shorten the prompt"
    yield end is not None and infill, "infill=True with max_length, which is for new tokens: leave max_length out"
    yield end is not None and config.eos_token_id is None, "max_length needs an eos_token_id in the model's config"
    old, new, limit = got[1], params.room(int(real.sum(1).min())), config.max_position_embeddings
    whole = old + new if end is None else min(old + new, end)
    yield whole > limit, f"{old} prompt tokens and {new} new ones exceed the model's {limit} positions: shorten one"
    masks = int(((ids == config.mask_token_id) & real).sum())
    yield masks > 0 and not infill, f"input_ids has {masks} mask tokens: pass infill=True, or escape special tokens"
    yield not infill and new == 0, "max_new_tokens is 0, so there is nothing to fill: raise it, or pass infill=True"
    for name in ("block_length", "stop_at_eos"):
        wrong = infill and bool(getattr(params, name))
        yield wrong, f"infill=True with {name}, which fills new tokens from left to right only: leave {name} out"

    given, wanted = f"{sample_ids.dtype} {list(sample_ids.shape)}", f"torch.int64 [{len(ids)}]"
    yield given != wanted, f"sample_ids is {given}, wanted {wanted}: pass one id per row"
    unknown = [token for token in params.banned_tokens or [] if not 0 <= token < config.vocab_size]
    yield bool(unknown), f"banned_tokens holds {unknown}, {vocabulary}"
    wrong = (params.stop_at_eos or params.min_new_tokens > 0) and config.eos_token_id is None
    yield wrong, "the model's config has no eos_token_id, which stop_at_eos and min_new_tokens need: set it"
