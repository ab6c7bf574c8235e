"""An Example in words → a Document in ids: the prompt, and a response that ends with eos and fits.

Prompt and response are tokenised separately and joined, as the authors' trainer does; what they say stands in
`layout.py`. Of 91 s1K rows 13 fit 2,048 tokens, so what happens to the others is a named choice, never a silent cut.
"""

import re
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Document, Example
from dream_lightning.data.prompt_format import Style, encode_prompt, response_text
from dream_lightning.errors import UserError

__all__ = ["Encoded", "Overflow", "Style", "encode", "encode_prompt", "response_text"]

Overflow = Literal["drop", "error", "truncate_trace", "truncate_trace_else_drop", "truncate_right"]


class Encoded(NamedTuple):
    """A document that fits, and how it came to."""

    document: Document | None  # None if dropped
    prompt_length: int
    full_length: int  # of prompt and response before anything was cut or filled
    filled: int = 0  # eos added after the first one


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: Style = "chat",
    system_prompt: str | None = None,
    thinking: bool = True,
    max_length: int | None = None,
    overflow: Overflow = "truncate_trace",
    eos_fill_to: int | None = None,
    extra_weight: dict[str, float] | None = None,
) -> Encoded:
    """Ids of the prompt and of the response with its eos.

    Args:
        example: the record.
        tokenizer: Dream's (`load_tokenizer`) or one like it.
        style: `chat` or `plain`, see the module.
        system_prompt: replaces the record's system turn; None keeps it, or the template's own default.
        thinking: False trains on the answer alone.
        max_length: of prompt and response with eos, in tokens; None is no limit.
        overflow: what happens to a longer document. `truncate_trace` shortens the thinking at its end, keeps
            `</think>`, the answer and eos, and raises where even that is too long; `truncate_trace_else_drop` drops
            those (1 of 91 s1K rows at 2,048 tokens, 30 at 1,024); `truncate_right` cuts what stands last, eos included,
            and so teaches the model not to finish; `drop` drops every longer document; `error` raises.
        eos_fill_to: a shorter response is filled with eos to this many tokens, as far as max_length allows.
        extra_weight: text → loss weight of the response tokens that overlap an occurrence of that text.

    Raises:
        UserError: no response in the record; a document that overflow cannot make fit.
    """
    prompt_ids = encode_prompt(example, tokenizer, style=style, system_prompt=system_prompt)
    text = response_text(example, style=style, thinking=thinking)
    if not text.strip():
        raise UserError(
            f"{example.origin} has no response to train on: name its column in response_column, or use the file for "
            "prediction only"
        )
    response = _Tokens.of(text, tokenizer).and_eos(tokenizer.eos_token_id)
    full_length = len(prompt_ids) + len(response.ids)
    if max_length is not None and full_length > max_length:
        room = max_length - len(prompt_ids)
        if overflow == "drop":
            return Encoded(None, len(prompt_ids), full_length)
        if overflow == "truncate_right":
            response = response.first(room)
        elif overflow != "error" and thinking and example.thinking:
            response = _shorten_trace(response, example, tokenizer, style=style, room=room)
        if overflow == "truncate_trace_else_drop" and len(response.ids) > room:
            return Encoded(None, len(prompt_ids), full_length)
        if not response.ids or len(response.ids) > room:
            raise UserError(_too_long(example, full_length, len(prompt_ids), max_length, overflow))
    filled = 0
    if eos_fill_to is not None and response.ids[-1] == tokenizer.eos_token_id:
        limit = eos_fill_to if max_length is None else min(eos_fill_to, max_length - len(prompt_ids))
        filled = max(limit - len(response.ids), 0)
    weight = _weights(response, extra_weight or {}) + [1.0] * filled
    document = Document(example.id, prompt_ids, response.ids + [tokenizer.eos_token_id] * filled, weight)
    return Encoded(document, len(prompt_ids), full_length, filled)


class _Tokens(NamedTuple):
    """A text, its ids, and the first and last-plus-one character of each."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> "_Tokens":
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return cls(text, encoding["input_ids"], encoding["offset_mapping"])

    def and_eos(self, eos_token_id: int) -> "_Tokens":
        end = len(self.text)
        return _Tokens(self.text, [*self.ids, eos_token_id], [*self.spans, (end, end)])

    def first(self, count: int) -> "_Tokens":
        """The first `count` tokens, or one or two fewer: a character of several tokens stays whole."""
        count = max(count, 0)
        while 0 < count < len(self.ids) and self.spans[count - 1][1] > self.spans[count][0]:
            count -= 1
        end = self.spans[count - 1][1] if count else 0
        return _Tokens(self.text[:end], self.ids[:count], self.spans[:count])

    def then(self, other: "_Tokens") -> "_Tokens":
        moved = [(first + len(self.text), last + len(self.text)) for first, last in other.spans]
        return _Tokens(self.text + other.text, self.ids + other.ids, self.spans + moved)


def _shorten_trace(
    response: _Tokens, example: Example, tokenizer: PreTrainedTokenizerBase, *, style: Style, room: int
) -> _Tokens:
    """The beginning of the thinking, and whole what follows it; longer than `room` only if no thinking is left.

    What follows is tokenised by itself, so at the seam the ids can differ from those of the joined text; the text does
    not. Tokenising the joined text anew until it fits cost three times as much.
    """
    head = "<think>\n" if style == "chat" else ""
    tail = response.text[len(head) + len(example.thinking or "") :]
    after = _Tokens.of(tail, tokenizer).and_eos(tokenizer.eos_token_id)
    opening = _Tokens.of(head, tokenizer)
    kept = response.first(room - len(after.ids))
    return (kept if len(kept.text) >= len(head) else opening).then(after)


def _weights(response: _Tokens, extra_weight: dict[str, float]) -> list[float]:
    """Loss weight of every response token; where two texts overlap, the later one in the dict counts."""
    weight = [1.0] * len(response.ids)
    for part, value in extra_weight.items():
        for found in re.finditer(re.escape(part), response.text):
            for i, (first, last) in enumerate(response.spans):
                if first < found.end() and last > found.start():
                    weight[i] = value
    return weight


def _too_long(example: Example, full: int, prompt: int, max_length: int, overflow: Overflow) -> str:
    got = f"{example.origin} has {full:,} tokens ({prompt:,} of them the prompt), max_length is {max_length:,}"
    if overflow == "error":
        return f"{got}: set overflow to truncate_trace or drop, or raise max_length"
    if overflow == "truncate_right":
        return f"{got}: the prompt alone leaves no room for a response; set overflow to drop, or raise max_length"
    remedy = "set overflow to truncate_trace_else_drop or drop, or raise max_length"
    return f"{got}: it does not fit even without its thinking; {remedy}"
