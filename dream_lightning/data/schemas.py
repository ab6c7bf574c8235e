"""Records of the usual kinds of files → Examples.

| schema | columns |
|---|---|
| `s1k` | question, thinking_trajectories (a list, the first is taken), attempt, solution |
| `s1k-1.1` | question, {deepseek,gemini}_thinking_trajectory, {deepseek,gemini}_attempt, solution |
| `messages` | messages: a list of {role: system, user or assistant; content} |
| `conversations` | conversations: a list of {from: system, human or gpt; value} |
| `prompt-response` | one text column each; a row without a response is a question to answer |

A response that starts with `<think>…</think>` is split into thinking and answer.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from dream_lightning.batch import Example, Message
from dream_lightning.data.messages import split_thinking, turns_of
from dream_lightning.data.sources import Row, read_rows
from dream_lightning.data.splits import keep_rows
from dream_lightning.errors import UserError

Schema = Literal["auto", "s1k", "s1k-1.1", "messages", "conversations", "prompt-response"]
Trace = Literal["deepseek", "gemini"]

_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_RESPONSES = ("response", "completion", "output")
_REFERENCES = ("reference", "answer", "solution")
_IDS = ("id", "unique_id")


def read_examples(
    source: str | Path,
    *,
    schema: Schema = "auto",
    trace: Trace = "deepseek",
    prompt_column: str | None = None,
    response_column: str | None = None,
    reference_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    filters: dict[str, list[str]] | None = None,
) -> list[Example]:
    """Every record of a source, in its order.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder of them or of `save_to_disk`, or a hub id owner/name.
        schema: see the table above; `auto` decides by the columns of the first row.
        trace: whose thinking and attempt an s1K-1.1 row gives.
        prompt_column: of a prompt-response source; None finds prompt, question, problem, instruction or input.
        response_column: likewise; None finds response, completion or output, and it may be absent.
        reference_column: what predictions are scored against, in any schema; None finds reference, answer or solution
            (s1K: solution), and it may be absent. Taken as it is: the scorer extracts, say, what follows `####`.
        split: of a folder or hub data set.
        subset: of a hub data set that has several, such as `main` of openai/gsm8k.
        filters: column → values; only rows with one of the values in every such column are kept.

    Raises:
        UserError: naming file, row and remedy, for a missing column, an empty or broken file, a field that is null or
            not text, an empty prompt, a chat without a user's turn, an unknown role, an id that occurs twice.
    """
    rows = list(read_rows(source, split, subset))
    if filters:
        rows = keep_rows(rows, filters)
    if schema == "auto":
        schema = "prompt-response" if prompt_column or response_column else _detect(rows[0])
    columns = {"prompt": prompt_column, "response": response_column, "reference": reference_column}
    if schema == "prompt-response":
        columns["prompt"] = prompt_column or _find(rows[0], _PROMPTS, "prompt_column", needed=True)
        columns["response"] = response_column or _find(rows[0], _RESPONSES, "response_column", needed=False)
    if reference_column is None:
        names = ("solution",) if schema in ("s1k", "s1k-1.1") else _REFERENCES
        columns["reference"] = next((c for c in names if c in rows[0].values and c != columns["response"]), None)
    examples = [_example(row, schema, trace, columns) for row in rows]
    _check_ids(examples)
    return examples


def _example(row: Row, schema: Schema, trace: Trace, columns: dict[str, str | None]) -> Example:
    prompt, thinking, answer = _content(row, schema, trace, columns)
    if not any(turn["content"].strip() for turn in prompt if turn["role"] == "user"):
        raise UserError(f"{row.origin} has an empty prompt: correct or delete that row")
    return Example(
        id=_id(row),
        prompt=tuple(prompt),
        thinking=thinking,
        answer=answer,
        reference=_text(row, columns["reference"], numbers=True) if columns["reference"] else None,
        origin=row.origin,
    )


def _content(
    row: Row, schema: Schema, trace: Trace, columns: dict[str, str | None]
) -> tuple[list[Message], str | None, str]:
    """Prompt, thinking, answer."""
    if schema in ("messages", "conversations"):
        prompt, response = turns_of(_field(row, schema), row.origin)
        return prompt, *split_thinking(response)
    if schema == "prompt-response":
        prompt = [Message(role="user", content=_text(row, columns["prompt"]))]
        return prompt, *split_thinking(_text(row, columns["response"]) if columns["response"] else "")
    prompt = [Message(role="user", content=_text(row, "question"))]
    if schema == "s1k-1.1":
        return prompt, _text(row, f"{trace}_thinking_trajectory"), _text(row, f"{trace}_attempt")
    traces = _field(row, "thinking_trajectories")
    if not isinstance(traces, list) or not traces or not isinstance(traces[0], str):
        raise UserError(f"{row.origin}: thinking_trajectories is {_shown(traces)}, wanted a list with a text: see s1K")
    return prompt, traces[0], _text(row, "attempt")


def _detect(row: Row) -> Schema:
    columns = set(row.values)
    if "thinking_trajectories" in columns:
        return "s1k"
    if {"deepseek_thinking_trajectory", "gemini_thinking_trajectory"} & columns:
        return "s1k-1.1"
    for name in ("messages", "conversations"):
        if name in columns:
            return name
    if not columns & set(_PROMPTS):
        raise UserError(
            f"{row.file} has the columns {', '.join(row.values)}; wanted those of s1K or s1K-1.1, messages, "
            f"conversations, or one of {', '.join(_PROMPTS)}: set prompt_column (and response_column) to yours"
        )
    return "prompt-response"


def _find(row: Row, names: Iterable[str], option: str, *, needed: bool) -> str | None:
    found = [name for name in names if name in row.values]
    if len(found) > 1:
        raise UserError(f"{row.file} has {' and '.join(found)}: set {option} to the one you mean")
    if needed and not found:
        raise UserError(f"{row.file} has the columns {', '.join(row.values)}: set {option} to one of them")
    return found[0] if found else None


def _field(row: Row, column: str) -> Any:
    if column not in row.values:
        raise UserError(
            f"{row.origin} has no column {column!r}, it has {', '.join(row.values)}: set schema, prompt_column, "
            "response_column or reference_column to what the file holds"
        )
    return row.values[column]


def _text(row: Row, column: str, *, numbers: bool = False) -> str:
    value = _field(row, column)
    if numbers and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{row.origin}: {column} is {_shown(value)}, wanted text: correct or delete that row")
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _id(row: Row) -> str:
    own = next((row.values[name] for name in _IDS if isinstance(row.values.get(name), str | int)), None)
    return str(own) if own is not None else f"{Path(row.file).stem}-{row.number}"


def _check_ids(examples: list[Example]) -> None:
    seen: dict[str, str] = {}
    for example in examples:
        if example.id in seen:
            raise UserError(
                f"{example.origin} has the id {example.id!r}, and so has {seen[example.id]}: make ids unique, or "
                "remove that column and rows are numbered"
            )
        seen[example.id] = example.origin
