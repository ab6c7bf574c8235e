"""An Example → the ids of its prompt and the text of its response.

Three styles. `chat`: the tokenizer's chat template, then `<think>\\n…\\n</think>\\n` and the answer. `plain`, for base
models: `Question: …\\n\\nLet's think step by step.\\n`, then the thinking and `Therefore, the final answer is: …`.
`bare`, for models from scratch: the question and a line break, then the thinking, a line break, and the answer.

Text never becomes a special token: `<|mask|>` in a record is eight characters of text, where the authors' tokenizer
puts a mask token into the clean input. All other text gets exactly the authors' ids, and so do ordinary added tokens
(`<tool_call>`, `<|fim_prefix|>`).
"""

import json
import re
from typing import Any, Literal

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
        return _template_ids(messages, example, tokenizer)
    system_texts = [m["content"] for m in messages if m["role"] == "system"]
    if len(messages) - len(system_texts) > 1 or example.tools:
        raise UserError(
            f"{example.origin} has several messages or tools, {style} holds one message: use the chat style"
        )
    lead = "\n".join(system_texts)
    question = f"{messages[-1]['content']}\n"
    if style == "plain":
        question = f"Question: {question}\nLet's think step by step.\n"
    return _plain_ids(f"{lead}\n\n{question}" if lead else question, tokenizer)


def encode_rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that may be a rendered chat template: only the template's own special tokens are special."""
    template = tokenizer.chat_template or ""
    return _ids(text, {token: i for token, i in special_tokens(tokenizer).items() if token in template}, tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → id."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def longer_than(limit: int | None, text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Estimated tokens of a text of over a million characters whose start alone has more than `limit`, else None."""
    if limit is None or len(text) <= AT_ONCE:
        return None
    count = len(_plain_ids(text[:AT_ONCE], tokenizer))
    return round(count * len(text) / AT_ONCE) if count > limit else None


def response_text(
    example: Example, *, style: Style = "chat", thinking: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """What the model learns to write, without eos; "" for a record that has only a question.

    The tokenizer's template words tool calls, which are left out without one.
    """
    trace, text = example.thinking if thinking else None, example.answer
    if style == "chat":
        text = f"<think>\n{trace}\n</think>\n{text}" if trace else text
        return _with_calls(example, text, tokenizer) if example.tool_calls and tokenizer else text
    if example.tool_calls:
        raise UserError(f"{example.origin} has tool_calls, which the {style} style does not word: use the chat style")
    if style == "bare":
        return f"{trace}\n{text}" if trace else text
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


def _render(messages: list[Message], example: Example, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The text of a chat; raises UserError if the template would leave out tools or their calls."""
    used = ["tools"] * bool(options.get("tools")) + ["tool_calls"] * any("tool_calls" in m for m in messages)
    if missing := [name for name in used if name not in (tokenizer.chat_template or "")]:
        raise UserError(f"{example.origin} has {missing[0]}, which the tokenizer's template leaves out: use Dream's")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _with_calls(example: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text and the tool calls after it: what the template puts between the start and the end of a response."""
    start = _render([*example.prompt], example, tokenizer, add_generation_prompt=True)
    plain = Message(role="assistant", content="x")
    end = _render([*example.prompt, plain], example, tokenizer).removeprefix(f"{start}x")
    whole = {**plain, "content": text, "tool_calls": example.tool_calls}
    rendered = _render([*example.prompt, whole], example, tokenizer)
    if not rendered.startswith(start) or not rendered.endswith(end):
        raise UserError(f"{example.origin} has tool_calls, and the tokenizer's template changes the prompt before them")
    return rendered.removeprefix(start).removesuffix(end)


def _template_ids(messages: list[Message], example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The rendered template, with special tokens only where the template itself wrote them."""
    # An unused character is inserted into what looks like a special token in a message, and removed after rendering.
    special, chat = special_tokens(tokenizer), json.dumps([messages, example.tools], ensure_ascii=False)
    unused = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in chat)
    chat = re.sub("|".join(map(re.escape, special)), lambda found: found[0][0] + unused + found[0][1:], chat)
    messages, tools = json.loads(chat)
    rendered = _render(messages, example, tokenizer, tools=tools, add_generation_prompt=True)
    return _ids(rendered, special, tokenizer, unused)


def _ids(text: str, special: dict[str, int], tokenizer: PreTrainedTokenizerBase, unused: str = "") -> list[int]:
    """Ids of a text in which the special tokens are special, without the unused character."""
    ids = []
    for piece in re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]:
        ids += [special[piece]] if piece in special else _plain_ids(piece.replace(unused, ""), tokenizer)
    return ids


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
