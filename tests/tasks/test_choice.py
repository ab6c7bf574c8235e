import pytest
from test_registry import example

from dream_lightning.errors import UserError
from dream_lightning.tasks import choice, grade_response


@pytest.mark.parametrize(
    "response",
    [
        "B", "(B)", "B. Paris", r"\boxed{B}", r"\boxed{\text{(B)}}", "The answer is (B).", "Answer: B",
        "**B**", "<think>C or D? (A)</think>(A) is wrong, (C) too, so it is (B) here", "A capital.\nB",
    ],
)  # fmt: skip
def test_a_letter_is_found(response):
    assert grade_response(response, example("?", reference="(B)", task="choice")).correct


@pytest.mark.parametrize(
    ("response", "answer"), [("", None), ("A capital city", None), ("I do not know", None), ("C", "C"), ("AB", None)]
)
def test_other_letters_and_no_letter_are_wrong(response, answer):
    graded = grade_response(response, example("?", reference="B", task="choice"))
    assert (graded.answer, graded.correct) == (answer, False)


def test_a_reference_that_is_no_letter_is_an_error():
    assert choice.reference(example("?")) is None
    assert choice.reference(example("?", reference="C. Paris")) == "C"
    with pytest.raises(UserError, match=r"^rows.jsonl, row 1: the reference 'Paris' is not a letter"):
        choice.reference(example("?", reference="Paris"))
