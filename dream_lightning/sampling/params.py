"""Options of generation."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import nextafter
from typing import Any, Literal, get_args

from dream_lightning.errors import GuessKeywords, UserError, check_range

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
_MAX = 1e38  # of float32
CacheMode = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class SamplingParams(metaclass=GuessKeywords):
    """How to fill masks. Up to `eps`, names and meaning are those of the authors' `diffusion_generate`.

    For reasoning use `entropy`, temperature 0 … 0.2, and one step for every one or two new tokens. docs/sampling.md
    explains rules, blocks and caches, and what faster settings cost.

    Raises:
        UserError: a field is out of its range, or excludes another one.
    """

    max_new_tokens: int = 256
    """Masks appended to the prompt. 0 is for pure infilling."""
    max_length: int | None = None
    """End the row here, prompt included, or after max_new_tokens, whichever comes first. For a model trained on rows
    filled with eos to one length: where the masks end tells it how long an answer may be."""
    steps: int = 256
    """Denoising steps, at most one forward each. The authors' schedule fills about max_new_tokens / steps positions a
    step; with another rule this is the maximum, and the last step (of a block) fills what is left."""
    alg: Algorithm = "entropy"
    """Which masks are filled first: random ones (`origin`), or the most confident by the token's probability
    (`maskgit_plus`), its lead over the second (`topk_margin`) or negative entropy."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_p: float | None = None
    """Keep the fewest most probable tokens whose probabilities sum to more than this. None or 1 keeps all."""
    top_k: int | None = None
    """Keep the k most probable tokens, and ties with the last. None keeps all, as the authors' eval.py, unless the
    checkpoint's config.json has a `top_k`. The authors' demo scripts use 50."""
    alg_temp: float | None = None
    """Above 0, positions are drawn from softmax(confidence / alg_temp), except with `origin`."""
    eps: float = 1e-3
    """The time at which the process ends: t goes from 1 to eps in equal steps."""
    seed: int = 0
    """All noise is a function of (seed, sample id, number of the returned sequence, step, position)."""
    forbid_mask: bool = False
    """Never predict the mask token: answers have no masks and do not depend on the batch. The authors allow it."""

    block_length: int | None = None
    """Fill the new tokens in blocks of this many from left to right. Each block gets the same number of steps."""
    tokens_per_step: int | None = None
    """Fill this many of the most confident positions at every step, instead of the authors' schedule."""
    threshold: float | None = None
    """Fill all positions with at least this certainty, at least one a step: probability (`maskgit_plus`), lead
    (`topk_margin`) or 1 / perplexity (`entropy`). Fast-dLLM (arXiv:2505.22618) uses 0.9 with `maskgit_plus`."""
    fast_dllm_threshold: float | None = None
    """As `threshold`, but exactly as Fast-dLLM's code with a KV cache: the first step of every block fills its first
    token alone, however certain, and the column before the block is not computed again."""
    factor: float | None = None
    """Fill the n most certain positions, the largest n with (n + 1)(1 − certainty of the n-th) < factor (Fast-dLLM)."""
    cache: CacheMode = "none"
    """KV cache of everything left of the block (`prefix`) or everything outside it (`dual`)."""
    refresh_every: int | None = None
    """Recompute the whole KV cache every this many steps of a block, not only at its start. 1 equals `cache: none`."""
    stop_at_eos: bool = False
    """Finish a row once all positions left of its first eos are filled; the remaining masks become eos."""
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
                raise UserError(f"{name} is {value!r:.80}, it must be {allowed}")
        for is_wrong, message in self._conflicts():
            if is_wrong:
                raise UserError(message)

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
        return [
            n for n in ("tokens_per_step", "threshold", "fast_dllm_threshold", "factor") if getattr(self, n) is not None
        ]

    def room(self, prompt_length: int) -> int:
        """New tokens of a row; none or less if its prompt is too long for `max_length`."""
        new = self.max_new_tokens
        return new if self.max_length is None else min(new, self.max_length - prompt_length)

    def longest_prompt(self, positions: int) -> int:
        """Tokens of a prompt after which a model with so many positions has room for the new ones."""
        is_bound = self.max_length is not None and self.max_length <= positions
        return self.max_length - 1 if is_bound else positions - self.max_new_tokens

    def for_prompt(self, prompt_length: int) -> "SamplingParams":
        """The same for a row alone, with its own number of new tokens.

        Raises UserError for a prompt that leaves no room, and for blocks, which a row alone has whole.
        """
        if self.max_length is None:
            return self
        check_range(f"max_length, for a prompt of {prompt_length} tokens,", self.max_length, least=prompt_length + 1)
        if self.block_length is not None:
            raise UserError(
                f"block_length is {self.block_length} and max_length {self.max_length}, which may end inside of a "
                "block: set one of them to null"
            )
        new = self.room(prompt_length)
        return replace(self, max_new_tokens=new, max_length=None, min_new_tokens=min(new, self.min_new_tokens))

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        """Whether options exclude each other, and the error; later checks rely on earlier ones."""
        length, new, steps, rules = self.block_length, self.max_new_tokens, self.steps, self.rules
        cached, refresh = self.cache != "none", self.refresh_every
        yield cached and length is None, f"cache is {self.cache!r} without blocks: set block_length, such as 32"
        theirs = self.fast_dllm_threshold is not None and not cached
        yield theirs, "fast_dllm_threshold is set without a KV cache, where it is threshold: set cache, or threshold"
        yield bool(refresh) and not cached, f"refresh_every is {refresh} without a cache: set cache to prefix or dual"
        misfits = length is not None and (new == 0 or new % length > 0)
        yield misfits, f"block_length is {length} and max_new_tokens {new}: set a multiple of block_length"
        blocks = self.blocks
        yield steps % blocks > 0, f"steps is {steps} for {blocks} blocks: set a multiple of {blocks}"
        for name in [n for n in ("block_length", *rules, "stop_at_eos", "compile") if getattr(self, n)]:
            yield not self.forbid_mask, f"{name} is set and forbid_mask is False: set it, so that all masks are filled"
        yield len(rules) > 1, f"{' and '.join(rules)} are set: each decides how many positions are filled, set one"
        for rule in rules:
            yield self.alg == "origin", f"{rule} is set and alg is 'origin', whose order is random: choose another alg"
            unused = bool(self.alg_temp) and rule != "tokens_per_step"
            yield unused, f"alg_temp is {self.alg_temp}, but {rule} draws no positions: set alg_temp to None"
        if self.tokens_per_step is not None:
            needed = -(-(length or new) // self.tokens_per_step) * blocks
            yield steps < needed, f"tokens_per_step is {self.tokens_per_step} and steps {steps}: set at least {needed}"
        yield self.min_new_tokens > new, f"min_new_tokens is {self.min_new_tokens}, max_new_tokens only {new}"


def with_fields(params: SamplingParams, given: dict[str, Any], where: str) -> SamplingParams:
    """The same with the `given` fields; UserError, naming `where` they are, if one is unknown."""
    known = sorted(field.name for field in fields(SamplingParams))
    if unknown := sorted(given.keys() - {*known}):
        raise UserError(f"{where} has {', '.join(unknown)}, wanted fields of SamplingParams: {', '.join(known)}")
    return replace(params, **given)


def resized(params: SamplingParams, size: int, given: dict[str, Any], where: str) -> SamplingParams:
    """For at least `size` new tokens, in whole blocks, with as many steps for each; then `with_fields`."""
    length = given.get("block_length", params.block_length)
    check_range("block_length", length, least=1, whole=True)
    length = length or size
    blocks = -(-size // length)
    steps = blocks * -(-length * params.steps // params.max_new_tokens)
    return with_fields(params, {"max_new_tokens": blocks * length, "steps": steps} | given, where)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _integer(minimum: int) -> tuple:
    return (lambda value: _is_integer(value) and value >= minimum), f"an integer of at least {minimum}"


def _number(above: float, most: float, words: str) -> tuple:
    return (lambda value: isinstance(value, int | float) and above < value <= most), words


def _one_of(*choices: Any) -> tuple:
    return (lambda value: value in choices), f"one of {', '.join(map(str, choices))}"


_ALLOWED = {  # option → which values other than None, as a function and in words
    **dict.fromkeys(("steps", "top_k", "max_length", "block_length", "tokens_per_step", "refresh_every"), _integer(1)),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens"), _integer(0)),
    **dict.fromkeys(("forbid_mask", "stop_at_eos", "compile"), _one_of(True, False)),  # the text "False" is true
    **dict.fromkeys(("temperature", "alg_temp"), _number(nextafter(0, -1), _MAX, "finite and at least 0")),
    **dict.fromkeys(("top_p", "threshold", "fast_dllm_threshold"), _number(0, 1, "in (0, 1]")),
    "alg": _one_of(*get_args(Algorithm)),
    "cache": _one_of(*get_args(CacheMode)),
    "eps": _number(0, nextafter(1, 0), "in (0, 1): the authors use 1e-3"),
    "factor": _number(0, _MAX, "finite and above 0: 1.0 is usual"),
    "seed": (_is_integer, "an integer"),
    "banned_tokens": (lambda ids: isinstance(ids, list | tuple) and all(map(_is_integer, ids)), "a list of token ids"),
}
