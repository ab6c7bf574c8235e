import pytest
from test_registry import example

from dream_lightning.errors import UserError
from dream_lightning.tasks import choice, grade_response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        *((text, "B") for text in ("B", "(B)", "B. Paris", r"\boxed{B}", r"\boxed{\text{(B)}}", "The answer is (B).")),
        *((text, "B") for text in ("Answer: B", "**B**", "A capital.\nB", "(A) is wrong, (C) too, so it is (B) here")),
        *(
            (text, "B")
            for text in ("Answer B", "Option B", "ANS:B", "the best answer is (B)", "The correct option is B.")
        ),
        *(
            (text, "B")
            for text in ("Answer: Option B", "The answer is B, since 4 > 3.", "答案：B", "故选B。", "B。不是 A")
        ),
        *(
            (text, "B")
            for text in ("The answer is B. Option A is too small.", "B is the correct answer.", "choice is: B")
        ),
        *((text, None) for text in ("", "A capital city", "I do not know", "AB")),
        ("<think>C or D? (A)</think>B", "B"),
        ("C", "C"),
    ],
)
def test_the_stated_letter_or_the_last_one_is_found(response, answer):
    graded = grade_response(response, example("?", reference="B", task="choice"))
    assert (graded.answer, graded.correct) == (answer, answer == "B")


def test_a_reference_that_is_no_letter_is_an_error():
    assert choice.reference(example("?")) is None
    assert choice.reference(example("?", reference="C. Paris")) == "C"
    with pytest.raises(UserError, match=r"^rows.jsonl, row 1: the reference 'Paris' is not a letter"):
        choice.reference(example("?", reference="Paris"))
