import itertools
import json

import pytest
from test_registry import example

from dream_lightning.errors import UserError
from dream_lightning.tasks import countdown, grade_response
from dream_lightning.tasks.countdown import is_solution

PROBLEM = [30, 100, 93], 23


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        *((text, PROBLEM) for text in ("30+93-100", "30 + 93 - 100 = 23", "(30 − (100 - 93))", "$93-(100-30)$")),
        ("-100+93+30", PROBLEM),
        (r"30 \times 93 / 93 - 7", ([30, 93, 93, 7], 23)),
        *((text, PROBLEM) for text in ("30+93=123,123-100=23", "30 + 93 = 123\n123 − 100 = 23", "100-93=7; 30-7=23")),
        ("8/(3-8/3)", ([8, 3, 8, 3], 24)),  # exact in fractions
    ],
)
def test_a_solution(expression, problem):
    assert is_solution(expression, problem)


@pytest.mark.parametrize(
    "expression",
    [
        "", "23", "30+93", "30+93-100+0", "30+30+93-100-30", "30+93-100=24", "30+93-100=23=23", "30*93-100",
        "100/(30-30)+93", "9**9**9**9", "30//1", "30+93-100 if 1 else 0", "__import__('os')", "(lambda: 23)()",
        "30.0+93-100", "0x1e+93-100", "30+93=124,124-100=24", "30+93=123", "30+93=123,93-70=23",
        "30+93=123,123-100=24", "030+93-100", "30+93-100)", "(" * 150, "-" * 190 + "1", "1+" * 5000 + "1",
        "9" * 5000, "30(93)", "30,93", "\x00", "[30]",
    ],
)  # fmt: skip
def test_wrong_or_hostile_expressions(expression):
    assert is_solution(expression, PROBLEM) is False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"First 30+93=123. \boxed{30+93-100}", "30+93-100"), ("I get 23", None), ("", None),
        ("The answer is 30 + 93 - 100 = 23.", "30 + 93 - 100 = 23"),
        ("30+1 <answer> 30+93-100 </answer> since 93-100 = -7", "30+93-100"),
        ("30+93=123, 123-100=23, so (30 + 93) - 100 = 23", "(30 + 93) - 100 = 23"),
        ("The answer is 23: 30+93-100", "30+93-100"),
        ("Step 1: 30+93=123\nStep 2: 123-100=23", "30+93=123\n 123-100=23"),
        ("so 30 × 93 ÷ 93 − 7", "30 * 93 / 93 - 7"),
    ],
)  # fmt: skip
def test_extract(response, answer):
    assert countdown.extract(response) == answer


@pytest.mark.parametrize("names", [("input", "output"), ("nums", "target"), ("Numbers", "Target")])
@pytest.mark.parametrize(("numbers", "target"), [([30, 100, 93], 23), ("30,100,93", "23"), ("[30 100 93]", " 23")])
def test_columns_in_use(names, numbers, target):
    assert countdown.reference(example("?", **dict(zip(names, (numbers, target), strict=True)))) == PROBLEM


@pytest.mark.parametrize("record", [{}, {"nums": [30, 1.5], "target": 23}, {"nums": [30, 100], "target": "much"}])
def test_a_malformed_record_is_an_error(record):
    with pytest.raises(UserError, match=r"^rows.jsonl, row 1 has the numbers"):
        countdown.reference(example("Make it.", **record))


def test_real_rows_have_a_solution_that_is_accepted(shared):
    lines = shared("data/countdown/countdown_cd3_test.jsonl").read_text().splitlines()[:60]
    for row in map(json.loads, lines):
        asked = example(row["input"], task="countdown", **row)
        candidates = (
            form.format(a, x, b, y, c)
            for a, b, c in itertools.permutations(row["input"].split(","))
            for x, y in itertools.product("+-*/", repeat=2)
            for form in ("({}{}{}){}{}", "{}{}({}{}{})")
        )
        assert any(grade_response(rf"\boxed{{{candidate}}}", asked).correct for candidate in candidates)
        assert not grade_response(row["output"], asked).correct
