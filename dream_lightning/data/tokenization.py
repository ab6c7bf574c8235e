"""An Example → a Document of token ids: the prompt, and a response that ends with eos and fits `max_length`.

Prompt and response are tokenized separately and concatenated, as in the authors' trainer.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Document, Example
from dream_lightning.data.prompt_format import AT_ONCE, Style, encode_prompt, longer_than, response_text, special_tokens
from dream_lightning.data.schemas import split_thinking
from dream_lightning.errors import UserError, check_range

TrainOn = Literal["last", "all"]
Overflow = Literal["drop", "error", "truncate_trace", "truncate_trace_else_drop", "truncate_right"]


class Encoded(NamedTuple):
    """A document that fits, and its lengths before that."""

    document: Document | None  # None if dropped
    prompt_length: int
    full_length: int  # of prompt and response before truncation and filling
    filled: int = 0  # eos tokens added after the first one


def check_encoding(*, max_length: int | None, eos_fill_to: int | None, extra_weight: dict[str, float] | None, **_: Any):
    """Raise UserError for an option of `encode` that is out of range."""
    check_range("max_length", max_length, least=1, whole=True)
    check_range("eos_fill_to (within max_length)", eos_fill_to, least=1, most=max_length or math.inf, whole=True)
    for text, weight in (extra_weight or {}).items():
        check_range(f"extra_weight of {text!r}", weight, least=0)
    if "" in (extra_weight or {}):
        raise UserError("extra_weight has a weight for the empty text, wanted a text such as </think>")


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
    trajectories: bool = False,
) -> Encoded:
    """Ids of the prompt and of the response with its eos.

    Args:
        style: `chat` uses the tokenizer's template; `plain` and `bare` do without it, see `S1KDataModule`.
        system_prompt: replaces the record's system message; None keeps it, or the template's default.
        thinking: False trains on the answer alone.
        max_length: most tokens of prompt and response with eos; None is no limit.
        overflow: what happens to longer documents. `truncate_trace` shortens the thinking at its end, keeps `</think>`,
            the answer and eos, and raises if even that is too long; `truncate_trace_else_drop` drops those;
            `truncate_right` removes the end, eos included; `drop` drops; `error` raises.
        eos_fill_to: a shorter response is filled with eos to this many tokens, as far as max_length allows.
        extra_weight: text → loss weight of the response tokens that overlap an occurrence of that text; the text of
            the eos token weights eos, its filling included.
        trajectories: give the document the order in which its column `filled_at` says that it was filled.

    Raises UserError if the record has no response or no answer, an option is out of range, or a document cannot be
    made to fit. One of over a million characters whose start alone is too long is not truncated.
    """
    check_encoding(max_length=max_length, eos_fill_to=eos_fill_to, extra_weight=extra_weight)
    text = response_text(example, style=style, thinking=thinking, tokenizer=tokenizer)
    if not text.strip() or not (example.answer.strip() or example.tool_calls):
        raise UserError(
            f"{example.origin} has no response to train on, or thinking without an answer: set response_column, delete "
            "that row, or only predict with it"
        )
    whole = "".join([*(message["content"] for message in example.prompt), text])
    if too_long := longer_than(max_length, whole, tokenizer):
        if overflow in ("drop", "truncate_trace_else_drop"):
            return Encoded(None, 0, too_long)
        raise UserError(
            f"{example.origin} has {len(whole):,} characters, about {too_long:,} tokens, max_length is "
            f"{max_length:,}: delete or shorten that row, or set overflow to drop"
        )
    prompt_ids = encode_prompt(example, tokenizer, style=style, system_prompt=system_prompt)
    response = _Tokens.of(text, tokenizer).then(_eos(tokenizer))
    dropped = Encoded(None, len(prompt_ids), full_length := len(prompt_ids) + len(response.ids))
    room = max_length - len(prompt_ids) if max_length is not None else len(response.ids)  # tokens of the response
    if len(response.ids) > room:
        if overflow == "drop":
            return dropped
        if overflow == "truncate_right":
            response = response.first(room)
        elif overflow != "error" and thinking and example.thinking:
            response = _shorten_trace(response, example.thinking, tokenizer, style=style, room=room)
        if overflow == "truncate_trace_else_drop" and len(response.ids) > room:
            return dropped
        if not response.ids or len(response.ids) > room:
            raise UserError(
                f"{example.origin} has {full_length:,} tokens ({len(prompt_ids):,} of them the prompt), max_length is "
                f"{max_length:,}: {_REMEDIES[overflow]}, or raise max_length"
            )
    limit = (eos_fill_to or 0) if max_length is None else min(eos_fill_to or 0, room)
    filled = max(limit - len(response.ids), 0) if response.ids[-1] == tokenizer.eos_token_id else 0
    ids = response.ids + [tokenizer.eos_token_id] * filled
    weight = _weights(response, ids, tokenizer, extra_weight)
    document = Document(example.id, prompt_ids, ids, weight, _trajectory(example, len(ids)) if trajectories else None)
    return Encoded(document, len(prompt_ids), full_length, filled)


def encode_documents(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "last", **options: Any
) -> list[Encoded]:
    """`encode` of the last response of a chat, or of `all`: each with everything before it as its prompt.

    A plain text, which has no prompt, becomes as many documents of at most `max_length` as it needs. The first token of
    each is not maskable, as there is nothing to predict it from, and the last one ends with eos. No token is lost:
    `overflow` and `eos_fill_to` do not apply. A blank text is dropped.
    """
    if example.prompt or options.get("trajectories"):
        return [encode(turn, tokenizer, **options) for turn in trained_turns(example, train_on)]
    if not example.answer.strip():
        return [Encoded(None, 0, 0)]
    starts = range(0, len(example.answer), AT_ONCE)
    parts = [_Tokens.of(example.answer[start : start + AT_ONCE], tokenizer) for start in starts]
    text = reduce(_Tokens.then, [*parts, _eos(tokenizer)])
    ids, weight = text.ids, _weights(text, text.ids, tokenizer, options.get("extra_weight"))
    length = options.get("max_length") or len(ids)
    check_range("max_length of plain text", length, least=3)
    bounds = [*range(0, len(ids), length), len(ids)]
    if bounds[-1] - bounds[-2] == 1:  # a document has at least two tokens
        bounds[-2] -= 1
    return [
        Encoded(Document(example.id, ids[a : a + 1], ids[a + 1 : b], weight[a + 1 : b]), 1, b - a)
        for a, b in pairwise(bounds)
    ]


def trained_turns(example: Example, train_on: TrainOn) -> Iterator[Example]:
    """The example, after one of each earlier response to a question where all are trained."""
    asked = next((i for i, m in enumerate(example.prompt) if m["role"] == "user"), 0)
    places = [i for i, m in enumerate(example.prompt) if m["role"] == "assistant" and i > asked]
    for number, i in enumerate(places if train_on == "all" else (), 1):
        (thinking, answer), calls = split_thinking(example.prompt[i]["content"]), example.prompt[i].get("tool_calls")
        said = {"thinking": thinking, "answer": answer, "tool_calls": calls, "prompt": example.prompt[:i]}
        yield replace(example, origin=f"{example.origin}, response {number}", **said)
    yield example


def warn_of_responses(examples: list[Example], tokenizer: PreTrainedTokenizerBase, encoding: dict[str, Any]) -> None:
    """Warn about special tokens that are spelled out, and about extra weights without effect."""
    pattern = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
    unseen, spelled = set(encoding["extra_weight"] or {}) - {tokenizer.eos_token}, []
    for turn in chain.from_iterable(trained_turns(example, encoding["train_on"]) for example in examples):
        text = response_text(turn, style=encoding["style"], thinking=encoding["thinking"], tokenizer=tokenizer)
        unseen -= {part for part in unseen if part in text}
        if found := pattern.search(text):
            spelled.append(f"{found[0]} in {turn.origin}")
    if spelled:
        rank_zero_warn(
            f"{len(spelled):,} of {len(examples):,} responses hold a special token as text, first {spelled[0]}: "
            "the model learns to spell it letter by letter; remove it, eos is added to every response"
        )
    for part in sorted(unseen):
        rank_zero_warn(f"extra_weight: {part!r} is in no response of the training data and has no effect: correct it")


_REMEDIES = {
    "error": "set overflow to truncate_trace or drop",
    "truncate_right": "the prompt alone leaves no room for a response; set overflow to drop",
    "truncate_trace": "it does not fit even without its thinking; set overflow to truncate_trace_else_drop or drop",
}


class _Tokens(NamedTuple):
    """A text, its ids, and the first and last-plus-one character of each."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> "_Tokens":
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return cls(text, encoding["input_ids"], encoding["offset_mapping"])

    def first(self, count: int) -> "_Tokens":
        count = max(count, 0)  # one or two fewer where a character of several tokens would be split
        while 0 < count < len(self.ids) and self.spans[count - 1][1] > self.spans[count][0]:
            count -= 1
        end = self.spans[count - 1][1] if count else 0
        return _Tokens(self.text[:end], self.ids[:count], self.spans[:count])

    def then(self, other: "_Tokens") -> "_Tokens":
        moved = [(first + len(self.text), last + len(self.text)) for first, last in other.spans]
        return _Tokens(self.text + other.text, self.ids + other.ids, self.spans + moved)


