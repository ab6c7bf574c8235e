"""Which task grades a response, and a task of a user's own."""

import sys

import pytest

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.tasks import Grade, get_task, grade_response, import_task, split_thinking, with_task_prompt

OWN_TASK = """
from dream_lightning.tasks import Task, register

def extract(response):
    words = response.lower().split()
    return words[-1].strip(".") if words else None

def grade(answer, number):
    return answer == ("odd" if number % 2 else "even")

parity = register(Task("parity", extract, grade, reference=lambda example: example.record["number"]))
"""


def example(question, *, reference=None, task=None, **record):
    message = {"role": "user", "content": question}
    return Example("q", (message,), None, "", reference, "rows.jsonl, row 1", task=task, record=record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 4", (None, "plain 4")),
        ("", (None, "")),
        ("<think>\na\n</think>\nb\n", ("a", "b")),
        ("a</think>b", ("a", "b")),
        ("<think>a", ("a", "")),
        ("<think></think>b", ("", "b")),
        ("<think>a</think>b<think>c</think>d", ("a</think>bc", "d")),
        ("<think>a</think>b<think>c", ("a</think>bc", "")),
    ],
)
def test_split_thinking(text, expected):
    assert split_thinking(text) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("<think>\n1+1\n</think>\n\\boxed{2}", "2", Grade("1+1", "2", True)),
        ("<think>\\boxed{4}</think> It is 5", "5", Grade("\\boxed{4}", "5", True)),
        ("\\boxed{3}", "2", Grade(None, "3", False)),
        ("no idea", "2", Grade(None, None, False)),
        ("<think>\\boxed{2}", "2", Grade("\\boxed{2}", None, False)),
        ("<think>\\boxed{2}</think>", "2", Grade("\\boxed{2}", None, False)),
        ("\\boxed{3}", None, Grade(None, "3", None)),
        ("\\boxed{3}", "A proof\nof 3 lines\n\\(\\blacksquare\\)", Grade(None, "3", None)),
        ("it is 72", "48/2 = 24\n#### 72", Grade(None, "72", True)),
    ],
)
def test_math_is_the_default_and_reads_what_follows_the_thinking(response, reference, expected):
    assert grade_response(response, example("?", reference=reference)) == expected


def test_the_task_of_the_record_wins_over_the_default():
    half = example("?", reference="1/2")
    assert grade_response("0.5", half).correct and not grade_response("0.5", half, "exact").correct
    assert grade_response("0.5", example("?", reference="1/2", task="math"), "exact").correct


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("A cat", True),
        (" A\n cat ", True),
        (r"So: \boxed{A cat}", True),
        ("a cat", False),
        ("A cat!", False),
        ("", False),
    ],
)
def test_exact(response, correct):
    assert grade_response(response, example("?", reference="A cat", task="exact")).correct == correct


def test_unknown_tasks_are_named_with_a_guess():
    with pytest.raises(
        UserError, match=r"no task 'countdwn' \(did you mean 'countdown'\?\).* choice, countdown, exact, math, s"
    ):
        grade_response("1", example("?", task="countdwn"))


def test_a_prompt_of_numbers_becomes_words_and_a_malformed_record_fails_before_it_is_asked():
    asked = with_task_prompt(example("30,100,93", task="countdown", input="30,100,93", output="23"))
    assert asked.prompt[-1]["role"] == "user" and "to make 23" in asked.prompt[-1]["content"]
    plain = example("1 + 1 = ?", reference="2")
    assert with_task_prompt(plain) is plain
    with pytest.raises(UserError, match="row 1 has the numbers None"):
        with_task_prompt(example("Make 23.", task="countdown"))


def test_a_task_of_a_users_own_is_imported_by_an_option_and_named_by_records(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"no task 'my_tasks\.parity'"):
        grade_response("odd", example("3?", number=3, task="my_tasks.parity"))  # data does not import code
    assert "my_tasks" not in sys.modules
    import_task("my_tasks.parity")
    for name in ("my_tasks.parity", "parity"):
        asked = example("Is 3 odd or even?", number=3, task=name)
        assert grade_response("It is odd.", asked) == Grade(None, "odd", True)
        assert grade_response("Even", asked) == Grade(None, "even", False)
        assert grade_response("", asked) == Grade(None, None, False)
    assert import_task("math") is get_task("math")


@pytest.mark.parametrize(
    ("path", "told"),
    [("no_such_module.task", "was not imported"), ("json.dumps", "wanted a dream"), ("json", "no task")],
)
def test_a_path_that_leads_to_no_task_is_an_error(path, told):
    with pytest.raises(UserError, match=told):
        import_task(path)
