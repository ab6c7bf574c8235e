"""The knobs of generation, checked."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dream_lightning.errors import UserError

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
CacheMode = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class SamplingParams:
    """How to fill masks. Up to `eps` names and meaning are as in the authors' `diffusion_generate`, the rest is ours.

    Good settings for reasoning: `entropy`, temperature 0 … 0.2, one step for every one or two new tokens. What the
    faster ways promise and cost: docs/sampling.md.

    Raises:
        UserError: a field is out of its range, or makes no sense beside another.
    """

    max_new_tokens: int = 256
    """Masks appended to the prompt. 0 is for pure infilling."""
    steps: int = 256
    """Denoising steps. A step fills about max_new_tokens / steps positions and costs at most one forward. With
    `tokens_per_step`, `threshold` or `factor` it is the most steps that there may be: the last one (of a block) fills
    what is left, and steps that are not needed cost nothing."""
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
    """All noise is a function of (seed, sample id, number of the returned sequence, step, position)."""
    forbid_mask: bool = False
    """Never predict the mask token. The authors allow it; then a position may stay masked to the end, and at
    temperature 0 such a row disturbs the other rows of its batch (see `sampler.reverse_process`). True makes every
    answer free of masks and independent of its batch whatever the model predicts."""

    block_length: int | None = None
    """Fill the new tokens in blocks of this many from left to right; the steps are shared out over the blocks."""
    tokens_per_step: int | None = None
    """Fill this many of the most confident positions at every step, instead of the authors' schedule."""
    threshold: float | None = None
    """Fill all positions whose certainty is at least this, at least one a step. Certainty lies in [0, 1]: the
    probability (`maskgit_plus`), the lead over the second (`topk_margin`), 1 / perplexity (`entropy`).
    Fast-dLLM (arXiv:2505.22618) uses 0.9 with `maskgit_plus`."""
    factor: float | None = None
    """Fill the n most certain positions, n the largest for which (n + 1)(1 − certainty of the n-th) is below this, at
    least one a step (Fast-dLLM's factor rule): the more are filled together, the surer each has to be."""
    cache: CacheMode = "none"
    """Keys and values kept from step to step: none; of everything left of the block (`prefix`), so that the block and
    what follows it are computed; or of everything outside the block (`dual`), so that only the block is."""
    refresh_every: int | None = None
    """Compute everything again every so many steps of a block, and at its start; None: at its start only. 1 keeps
    nothing, and gives exactly what `none` gives."""
    stop_at_eos: bool = False
    """Leave a row alone once all positions left of its first eos are filled: the text up to there is as without it.
    The masks behind are filled with eos, unpredicted."""
    compile: bool = False
    """Run the network as compiled CUDA graphs: faster after a slow first call of every shape. CUDA only."""
    banned_tokens: list[int] | None = None
    """Ids never to predict."""
    required_tokens: list[int] | None = None
    """Ids that must occur: at the start each takes the free position where the model finds it most probable, for one
    more forward. No eos is predicted left of them."""
    min_new_tokens: int = 0
    """No eos among so many first new tokens: against empty answers."""
    eos_penalty: float = 0.0
    """Subtracted from the logit of eos everywhere; makes answers longer, negative ones shorter."""
    forced_prefix: list[int] | None = None
    """Ids with which the answer begins; they are part of max_new_tokens."""
    forced_suffix: list[int] | None = None
    """Ids with which the answer ends, at its very last positions; they are part of max_new_tokens."""

    def __post_init__(self) -> None:
        if self.alg not in get_args(Algorithm):
            raise UserError(f"alg is {self.alg!r}: choose one of {', '.join(get_args(Algorithm))}")
        _check_integer("max_new_tokens", self.max_new_tokens, 0)
        _check_integer("steps", self.steps, 1)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, "; None keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, it must lie in (0, 1]: None or 1 keeps every token")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}, it must be finite and at least 0: 0 takes the argmax")
        if self.alg_temp is not None and not (self.alg_temp >= 0 and math.isfinite(self.alg_temp)):
            raise UserError(f"alg_temp is {self.alg_temp}, it must be finite and at least 0: None turns it off")
        if not 0 < self.eps < 1:
            raise UserError(f"eps is {self.eps}, it must lie in (0, 1): the authors use 1e-3")
        _check_integer("seed", self.seed)
        for name in ("forbid_mask", "stop_at_eos", "compile"):
            if not isinstance(getattr(self, name), bool):  # the text "False" would count as true
                raise UserError(f"{name} is {getattr(self, name)!r}, it must be true or false")
        for name in ("banned_tokens", "required_tokens", "forced_prefix", "forced_suffix"):
            ids = getattr(self, name)
            if ids is not None and not (isinstance(ids, list | tuple) and all(map(_is_integer, ids))):
                raise UserError(f"{name} is {ids!r}, it must be a list of token ids")

        self._check_blocks()
        self._check_parallel()
        self._check_control()

    @property
    def blocks(self) -> int:
        """How many blocks the new tokens make; 1 without `block_length`."""
        return 1 if self.block_length is None else self.max_new_tokens // self.block_length

    @property
    def adaptive(self) -> bool:
        """Whether the positions to fill at a step are not counted by the authors' schedule."""
        return not (self.tokens_per_step is None and self.threshold is None and self.factor is None)

    def _check_blocks(self) -> None:
        if self.cache not in get_args(CacheMode):
            raise UserError(f"cache is {self.cache!r}: choose one of {', '.join(get_args(CacheMode))}")
        if self.refresh_every is not None:
            _check_integer("refresh_every", self.refresh_every, 1, "; None refreshes at the start of a block only")
            if self.cache == "none":
                raise UserError(f"refresh_every is {self.refresh_every} without a cache: set cache to prefix or dual")
        if self.block_length is None:
            if self.cache != "none":
                raise UserError(
                    f"cache is {self.cache!r} without blocks: set block_length, such as 32; keys and values are kept "
                    "for what lies outside the block at work"
                )
            return
        _check_integer("block_length", self.block_length, 1)
        if not self.max_new_tokens or self.max_new_tokens % self.block_length:
            raise UserError(
                f"block_length is {self.block_length} and max_new_tokens {self.max_new_tokens}: wanted whole blocks, "
                "make the one a multiple of the other"
            )
        if self.steps % self.blocks:
            raise UserError(
                f"steps is {self.steps} for {self.blocks} blocks: wanted the same number for each, a multiple of "
                f"{self.blocks}"
            )
        if self.steps > self.max_new_tokens:
            raise UserError(
                f"steps is {self.steps} for {self.max_new_tokens} new tokens in blocks: a step fills at least one, so "
                f"set steps to {self.max_new_tokens} or less"
            )
        self._needs_forbid_mask("block_length")

    def _check_parallel(self) -> None:
        chosen = [n for n in ("tokens_per_step", "threshold", "factor") if getattr(self, n) is not None]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are set: they are ways to choose how many, set one of them")
        for name in chosen:
            if self.alg == "origin":
                raise UserError(f"{name} is set and alg is 'origin', whose order is random: choose another alg")
            self._needs_forbid_mask(name)
        if self.tokens_per_step is not None:
            _check_integer("tokens_per_step", self.tokens_per_step, 1)
            length = self.block_length or self.max_new_tokens
            if self.tokens_per_step * (self.steps // self.blocks) < length:
                raise UserError(
                    f"tokens_per_step is {self.tokens_per_step} and steps {self.steps}: the last step would have to "
                    f"fill more, set steps to at least {-(-length // self.tokens_per_step) * self.blocks}"
                )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}, it must lie in (0, 1]: 0.9 is usual")
        if self.factor is not None and not (self.factor > 0 and math.isfinite(self.factor)):
            raise UserError(f"factor is {self.factor}, it must be finite and above 0: 1.0 is usual")
        if self.alg_temp and (self.threshold is not None or self.factor is not None):
            raise UserError(
                f"alg_temp is {self.alg_temp}, but threshold and factor fill the most certain positions, not drawn "
                "ones: set alg_temp to None, or use tokens_per_step"
            )

    def _check_control(self) -> None:
        if self.compile:
            self._needs_forbid_mask("compile")
        if self.stop_at_eos:
            self._needs_forbid_mask("stop_at_eos")
            if self.forced_suffix:
                raise UserError("stop_at_eos would end the answer before forced_suffix: leave one of them out")
        _check_integer("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}, max_new_tokens only {self.max_new_tokens}")
        if not math.isfinite(self.eos_penalty):
            raise UserError(f"eos_penalty is {self.eos_penalty}, it must be finite: min_new_tokens forbids eos")
        forced = len(self.forced_prefix or []) + len(self.forced_suffix or [])
        required = len(self.required_tokens or [])
        if forced and forced >= self.max_new_tokens > 0:
            raise UserError(
                f"forced_prefix and forced_suffix are {forced} of {self.max_new_tokens} new tokens, which leaves "
                "nothing to fill: raise max_new_tokens"
            )
        if required > self.max_new_tokens - forced and self.max_new_tokens > 0:
            raise UserError(
                f"required_tokens are {required}, but only {self.max_new_tokens - forced} positions are free: raise "
                "max_new_tokens"
            )
        if both := set(self.required_tokens or []) & set(self.banned_tokens or []):
            raise UserError(f"required_tokens and banned_tokens both hold {sorted(both)}: take them out of one")

    def _needs_forbid_mask(self, name: str) -> None:
        if not self.forbid_mask:
            raise UserError(
                f"{name} is set and forbid_mask is False: set it to True, because it counts on every chosen position "
                "being filled, and a model that predicts the mask token would leave some unfilled"
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: int, minimum: int | None = None, remedy: str = "") -> None:
    if not _is_integer(value) or (minimum is not None and value < minimum):
        least = "" if minimum is None else f" of at least {minimum}"
        raise UserError(f"{name} is {value!r}, it must be an integer{least}{remedy}")
