"""The bundled set: true sums, traces that follow, disjoint splits."""

import json
import re

import pytest

from dream_lightning.data.additions import sample_row, sample_rows
from dream_lightning.errors import UserError


@pytest.fixture(scope="module")
def train():
    return sample_rows("train")


@pytest.fixture(scope="module")
def validation():
    return sample_rows("validation")


def terms(row):
    return tuple(int(term) for term in row["question"].removesuffix("=?").split("+"))


@pytest.mark.parametrize(
    ("pair", "trace", "attempt"),
    [
        ((457, 286), "06 13 13 011", "\\boxed{743}"),  # 7+6 = 13 carries 1, 5+8+1 = 14 carries 1, 4+2+1 = 7
        ((999, 101), "10 09 10 111", "\\boxed{1100}"),
        ((6406, 4089), "10 04 08 15 1001", "\\boxed{10495}"),
    ],
)
def test_sums_worked_out_by_hand(pair, trace, attempt):
    row = sample_row(pair)
    assert (row["question"], row["thinking_trajectories"]) == (f"{pair[0]}+{pair[1]}=?", [trace])
    assert row["attempt"] == attempt


@pytest.mark.parametrize("digits", [3, 8])
def test_every_row_has_s1k_columns_a_true_answer_and_a_trace_that_gives_it(digits):
    rows = sample_rows("train", train_rows=2_000, digits=digits)
    assert len({row["question"] for row in rows}) == 2_000
    for row in rows:
        assert re.fullmatch(rf"[1-9]\d{{{digits - 1}}}\+[1-9]\d{{{digits - 1}}}=\?", row["question"])
        a, b = terms(row)
        assert int(row["solution"]) == a + b and row["attempt"] == f"\\boxed{{{a + b}}}"
        assert (row["cot_type"], row["source_type"]) == ("math", "addition")
        assert json.loads(row["metadata"]) == {"a": a, "b": b, "sum": a + b}
        *sums, carries = row["thinking_trajectories"][0].split()
        carried, result = 0, ""
        for x, y, column, carry in reversed(list(zip(str(a), str(b), sums, carries, strict=True))):
            assert int(column) == int(x) + int(y)
            result = str((int(column) + carried) % 10) + result
            carried = (int(column) + carried) // 10
            assert carried == int(carry)
        assert int(f"{carried}{result}") == a + b


def test_a_pure_function_of_its_arguments(train, validation):
    assert (len(train), len(validation)) == (20_000, 500)
    assert sample_rows("validation", seed=1) != validation
    assert sample_rows("validation", train_rows=7) == validation
    assert sample_rows("train", train_rows=700) == train[:700]
    assert sample_rows("train", train_rows=0) == sample_rows("validation", validation_rows=0) == []


@pytest.mark.parametrize("seed", range(2))
def test_splits_share_no_sum_in_either_order(seed):
    sizes = {"seed": seed, "train_rows": 50_000, "validation_rows": 5_000}
    train, validation = sample_rows("train", **sizes), sample_rows("validation", **sizes)
    held_out = {frozenset(terms(row)) for row in validation}
    assert not [row for row in train if frozenset(terms(row)) in held_out]


@pytest.mark.parametrize(
    ("split", "sizes", "match"),
    [
        ("test", {}, "split is 'test'"),
        ("train", {"train_rows": -1}, "train_rows is -1"),
        ("train", {"train_rows": 500_000}, "train_rows is 500,000 .* at most 405,000"),
        ("train", {"digits": 2}, "at most 4,050 for sums of 2 digits"),
        ("train", {"digits": 0}, "digits is 0"),
    ],
)
def test_wrong_arguments_are_refused(split, sizes, match):
    with pytest.raises(UserError, match=match):
        sample_rows(split, **sizes)
