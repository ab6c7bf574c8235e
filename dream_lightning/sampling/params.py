"""What goes into generation, checked: the knobs and the prompts."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True)
class SamplingParams:
    """How to fill masks; names and meaning as in the authors' `diffusion_generate`, `seed` and `forbid_mask` are ours.

    Good settings for reasoning: `entropy`, temperature 0 … 0.2, one step for every one or two new tokens.

    Raises:
        ValueError: a field is out of its range.
    """

    max_new_tokens: int = 256
    """Masks appended to the prompt. 0 is for pure infilling."""
    steps: int = 256
    """Denoising steps. A step fills about max_new_tokens / steps positions and costs at most one forward."""
    alg: Algorithm = "entropy"
    """Which masked positions are filled first: random ones (`origin`), or the most confident by the probability of
    the chosen token (`maskgit_plus`), the lead of the best token over the second (`topk_margin`), or the negative
    entropy (`entropy`)."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0 tokens are drawn from softmax(logits / temperature)."""
    top_p: float | None = None
    """Keep the fewest most probable tokens whose probabilities sum to more than this. None or 1 keeps all."""
    top_k: int | None = None
    """Keep the k most probable tokens, and any that tie with the last of them. None takes the checkpoint's default as
    the authors' code does, `top_k` in its config.json; the official 7B folders have none, and then all are kept."""
    alg_temp: float | None = None
    """Above 0, positions are drawn from softmax(confidence / alg_temp) instead of taken from the top. None or 0: off.
    Without meaning for `origin`, whose order is random anyway."""
    eps: float = 1e-3
    """The time at which the process ends: t goes from 1 to eps in equal steps."""
    seed: int = 0
    """All noise is a function of (seed, sample id, step, position)."""
    forbid_mask: bool = False
    """Never predict the mask token. The authors allow it; then a position may stay masked to the end, and at
    temperature 0 such a row disturbs the other rows of its batch (see `sampler.reverse_process`). True makes every
    answer free of masks and independent of its batch whatever the model predicts."""

    def __post_init__(self) -> None:
        if self.alg not in get_args(Algorithm):
            raise ValueError(f"alg is {self.alg!r}: choose one of {', '.join(get_args(Algorithm))}")
        _check_integer("max_new_tokens", self.max_new_tokens, 0)
        _check_integer("steps", self.steps, 1)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, "; None keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, it must lie in (0, 1]: None or 1 keeps every token")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}, it must be finite and at least 0: 0 takes the argmax")
        if self.alg_temp is not None and not (self.alg_temp >= 0 and math.isfinite(self.alg_temp)):
            raise ValueError(f"alg_temp is {self.alg_temp}, it must be finite and at least 0: None turns it off")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps}, it must lie in (0, 1): the authors use 1e-3")


def _check_integer(name: str, value: int, minimum: int, remedy: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}, it must be an integer of at least {minimum}{remedy}")


@dataclass(frozen=True)
class Canvas:
    """Prompts with room for their answers; L = P + N."""

    x: Tensor  # [B, L] int64, the state at t = 1
    real: Tensor  # [B, L] bool, False = left padding
    positions: Tensor  # [B, L] int64, counted from the row's first real token; padding has position 1
    sample_ids: Tensor  # [B] int64, keys of the noise
    padded: bool  # whether `real` has a False: without one, attention needs no mask


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
        ValueError: a shape or dtype is wrong, an id is outside the vocabulary, padding is not on the left, a row has
            no real token or is padded with masks, prompt and answer are longer than the model's context, the prompt
            contains masks without `infill`, or there is nothing to fill.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, wanted [B, P] with at least one row and token")
    if input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids is {input_ids.dtype}, wanted torch.int64: pass token ids, input_ids.long()")
    if not infill and params.max_new_tokens == 0:
        raise ValueError("max_new_tokens is 0, so there is nothing to fill: raise it, or pass infill=True")
    batch, length = input_ids.shape[0], input_ids.shape[1] + params.max_new_tokens
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{input_ids.shape[1]} prompt tokens and {params.max_new_tokens} new ones are {length}, the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings): shorten one of them"
        )
    low, high = input_ids.aminmax()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids holds ids from {int(low)} to {int(high)}, the vocabulary is 0 … {config.vocab_size - 1}: "
            "was another tokenizer used?"
        )
    prompt_is_real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        prompt_is_real = _left_padding(attention_mask, input_ids)
    if not infill and (masks := (input_ids == config.mask_token_id).sum()):
        raise ValueError(
            f"input_ids contains the mask token {config.mask_token_id} {int(masks)} times: pass infill=True to fill "
            "these positions too, or escape special tokens in the prompt's text"
        )
    if ((input_ids == config.mask_token_id) & ~prompt_is_real).any():
        raise ValueError("input_ids is padded with the mask token: pad with another one, such as the pad token")
    if sample_ids is None:
        sample_ids = torch.arange(batch)
    if sample_ids.shape != (batch,) or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}, wanted torch.int64 [{batch}]: one id per row"
        )
    real = F.pad(prompt_is_real, (0, params.max_new_tokens), value=True)  # [B, L]
    return Canvas(
        x=F.pad(input_ids, (0, params.max_new_tokens), value=config.mask_token_id),
        real=real,
        positions=(real.long().cumsum(-1) - 1).masked_fill(~real, 1),
        sample_ids=sample_ids.to(input_ids.device),
        padded=not bool(real.all()),
    )


def _left_padding(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask as bool [B, P], or an error that says what is wrong with it."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, wanted that of input_ids, "
            f"{list(input_ids.shape)}: the new positions are added here"
        )
    real = attention_mask.to(input_ids.device).bool()
    if (attention_mask != attention_mask.bool()).any():
        raise ValueError("attention_mask has values other than 0 and 1: pass 1 for real tokens and 0 for padding")
    if (empty := ~real.any(-1)).any():
        raise ValueError(f"row {int(empty.nonzero()[0])} of attention_mask has no real token: drop the row")
    if (broken := (real[:, 1:] < real[:, :-1]).any(-1)).any():
        raise ValueError(
            f"row {int(broken.nonzero()[0])} of attention_mask has a 0 after a 1: the answer follows the last column, "
            'so pad on the left (tokenizer.padding_side = "left") and leave no holes'
        )
    return real
