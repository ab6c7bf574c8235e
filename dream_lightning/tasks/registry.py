"""A task says what the answer in a response is and when it is right; a name chooses it, per option or per record.

`S1KDataModule(task=…)` sets the task of a data set, a record's own `task` field that of one record; the default is
`math`. To add a task, write its functions and pass them to `register`.
"""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dream_lightning.batch import Example
from dream_lightning.errors import UserError


@dataclass(frozen=True)
class Grade:
    """One graded response, as in a line of the predictions file."""

    thinking: str | None  # None = no thinking tags
    answer: str | None  # None = no answer found
    correct: bool | None  # None = not scored: the record has nothing to compare with


def _reference_column(example: Example) -> str | None:
    return example.reference


@dataclass(frozen=True)
class Task:
    """How responses are graded.

    Args:
        name: what `--data.task` and a record's `task` field say.
        extract: text after the thinking → the stated answer, None if there is none.
        grade: (answer, reference) → whether the answer is right. A malformed answer is wrong, not an error.
        reference: example → what `grade` compares with, None if the example cannot be scored. Raises UserError for a
            malformed record. Default: the reference column.
        prompt: example → the text of the user's message. Default: the prompt of the record.
    """

    name: str
    extract: Callable[[str], str | None]
    grade: Callable[[str, Any], bool]
    reference: Callable[[Example], Any] = _reference_column
    prompt: Callable[[Example], str] | None = None


_TASKS: dict[str, Task] = {}
DEFAULT = "math"


def register(task: Task) -> Task:
    """Make a task known by its name; a task of the same name is replaced."""
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The registered task of this name.

    Raises:
        UserError: there is none.
    """
    if name in _TASKS:
        return _TASKS[name]
    guess = difflib.get_close_matches(name, _TASKS, n=1)
    raise UserError(
        f"there is no task {name!r}{f' (did you mean {guess[0]!r}?)' if guess else ''}; the tasks are "
        f"{', '.join(sorted(_TASKS))}. Name your own by its import path, such as my_tasks.parity"
    )


def import_task(path: str) -> Task:
    """Register the task at an import path such as `my_tasks.parity` under that path. Registered names pass through.

    For names from options only: a name from a data file must not import code.

    Raises:
        UserError: the path does not lead to a Task.
    """
    module, _, attribute = path.rpartition(".")
    if path in _TASKS or not module:
        return get_task(path)
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the task {path!r} was not imported: {error}. Run where {module} can be imported") from error
    if not isinstance(task, Task):
        raise UserError(f"{path} is a {type(task).__name__}, wanted a dream_lightning.tasks.Task")
    return register(replace(task, name=path))


def with_task_prompt(example: Example) -> Example:
    """The example as the task that it names asks it. A malformed record fails here, before anything is generated.

    Raises:
        UserError: the task is unknown, or cannot use the record.
    """
    if example.task is None:
        return example
    task = get_task(example.task)
    task.reference(example)
    if task.prompt is None:
        return example
    last = {**example.prompt[-1], "content": task.prompt(example)}
    return replace(example, prompt=(*example.prompt[:-1], last))


def grade_response(text: str, example: Example, default_task: str | None = None) -> Grade:
    """Grade a whole response. The record's task decides, then `default_task`, then `math`.

    `correct` is None if the record cannot be scored, and False if it can but the response states no answer.

    Raises:
        UserError: the task is unknown, or cannot use the record.
    """
    task = get_task(example.task or default_task or DEFAULT)
    thinking, response = split_thinking(text)
    answer, reference = task.extract(response), task.reference(example)
    if reference is None:
        return Grade(thinking, answer, None)
    return Grade(thinking, answer, answer is not None and task.grade(answer, reference))


def split_thinking(text: str) -> tuple[str | None, str]:
    """Splits "<think>…</think>…" into (thinking, rest), both stripped; without tags: (None, text unchanged).

    The last `</think>` divides; its opening tag may be missing. An open `<think>` means that the response is
    incomplete: all of it is thinking and the rest is "".
    """
    head, closing, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return text.replace("<think>", "").strip(), ""
    if not closing:
        return None, text
    return head.replace("<think>", "").strip(), rest.strip()


def record_value(example: Example, *columns: str) -> Any:
    """The value of the first of these columns that the record has, in upper or lower case; None if it has none."""
    values = {name.lower(): value for name, value in example.record.items()}
    return next((values[column] for column in columns if values.get(column) is not None), None)
