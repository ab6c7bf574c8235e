"""An Example → the ids of its prompt and the text of its response.

Three styles. `chat`: the tokenizer's chat template, then `<think>\\n…\\n</think>\\n` and the answer. `plain`, for base
models: `Question: …\\n\\nLet's think step by step.\\n`, then the thinking and `Therefore, the final answer is: …`.
`bare`, for models from scratch: the question and a line break, then the thinking, a line break, and the answer.

Text never becomes a special token: `<|mask|>` in a record is eight characters of text, where the authors' tokenizer
puts a mask token into the clean input. All other text gets exactly the authors' ids, and so do ordinary added tokens
(`<tool_call>`, `<|fim_prefix|>`).
"""

import re
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example, Message
from dream_lightning.errors import UserError

Style = Literal["chat", "plain", "bare"]
AT_ONCE = 1_000_000  # characters: 20 MB at once take minutes and 6 GB


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, style: Style = "chat", system_prompt: str | None = None
) -> list[int]:
    """Ids of everything before the response."""
    messages = list(example.prompt)
    if system_prompt is not None:
        system = Message(role="system", content=system_prompt)
        messages = [system, *(m for m in messages if m["role"] != "system")]
    if style == "chat":
        return _template_ids(messages, tokenizer)
    system_texts = [m["content"] for m in messages if m["role"] == "system"]
    if len(messages) - len(system_texts) > 1:
        raise UserError(f"{example.origin} has several messages, the {style} style holds one: use the chat style")
    lead = "\n".join(system_texts)
    question = f"{messages[-1]['content']}\n"
    if style == "plain":
        question = f"Question: {question}\nLet's think step by step.\n"
    return _plain_ids(f"{lead}\n\n{question}" if lead else question, tokenizer)


def encode_rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that may be a rendered chat template: only the template's own special tokens are special."""
    template = tokenizer.chat_template or ""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {content: i for content, i in special.items() if content in template}
    if not special:
        return _plain_ids(text, tokenizer)
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text)
    return [i for piece in pieces for i in ([special[piece]] if piece in special else _plain_ids(piece, tokenizer))]


def longer_than(limit: int | None, text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Estimated tokens of a text of over a million characters whose start alone has more than `limit`, else None."""
    if limit is None or len(text) <= AT_ONCE:
        return None
    count = len(_plain_ids(text[:AT_ONCE], tokenizer))
    return round(count * len(text) / AT_ONCE) if count > limit else None


def response_text(example: Example, *, style: Style = "chat", thinking: bool = True) -> str:
    """What the model learns to write, without eos; "" for a record that has only a question."""
    trace = example.thinking if thinking else None
    if style == "chat":
        return f"<think>\n{trace}\n</think>\n{example.answer}" if trace else example.answer
    if style == "bare":
        return f"{trace}\n{example.answer}" if trace else example.answer
    answer = _final_answer(example)
    if not trace:
        return f"Therefore, the final answer is: {answer}" if answer else ""
    return f"{trace} Therefore, the final answer is: {answer}"


def _final_answer(example: Example) -> str:
    """The last `\\boxed{…}`, a one-line reference (it may contradict the trace, so second), or the whole answer."""
    start = example.answer.rfind("\\boxed{")
    if start >= 0:
        start, depth = start + len("\\boxed{"), 1
        for end in range(start, len(example.answer)):
            depth += {"{": 1, "}": -1}.get(example.answer[end], 0)
            if depth == 0:
                return example.answer[start:end]
    reference = (example.reference or "").strip()
    return reference if reference and "\n" not in reference else example.answer


def _template_ids(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The rendered template, with special tokens only where the template itself wrote them."""
    # An unused character is inserted into what looks like a special token in a message, and removed after rendering.
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = re.compile("|".join(map(re.escape, special)))
    content = "".join(m["content"] for m in messages)
    unused = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in content)
    guarded = [
        {**m, "content": pattern.sub(lambda found: found[0][0] + unused + found[0][1:], m["content"])} for m in messages
    ]
    rendered = tokenizer.apply_chat_template(guarded, tokenize=False, add_generation_prompt=True)
    ids, start = [], 0
    for found in pattern.finditer(rendered):
        ids += [*_plain_ids(rendered[start : found.start()].replace(unused, ""), tokenizer), special[found[0]]]
        start = found.end()
    return ids + _plain_ids(rendered[start:].replace(unused, ""), tokenizer)


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