def _eos(tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    return _Tokens("", [tokenizer.eos_token_id], [(0, 0)])


def _shorten_trace(
    response: _Tokens, thinking: str, tokenizer: PreTrainedTokenizerBase, *, style: Style, room: int
) -> _Tokens:
    """The start of the thinking, then everything after it; longer than `room` only if no thinking is left."""
    head = "<think>\n" if style == "chat" else ""
    after = _Tokens.of(response.text[len(head) + len(thinking) :], tokenizer).then(_eos(tokenizer))
    kept = response.first(room - len(after.ids))
    return (kept if len(kept.text) >= len(head) else _Tokens.of(head, tokenizer)).then(after)


def _trajectory(example: Example, length: int) -> list[float]:
    """For each response token the share of the tokens that were filled at later steps: masked where t is larger.

    So every t > 0 gives one of the teacher's states, that with the fewest masks among those with at least a share t.
    """
    steps = example.filled_at
    if not isinstance(steps, list) or len(steps) != length or not all(isinstance(step, int) for step in steps):
        got = f"{len(steps)} values" if isinstance(steps, list) else f"{steps!r:.40}"
        raise UserError(
            f"{example.origin} has {got} in filled_at, wanted one integer for each of the {length} tokens of its "
            "response: train with the tokenizer, style, max_length and eos_fill_to with which the trajectories were "
            "written, or set trajectories to false"
        )
    in_order = sorted(steps)
    return [1 - bisect_right(in_order, step) / length for step in steps]


def _weights(
    response: _Tokens, ids: list[int], tokenizer: PreTrainedTokenizerBase, extra_weight: dict[str, float] | None
) -> list[float]:
    """Of the ids of the response and its filling. Where two texts overlap, the later one counts."""
    weight = [1.0] * len(ids)
    if not extra_weight:
        return weight
    starts, ends = ([span[side] for span in response.spans] for side in (0, 1))  # both ascend
    for part, value in extra_weight.items():
        for found in re.finditer(re.escape(part), response.text):
            first, last = bisect_right(ends, found.start()), bisect_left(starts, found.end())
            weight[first:last] = [value] * (last - first)
    special = {i: token for token, i in special_tokens(tokenizer).items()}
    return [extra_weight.get(special.get(i), value) for i, value in zip(ids, weight, strict=True)]
