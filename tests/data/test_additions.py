"""The bundled set: true sums, traces that follow, disjoint splits."""

import json
import re

import pytest

from dream_lightning.data.additions import sample_row, sample_rows


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
    row = sample_row(*pair)
    assert (row["thinking_trajectories"], row["attempt"]) == ([trace], attempt)


@pytest.fixture(scope="module")
def train():
    return sample_rows("train")


def test_every_row_has_s1k_columns_a_true_answer_and_a_trace_that_gives_it(train):
    for row in train:
        assert re.fullmatch(r"[1-9]\d\d\+[1-9]\d\d=\?", row["question"])
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


def test_splits_are_fixed_and_share_no_sum_in_either_order(train):
    validation = sample_rows("validation")
    assert train == sample_rows("train")
    assert (len({terms(row) for row in train}), len({terms(row) for row in validation})) == (20_000, 500)
    assert not {frozenset(terms(row)) for row in train} & {frozenset(terms(row)) for row in validation}
