"""A task says what the answer in a response is and when it is right; the table `TASKS` maps names to tasks."""

import importlib
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dream_lightning.batch import Example
from dream_lightning.errors import UserError


@dataclass(frozen=True)
class Task:
    """How questions are asked and responses graded.

    Args:
        extract: text after the thinking → the stated answer, None if there is none.
        grade: (answer, reference) → whether the answer is right, None if that was not decided in time. A malformed
            answer is wrong, not an error.
        reference: example → what `grade` compares with, None if the example cannot be scored. Raises UserError for a
            malformed record. Default: the reference column.
        prompt: example → the text of the user's message. Default: the prompt of the record.
    """

    extract: Callable[[str], str | None]
    grade: Callable[[str, Any], bool | None]
    reference: Callable[[Example], Any] = operator.attrgetter("reference")
    prompt: Callable[[Example], str] = lambda example: example.prompt[-1]["content"]


TASKS: dict[str, Task] = {}


@dataclass(frozen=True)
class Grade:
    """One graded response, as in a line of the predictions file."""

    thinking: str | None  # None = no thinking tags
    answer: str | None  # None = no answer found
    correct: bool | None  # None = not scored: the record has nothing to compare with, or grading took too long
    target: str | None = field(default=None, compare=False)  # what the answer was compared with


def load_task(path: str) -> str:
    """The name in an option. For `my_tasks.parity`, imports the module `my_tasks`, which adds `parity` to `TASKS`."""
    module, _, name = path.rpartition(".")
    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the task {path!r} was not imported: {error}. Run where {module} can be imported") from error
    return name


def task_of(example: Example) -> Task:
    """The task that an example names, by default `math`. Raises UserError if there is none; imports nothing."""
    if (name := example.task or "math") in TASKS:
        return TASKS[name]
    raise UserError(
        f"{example.origin}: there is no task {name!r}, wanted {', '.join(sorted(TASKS))}: rename or drop the column "
        "task, or set --data.task to one of these or to the import path of your own, such as my_tasks.parity"
    )


def apply_task(example: Example, default: str | None) -> Example:
    """The example as its task asks it. Raises UserError if the task is unknown or cannot use the record.

    `default` is the task for an example that names none or, with a warning, an unknown one.
    """
    if default and example.task not in TASKS:
        if example.task:
            warnings.warn(f"there is no task {example.task!r}, as records say: {default} is used", stacklevel=2)
        example = replace(example, task=default)
    if example.task is None:
        return example
    task = task_of(example)
    task.reference(example)
    *earlier, last = example.prompt
    asked = task.prompt(example)
    return example if asked == last["content"] else replace(example, prompt=(*earlier, {**last, "content": asked}))


def grade_response(text: str, example: Example) -> Grade:
    """Grade a whole response by the task of its example. Raises UserError as `apply_task`.

    `correct` is None if the example cannot be scored or grading takes too long, and False if the response states no
    answer.
    """
    task = task_of(example)
    thinking, response = split_thinking(text)
    answer, reference = task.extract(response), task.reference(example)
    if reference is None:
        return Grade(thinking, answer, None)
    return Grade(thinking, answer, answer is not None and task.grade(answer, reference), str(reference))


def split_thinking(text: str) -> tuple[str | None, str]:
    """Splits "<think>…</think>…" into (thinking, rest), both stripped; without tags: (None, text unchanged).

    The last `</think>` divides; its opening tag may be missing. After an open `<think>` all is thinking, the rest "".
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
