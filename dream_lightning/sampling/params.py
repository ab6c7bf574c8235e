"""Options of generation."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

from dream_lightning.errors import UserError

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
CacheMode = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class SamplingParams:
    """How to fill masks. Up to `eps`, names and meaning are those of the authors' `diffusion_generate`.

    For reasoning use `entropy`, temperature 0 … 0.2, and one step for every one or two new tokens. For faster settings
    and what they cost see docs/sampling.md.

    Raises:
        UserError: a field is out of its range, or excludes another one.
    """

    max_new_tokens: int = 256
    """Masks appended to the prompt. 0 is for pure infilling."""
    steps: int = 256
    """Denoising steps, at most one forward each. The authors' schedule fills about max_new_tokens / steps positions a
    step. With any other rule this is the maximum: the last step (of a block) fills all remaining masks, and steps that
    are not needed cost nothing."""
    alg: Algorithm = "entropy"
    """Which masked positions are filled first: random ones (`origin`), or the most confident by the probability of
    the chosen token (`maskgit_plus`), by its lead over the second (`topk_margin`), or by negative entropy."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_p: float | None = None
    """Keep the fewest most probable tokens whose probabilities sum to more than this. None or 1 keeps all."""
    top_k: int | None = None
    """Keep the k most probable tokens, and ties with the last of them. None takes `top_k` from the checkpoint's
    config.json, as the authors' code does; the official 7B folders have none, and all tokens are kept."""
    alg_temp: float | None = None
    """Above 0, positions are drawn from softmax(confidence / alg_temp), except with `origin`. None or 0: the most
    confident are taken."""
    eps: float = 1e-3
    """The time at which the process ends: t goes from 1 to eps in equal steps."""
    seed: int = 0
    """All noise is a function of (seed, sample id, number of the returned sequence, step, position)."""
    forbid_mask: bool = False
    """Never predict the mask token. The authors allow it: then a position may remain masked, and at temperature 0 the
    row changes the other rows of its batch. True makes answers free of masks and independent of the batch."""

    block_length: int | None = None
    """Fill the new tokens in blocks of this many from left to right. Each block gets the same number of steps."""
    tokens_per_step: int | None = None
    """Fill this many of the most confident positions at every step, instead of the authors' schedule."""
    threshold: float | None = None
    """Fill all positions whose certainty is at least this, at least one a step. Certainty is in [0, 1]: the
    probability (`maskgit_plus`), the lead over the second (`topk_margin`), or 1 / perplexity (`entropy`).
    Fast-dLLM (arXiv:2505.22618) uses 0.9 with `maskgit_plus`."""
    factor: float | None = None
    """Fill the n most certain positions, with the largest n for which (n + 1)(1 − certainty of the n-th) is below
    this, at least one a step (the factor rule of Fast-dLLM)."""
    cache: CacheMode = "none"
    """KV cache: none; of everything left of the block (`prefix`), so that a step computes the block and what follows
    it; or of everything outside the block (`dual`), so that a step computes the block only."""
    refresh_every: int | None = None
    """Recompute the whole KV cache at the start of a block and then every this many steps. None: at the start only.
    1 gives exactly what `cache: none` gives."""
    stop_at_eos: bool = False
    """Stop working on a row once all positions left of its first eos are filled. The text up to there does not change;
    the remaining masks become eos without a prediction."""
    compile: bool = False
    """Run the network as compiled CUDA graphs: faster after a slow first call of every shape. CUDA only."""
    banned_tokens: list[int] | None = None
    """Ids that are never predicted."""
    min_new_tokens: int = 0
    """No eos among this many first new tokens. Prevents empty answers."""

    def __post_init__(self) -> None:
        for name, (is_allowed, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if not (is_allowed(value) if value is not None else getattr(type(self), name) is None):
                raise UserError(f"{name} is {value!r}, it must be {allowed}")
        self._check_blocks()
        self._check_rules()

    @property
    def blocks(self) -> int:
        """The number of blocks; 1 without `block_length`."""
        return 1 if self.block_length is None else self.max_new_tokens // self.block_length

    @property
    def noisy(self) -> bool:
        """Whether tokens or their order are drawn at random."""
        return self.temperature > 0 or bool(self.alg_temp) or self.alg == "origin"

    @property
    def rules(self) -> list[str]:
        """The options that decide how many positions are filled, instead of the authors' schedule."""
        return [n for n in ("tokens_per_step", "threshold", "factor") if getattr(self, n) is not None]

    def _check_blocks(self) -> None:
        length, new = self.block_length, self.max_new_tokens
        if self.cache != "none" and length is None:
            raise UserError(f"cache is {self.cache!r} without blocks: set block_length, such as 32")
        if self.refresh_every is not None and self.cache == "none":
            raise UserError(f"refresh_every is {self.refresh_every} without a cache: set cache to prefix or dual")
        if length is not None and (not new or new % length):
            raise UserError(f"block_length is {length} and max_new_tokens {new}: set a multiple of block_length")
        if self.steps % self.blocks:
            raise UserError(f"steps is {self.steps} for {self.blocks} blocks: set a multiple of {self.blocks}")

    def _check_rules(self) -> None:
        for name in ("block_length", *self.rules, "stop_at_eos", "compile"):
            if getattr(self, name) and not self.forbid_mask:
                raise UserError(
                    f"{name} is set and forbid_mask is False: set forbid_mask to True, so that masks get filled"
                )
        if len(self.rules) > 1:
            raise UserError(f"{' and '.join(self.rules)} are set: each decides how many positions are filled, set one")
        if self.rules and self.alg == "origin":
            raise UserError(f"{self.rules[0]} is set and alg is 'origin', whose order is random: choose another alg")
        if self.alg_temp and self.rules in (["threshold"], ["factor"]):
            raise UserError(
                f"alg_temp is {self.alg_temp}, but {self.rules[0]} draws no positions: set alg_temp to None"
            )
        if self.tokens_per_step is not None:
            needed = -(-(self.block_length or self.max_new_tokens) // self.tokens_per_step) * self.blocks
            if self.steps < needed:
                raise UserError(
                    f"tokens_per_step is {self.tokens_per_step} and steps {self.steps}: the last step would have to "
                    f"fill more, set steps to at least {needed}"
                )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}, max_new_tokens only {self.max_new_tokens}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(minimum: int) -> tuple:
    return (lambda value: _is_integer(value) and value >= minimum), f"an integer of at least {minimum}"


def _one_of(*choices: Any) -> tuple:
    return (lambda value: value in choices), f"one of {', '.join(map(str, choices))}"


_ALLOWED = {  # option → which values other than None, as a function and in words
    **dict.fromkeys(("steps", "top_k", "block_length", "tokens_per_step", "refresh_every"), _integer(1)),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens"), _integer(0)),
    **dict.fromkeys(("forbid_mask", "stop_at_eos", "compile"), _one_of(True, False)),  # the text "False" is true
    **dict.fromkeys(("temperature", "alg_temp"), ((lambda value: 0 <= value < inf), "finite and at least 0")),
    **dict.fromkeys(("top_p", "threshold"), ((lambda value: 0 < value <= 1), "in (0, 1]")),
    "alg": _one_of(*get_args(Algorithm)),
    "cache": _one_of(*get_args(CacheMode)),
    "eps": ((lambda value: 0 < value < 1), "in (0, 1): the authors use 1e-3"),
    "factor": ((lambda value: 0 < value < inf), "finite and above 0: 1.0 is usual"),
    "seed": (_is_integer, "an integer"),
    "banned_tokens": (
        (lambda ids: isinstance(ids, list | tuple) and all(map(_is_integer, ids))),
        "a list of token ids",
    ),
}
