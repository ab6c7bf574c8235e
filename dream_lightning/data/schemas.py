"""Records → Examples, by a table of schemas, of which docs/data.md lists the columns.

A response that starts with `<think>…</think>` is split into thinking and answer; a field `reasoning_content` next to it
is its thinking. A column `system` or `system_prompt` is the system message, `tools` is what a chat may call. What else
would change a text, such as an image in a content, is refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from itertools import chain
from os.path import basename, splitext
from pathlib import Path
from typing import Any, NamedTuple

from dream_lightning.batch import Example, Message
from dream_lightning.data.records import parse_json
from dream_lightning.data.sources import Row, read_rows
from dream_lightning.data.splits import Filters, keep
from dream_lightning.errors import UserError, reading
from dream_lightning.tasks import apply_task, load_task

_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_RESPONSES = ("response", "completion", "output")
_IDS = ("id", "unique_id")
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
_MORE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("name", "tool_call_id")}  # further fields, by role
_THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*(.*)", re.DOTALL)

Content = tuple[Any, ...]  # prompt, thinking, answer; of a chat also its tools and the tool calls of its response


class Columns(NamedTuple):
    """Columns that the user named or some row has a value in; None if there is no such column."""

    prompt: str | None  # of `prompt-response` only
    response: str | None  # of `prompt-response` and `text` only
    reference: str | None


class Schema(NamedTuple):
    """How records of one kind are recognized and read."""

    detect: Callable[[Set[str]], bool]  # from the columns in which some row has a value
    read: Callable[[Row, Columns], Content]
    references: tuple[str, ...] = ("reference", "answer", "solution")  # columns of the reference, the first one found


def read_examples(
    source: str | Path,
    *,
    schema: str = "auto",
    prompt_column: str | None = None,
    response_column: str | None = None,
    reference_column: str | None = None,
    task: str | None = None,
    split: str = "train",
    subset: str | None = None,
    filters: Filters | None = None,
) -> list[Example]:
    """Every record of a source, in its order.

    Args:
        source: a file, a folder, a hub id or `bundled`, as in `sources.read_rows`.
        split: split to read, where the source has several.
        subset: subset of a hub data set that has several.
        schema: how a record is read, see `data.schemas`; `auto` detects it from the columns of all rows.
        prompt_column: column of the question in prompt/response records; None finds prompt, question, problem,
            instruction or input.
        response_column: column of the response; None finds response, completion or output. A row without one is a
            question to answer. Of `text`: its column; None is text.
        reference_column: column that predictions are scored against, in any schema; None finds reference, answer or
            solution (s1K: solution). A row without one is not scored.
        task: how questions are asked and graded, as in `tasks.apply_task`, where a record names no task; None is math.
        filters: column → values; only rows with one of the values in every such column are kept.

    Raises:
        UserError: with file, row and remedy: an unknown schema, a missing column, or what a record lacks.
    """
    rows = keep(list(read_rows(source, split, subset)), filters or {})
    reader = choose_reader(rows, schema, prompt_column, response_column, reference_column, task)
    examples: dict[str, Example] = {}
    for row in rows:
        example = reader.read(row)
        if (same := examples.setdefault(example.id, example)) is not example:
            raise UserError(f"{row.origin} has the id {example.id!r}, and so has {same.origin}: make ids unique")
    return list(examples.values())


class ExampleReader(NamedTuple):
    """How the rows of one source become examples."""

    schema: str
    columns: Columns
    task: str | None  # of a record that names none

    def read(self, row: Row) -> Example:
        prompt, thinking, answer, *calls = SCHEMAS[self.schema].read(row, self.columns)
        if prompt and not any(message["content"].strip() for message in prompt if message["role"] == "user"):
            raise UserError(f"{row.origin} has an empty prompt: correct or delete that row")
        own_id = next((row.record[name] for name in _IDS if isinstance(row.record.get(name), str | int)), None)
        own_task = row.record.get("task")
        tools, tool_calls = calls or (None, None)
        example = Example(
            id=str(own_id) if own_id is not None else f"{splitext(basename(row.file))[0]}-{row.number}",
            prompt=tuple(prompt),
            thinking=thinking,
            answer=answer,
            reference=row.optional_text(self.columns.reference),
            origin=row.origin,
            task=own_task if isinstance(own_task, str) and own_task else None,
            filled_at=row.record.get("filled_at"),
            record=row.record,
            tools=tools,
            tool_calls=tool_calls,
        )
        return apply_task(example, self.task) if prompt else example


def choose_reader(
    rows: Sequence[Row],
    schema: str = "auto",
    prompt_column: str | None = None,
    response_column: str | None = None,
    reference_column: str | None = None,
    task: str | None = None,
) -> ExampleReader:
    """The reader that these rows ask for; arguments and errors as in `read_examples`."""
    for column in filter(None, (prompt_column, response_column, reference_column)):
        if not any(column in row.record for row in rows):
            rows[0].value(column)  # raises
    names = {name: None for row in rows for name, value in row.record.items() if value is not None} or rows[0].record
    if schema == "auto":
        schema = "prompt-response" if prompt_column or response_column else _detect(names.keys(), rows[0].file)
    if schema not in SCHEMAS:
        raise UserError(f"schema is {schema!r}, wanted auto or one of {', '.join(SCHEMAS)}")
    if schema == "prompt-response":
        prompt_column = prompt_column or _find(names, _PROMPTS, f"{rows[0].file}: set prompt_column")
        response_column = response_column or _find(names, _RESPONSES, f"{rows[0].file}: set response_column")
    if reference_column is None:
        present = (name for name in SCHEMAS[schema].references if name in names and name != response_column)
        reference_column = next(present, None)
    columns = Columns(prompt_column, response_column, reference_column)
    return ExampleReader(schema, columns, None if task is None else load_task(task))


def question(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def split_thinking(response: str) -> tuple[str | None, str]:
    """`<think>trace</think>answer` → (trace, answer); anything else → (None, response)."""
    found = _THINKING.fullmatch(response)
    return (found[1] or None, found[2]) if found else (None, response)


def _system(row: Row) -> list[Message]:
    texts = map(row.optional_text, ("system", "system_prompt"))
    return [Message(role="system", content=text) for text in texts if text is not None]


def _with_thinking(reasoning: Any, content: str, origin: str) -> str:
    """The response with the text of its field `reasoning_content`, as the model writes both."""
    if not reasoning:
        return content
    if not isinstance(reasoning, str) or content.lstrip().startswith("<think>"):
        raise UserError(f"{origin}: reasoning_content is no text, or next to a <think> in the response: remove one")
    return f"<think>\n{reasoning}\n</think>\n{content}"


def _read_s1k(row: Row, columns: Columns) -> Content:
    traces = row.value("thinking_trajectories")
    if not isinstance(traces, list) or not traces or not isinstance(traces[0], str):
        raise UserError(f"{row.origin}: thinking_trajectories is {traces!r:.60}, wanted a list with a text")
    return question(row.text("question")), traces[0], row.text("attempt")


def _read_s1k_11(row: Row, columns: Columns, *, model: str) -> Content:
    return question(row.text("question")), row.text(f"{model}_thinking_trajectory"), row.text(f"{model}_attempt")


def _read_messages(row: Row, columns: Columns, *, column: str, chat: Any = None) -> Content:
    chat = row.value(column) if chat is None else chat
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise UserError(f"{row.origin}: {column} is not a list of messages; wanted [{{'role': …, 'content': …}}, …]")
    if row.record.get("functions"):
        raise UserError(f"{row.origin} has functions, which is not read: rename it to tools, or remove it")
    messages = _system(row)
    for number, message in enumerate(chat, 1):
        messages.append(_message(message, origin := f"{row.origin}, message {number}"))
        if messages[-1]["role"] == "system" and _system(row):
            raise UserError(f"{origin} is a system message, and so is the column system: remove one")
    roles = ", ".join(message["role"] for message in messages)
    response = messages.pop() if roles.endswith("assistant") else {}
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{row.origin}: no user message before the response, the roles are {roles}, wanted user and assistant (or "
            "user alone, to be answered) at the end: correct or delete that row"
        )
    tools = _objects(row.record.get("tools"), f"{row.origin}: tools")
    return messages, *split_thinking(response.get("content", "")), tools, response.get("tool_calls")


def _message(message: dict[str, Any], origin: str) -> Message:
    used = ["role" if message.get("role") else "from", "content" if message.get("content") is not None else "value"]
    role, content = str(message.get(used[0])), message.get(used[1])
    used += _MORE.get(_ROLES.get(role), ())
    if unread := [key for key, value in message.items() if key not in used and value not in (None, "", [], {})]:
        raise UserError(f"{origin} ({role:.40}) has {', '.join(unread)}, which is not read: remove it or the row")
    more = {name: message[name] for name in _MORE["tool"] if message.get(name)}
    if calls := _objects(message.get("tool_calls"), f"{origin}: tool_calls"):
        more["tool_calls"] = [_call(call, f"{origin}: a tool call") for call in calls]
    if isinstance(content, list):  # parts, as in OpenAI's interface
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise UserError(f"{origin} has a content part {other[0]!r:.40}, wanted text alone: delete that row")
        content = "".join(str(part.get("text")) for part in content)
    content = "" if content is None and calls else content
    if role not in _ROLES or not isinstance(content, str):
        raise UserError(
            f"{origin} has the role {role!r:.40} and a {type(content).__name__}, wanted one of "
            f"{', '.join(_ROLES)} and a text: correct or delete that row"
        )
    content = _with_thinking(message.get("reasoning_content"), content, origin)
    return Message(role=_ROLES[role], content=content, **more)


def _objects(value: Any, origin: str) -> list[dict[str, Any]] | None:
    """A list of objects, which may be JSON text; None if it is empty."""
    value = parse_json(value.encode(), origin) if isinstance(value, str) and value else value
    if value and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise UserError(f"{origin} is {value!r:.60}, wanted a list of objects: correct or delete that row")
    return value or None


def _call(call: dict[str, Any], origin: str) -> dict[str, Any]:
    """With the arguments as an object, which OpenAI writes as JSON text."""
    with reading(origin, "object {'function': {'name': …, 'arguments': {…}}}", "correct or delete that row"):
        name, arguments = (call.get("function", call)[key] for key in ("name", "arguments"))
        arguments = parse_json(arguments.encode(), origin) if isinstance(arguments, str) else arguments
        return {"type": "function", "function": {"name": name, "arguments": {**arguments}}}


def _read_prompt_response(row: Row, columns: Columns) -> Content:
    both = {"user": row.value(columns.prompt), "assistant": row.record.get(columns.response)}
    if any(isinstance(value, list) for value in both.values()):  # messages, as TRL has them
        parts = [x if isinstance(x, list) else [{"role": r, "content": x}] for r, x in both.items() if x is not None]
        return _read_messages(row, columns, column=f"{columns.prompt} or its response", chat=list(chain(*parts)))
    return _answered(row, row.text(columns.prompt), columns.response)


def _read_alpaca(row: Row, columns: Columns) -> Content:
    if row.record.get("history"):
        raise UserError(f"{row.origin} has a history, which is not read: write the row as messages")
    return _answered(row, "\n".join(filter(None, (row.text("instruction"), row.optional_text("input")))), "output")


def _answered(row: Row, prompt: str, column: str | None) -> Content:
    response = row.text(column) if row.record.get(column) is not None else ""
    response = _with_thinking(row.record.get("reasoning_content"), response, row.origin)
    return _system(row) + question(prompt), *split_thinking(response)


def _read_text(row: Row, columns: Columns) -> Content:
    return [], None, row.text(columns.response or "text")


# `auto` asks the last entry first, so that a schema of a user's own comes before these.
SCHEMAS: dict[str, Schema] = {
    "text": Schema({"text"}.issubset, _read_text, ()),
    "prompt-response": Schema(lambda names: not names.isdisjoint(_PROMPTS), _read_prompt_response),
    "alpaca": Schema({"instruction", "input", "output"}.issubset, _read_alpaca),
    "conversations": Schema({"conversations"}.issubset, partial(_read_messages, column="conversations")),
    "messages": Schema({"messages"}.issubset, partial(_read_messages, column="messages")),
    "s1k-1.1-gemini": Schema(
        {"gemini_thinking_trajectory"}.issubset, partial(_read_s1k_11, model="gemini"), ("solution",)
    ),
    "s1k-1.1": Schema(
        {"deepseek_thinking_trajectory"}.issubset, partial(_read_s1k_11, model="deepseek"), ("solution",)
    ),
    "s1k": Schema({"thinking_trajectories"}.issubset, _read_s1k, ("solution",)),
}


def _detect(names: Set[str], file: str) -> str:
    for name, schema in reversed(SCHEMAS.items()):
        if schema.detect(names):
            return name
    raise UserError(
        f"{file} has the columns {', '.join(names)}; wanted those of s1K, messages, conversations, Alpaca, or one of "
        f"{', '.join(_PROMPTS)}: set prompt_column (and response_column) to yours, or add a schema"
    )


def _find(names: Iterable[str], usual: tuple[str, ...], remedy: str) -> str | None:
    found = [name for name in usual if name in names]
    if len(found) > 1 or (usual == _PROMPTS and not found):
        raise UserError(f"{remedy} to one of the columns {', '.join(found or names)}")
    return found[0] if found else None
