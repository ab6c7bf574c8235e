"""The JSON of OpenAI's two endpoints, and the rows that it asks for."""

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dream_lightning.batch import Example, Message
from dream_lightning.data.prompt_format import encode_prompt, encode_rendered
from dream_lightning.errors import UserError, check_range
from dream_lightning.locate import Trained
from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.params import resized
from dream_lightning.serving.engine import Engine, Row


class _Strict(BaseModel):
    """Other types and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Strict):
    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    return "".join(_Part.model_validate(p).text for p in content) if isinstance(content, list) else content


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """What both endpoints take: `messages` of a chat, or `prompt`. `sampling` and `stream_canvas` are our own."""

    messages: list[_Message] | None = Field(None, min_length=1)
    prompt: str | list[int] | list[str] | list[list[int]] | None = Field(None, min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    stream_canvas: bool = False
    sampling: dict[str, Any] = {}
    # Without effect; and what is not supported, with the values that ask for nothing.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None

    def model_post_init(self, context: Any) -> None:
        self.seed = random.getrandbits(53) if self.seed is None else self.seed
        self.max_tokens, self.n = self.max_completion_tokens or self.max_tokens, self.n or 1
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            self.prompt = [self.prompt]

    @property
    def answers(self) -> int:
        return self.n * len(self.prompt or [0])

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The sampling of whole blocks for at least `max_tokens`; UserError for what cannot be served."""
        given = {n: x for n in ("temperature", "top_p") if (x := getattr(self, n)) is not None} | self.sampling
        params = resized(defaults, self.max_tokens or defaults.max_new_tokens, given, "sampling")
        for is_wrong, message in (
            (given.keys() & {"compile", "max_new_tokens", "seed"}, "sampling has compile, max_new_tokens or seed"),
            (params.steps > params.max_new_tokens, f"steps is {params.steps}, wanted at most one for each new token"),
            (not params.forbid_mask, "forbid_mask is false, and answers would depend on each other: set it"),
            (params.cache == "prefix", "cache is prefix, which needs rows at the same block: set dual or none"),
            (self.n > 1 and not params.noisy, f"n is {self.n}, and all answers would be equal: set temperature"),
            ("" in self.stop, "stop has an empty text: remove it"),
        ):
            if is_wrong:
                raise UserError(message)
        return params

    def rows(self, owner: Any, params: SamplingParams, engine: Engine, how: Trained, limit: int) -> Iterator[Row]:
        """The rows, all answers to the first prompt first; UserError for a prompt that does not fit into `limit`."""
        options = {"sample_id": self.seed, "stop": self.stop, "watched": self.stream_canvas}
        roles, tokenizer = {"developer": "system"}, engine.tokenizer
        said = tuple(Message(role=roles.get(m.role, m.role), content=m.content) for m in self.messages or ())
        system = None if any(m["role"] == "system" for m in said) else how.system_prompt
        for number, prompt in enumerate(self.prompt or [Example("asked", said, None, "", None, "the request")]):
            if said:
                ids = encode_prompt(prompt, tokenizer, style=how.style, system_prompt=system)
            else:
                ids = prompt if isinstance(prompt, list) else encode_rendered(prompt, tokenizer)
            for token in {*ids, *(params.banned_tokens or [])}:
                check_range("a token id", token, least=0, most=engine.model.config.vocab_size - 1)
            if tokenizer.mask_token_id in ids or not ids:
                raise UserError(f"prompt {number} is empty or has the mask token: wanted at least one other token")
            own = params.for_prompt(len(ids))
            name = "the number of tokens of the prompt and of max_tokens in whole blocks"
            check_range(name, len(ids) + own.max_new_tokens, most=limit)
            for copy in range(self.n):
                size = min(self.max_tokens or own.max_new_tokens, own.max_new_tokens)
                yield Row(owner, number * self.n + copy, ids, own, size, copy=copy, **options)
