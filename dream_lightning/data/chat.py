"""An Example in words → a Document in ids: the prompt, and a response that ends with eos and fits.

Prompt and response are tokenised separately and joined, as the authors' trainer does; what they say stands in
`layout.py`. Of 91 s1K rows 13 fit 2,048 tokens, so what happens to the others is a named choice, never a silent cut.
"""

from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from dream_lightning.data.layout import Style, encode_prompt, plain_ids, response_text
from dream_lightning.types import Document, Example

__all__ = ["Encoded", "Overflow", "Style", "encode", "encode_prompt", "response_text"]

Overflow = Literal["drop", "error", "truncate_trace", "truncate_trace_else_drop", "truncate_right"]


class Encoded(NamedTuple):
    """A document that fits, or None for a dropped one, and the length before anything was cut or filled."""

    document: Document | None
    full_length: int


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
        overflow: what happens to a longer document. `truncate_trace` shortens the thinking at its end and keeps
            `</think>`, the answer and eos, and raises where that is not enough; `truncate_trace_else_drop` drops those
            (1 of 91 s1K rows at 2,048 tokens, 30 at 1,024); `truncate_right` cuts whatever stands last, eos included, and so teaches the
            model not to finish; `drop` gives None for every longer document; `error` raises.
        eos_fill_to: a shorter response is filled with eos to this many tokens, as far as max_length allows.
        extra_weight: text → loss weight of the response tokens that overlap an occurrence of that text.

    Raises:
        ValueError: no response in the record; a document that overflow cannot make fit.
    """
    eos = tokenizer.eos_token_id
    prompt_ids = encode_prompt(example, tokenizer, style=style, system_prompt=system_prompt)
    text = response_text(example, style=style, thinking=thinking)
    if not text.strip():
        raise ValueError(
            f"{example.origin} has no response to train on: name its column in response_column, or use the file for "
            "prediction only"
        )
    response_ids = [*plain_ids(text, tokenizer), eos]
    full_length = len(prompt_ids) + len(response_ids)
    if max_length is not None and full_length > max_length:
        room = max_length - len(prompt_ids)
        if overflow == "drop":
            return Encoded(None, full_length)
        if overflow in ("truncate_trace", "truncate_trace_else_drop") and thinking and example.thinking:
            text = _shorten_trace(example, tokenizer, style=style, room=room - 1)
            response_ids = [*plain_ids(text, tokenizer), eos] if text else response_ids
        elif overflow == "truncate_right":
            response_ids = response_ids[: max(room, 0)]
        if overflow == "truncate_trace_else_drop" and len(response_ids) > room:
            return Encoded(None, full_length)
        if not response_ids or len(response_ids) > room:
            raise ValueError(_too_long(example, full_length, len(prompt_ids), max_length, overflow))
    weight = _weights(text, response_ids, tokenizer, extra_weight or {})
    if eos_fill_to is not None and response_ids[-1] == eos:
        limit = eos_fill_to if max_length is None else min(eos_fill_to, max_length - len(prompt_ids))
        fill = max(limit - len(response_ids), 0)
        response_ids, weight = response_ids + [eos] * fill, weight + [1.0] * fill
    return Encoded(Document(example.id, prompt_ids, response_ids, weight), full_length)


def _shorten_trace(example: Example, tokenizer: PreTrainedTokenizerBase, *, style: Style, room: int) -> str:
    """The response with the longest beginning of its thinking that fits `room` tokens; "" if none does.

    The cut text is tokenised anew, so its ids are those of a text; merges across the cut can cost a token or two,
    which the next round takes off.
    """
    whole = response_text(example, style=style)
    head = len("<think>\n") if style == "chat" else 0
    tail = whole[head + len(example.thinking or "") :]
    spans = _spans(whole, tokenizer)
    kept, excess = sum(start < len(whole) - len(tail) for start, _ in spans), len(spans) - room
    while excess > 0:
        kept -= excess
        end = max(spans[kept][0], head) if kept > 0 else head
        text = whole[:end] + tail
        excess = len(plain_ids(text, tokenizer)) - room
        if end == head and excess > 0:
            return ""
    return text


def _weights(
    text: str, response_ids: list[int], tokenizer: PreTrainedTokenizerBase, extra_weight: dict[str, float]
) -> list[float]:
    """Loss weight of every response token; where two texts overlap, the later one in the dict counts."""
    weight = [1.0] * len(response_ids)
    wanted = {part: value for part, value in extra_weight.items() if part in text}
    if not wanted:
        return weight
    spans = _spans(text, tokenizer)[: len(response_ids)]
    for part, value in wanted.items():
        start = text.find(part)
        while start >= 0:
            end = start + len(part)
            for i, (first, last) in enumerate(spans):
                if first < end and last > start:
                    weight[i] = value
            start = text.find(part, end)
    return weight


def _spans(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """First and last-plus-one character of every token."""
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return encoding["offset_mapping"]


def _too_long(example: Example, full: int, prompt: int, max_length: int, overflow: Overflow) -> str:
    got = f"{example.origin} has {full:,} tokens ({prompt:,} of them the prompt), max_length is {max_length:,}"
    if overflow == "error":
        return f"{got}: set overflow to truncate_trace or drop, or raise max_length"
    if overflow == "truncate_right":
        return f"{got}: the prompt alone leaves no room for a response; set overflow to drop, or raise max_length"
    return f"{got}: it does not fit even without its thinking; set overflow to truncate_trace_else_drop, or raise max_length"
