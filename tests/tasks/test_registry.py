"""Which task grades a response, and a task of a user's own."""

import re
import sys

import pytest

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks import TASKS, apply_task, grade_response, load_task, split_thinking
from dream_lightning.tasks.registry import Grade

OWN_TASK = """
from dream_lightning.tasks import TASKS, Task
TASKS["parity"] = Task(str.split, lambda words, number: words[-1:] == [("even", "odd")[number % 2]],
                       reference=lambda example: example.record["number"], prompt=lambda example: "Odd or even?")
"""


def example(question, *, reference=None, task=None, **record):
    message = {"role": "user", "content": question}
    return Example("q", (message,), None, "", reference, "rows.jsonl, row 1", task=task, record=record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 4", (None, "plain 4")), ("", (None, "")), ("<think>\na\n</think>\nb\n", ("a", "b")),
        ("a</think>b", ("a", "b")), ("<think>a", ("a", "")), ("<think></think>b", ("", "b")),
        ("<think>a</think>b<think>c</think>d", ("a</think>bc", "d")),
        ("<think>a</think>b<think>c", ("a</think>bc", "")),
    ],
)  # fmt: skip
def test_split_thinking(text, expected):
    assert split_thinking(text) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("<think>\n1+1\n</think>\n\\boxed{2}", "2", Grade("1+1", "2", True)),
        ("<think>\\boxed{4}</think> It is 5", "5", Grade("\\boxed{4}", "5", True)),
        ("\\boxed{3}", "2", Grade(None, "3", False)),
        ("no idea", "2", Grade(None, "no idea", False)),
        ("", "2", Grade(None, None, False)),
        ("<think>\\boxed{2}", "2", Grade("\\boxed{2}", None, False)),
        ("\\boxed{3}", None, Grade(None, "3", None)),
        ("\\boxed{3}", "A proof\nof 3 lines\n\\(\\blacksquare\\)", Grade(None, "3", None)),
        ("it is 72", "48/2 = 24\n#### 72", Grade(None, "72", True)),
    ],
)
def test_math_is_the_default_and_reads_what_follows_the_thinking(response, reference, expected):
    assert grade_response(response, example("?", reference=reference)) == expected


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("A cat", True),
        (" A\n cat ", True),
        (r"So: \boxed{A cat}", True),
        *((t, False) for t in ("a cat", "A cat!", "")),
    ],
)
def test_exact(response, correct):
    assert grade_response(response, example("?", reference="A cat", task="exact")).correct == correct


@pytest.mark.parametrize(
    ("task", "record", "told"),
    [
        ("countdown", {"input": "30,100,93", "output": "23"}, "numbers 30, 100, 93 exactly once, .* to make 23."),
        ("sudoku", {"Puzzle": "3102200002100320"}, "4 × 4 sudoku, .*:\n3102\n2000\n0210\n0320\n"),
    ],
)
def test_a_puzzle_without_words_becomes_a_question(task, record, told):
    asked = apply_task(example(next(iter(record.values())), task=task, **record), None)
    assert re.search(told, asked.prompt[-1]["content"])
    assert apply_task(example("Solve it.", task=task, **record), None).prompt[-1]["content"] == "Solve it."


def test_a_malformed_record_fails_before_it_is_asked():
    with pytest.raises(UserError, match="row 1 has the numbers None"):
        apply_task(example("Make 23.", task="countdown"), None)


def test_a_record_decides_before_the_option():
    assert apply_task(example("?", task="math"), "exact").task == "math"
    assert apply_task(example("?"), "exact").task == "exact"
    assert apply_task(example("?"), None).task is None


def test_a_column_task_that_names_no_task_needs_an_option():
    asked = example("?", task="qa", reference="1/2")
    for use in (lambda: apply_task(asked, None), lambda: grade_response("0.5", asked)):
        with pytest.raises(UserError, match=r"row 1: there is no task 'qa', .*: rename or drop .*, or set --data.task"):
            use()
    with pytest.warns(UserWarning, match="there is no task 'qa', as records say: math is used"):
        assert grade_response("0.5", apply_task(asked, "math")).correct


def test_a_task_of_a_users_own_is_imported_by_an_option_and_named_by_records(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "parity", None)  # removed at the end
    del TASKS["parity"]
    (tmp_path / "my_tasks.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_tasks.parity", "parity"):
        with pytest.raises(UserError, match="there is no task"):  # data does not import code
            apply_task(example("3", number=3, task=name), None)
    assert "my_tasks" not in sys.modules
    assert load_task("my_tasks.parity") == "parity" and load_task("math") == "math"
    asked = apply_task(example("3", number=3, task="parity"), None)
    assert asked.prompt[-1]["content"] == "Odd or even?"
    assert [grade_response(text, asked).correct for text in ("It is odd", "even", "")] == [True, False, False]
    with pytest.raises(UserError, match="was not imported"):
        load_task("no_such_module.task")
