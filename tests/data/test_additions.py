import json
import re

import pytest

from dream_lightning.data.additions import check_disjoint, sample_row, sample_rows


@pytest.fixture(scope="module")
def train():
    return sample_rows("train")


@pytest.fixture(scope="module")
def validation():
    return sample_rows("validation")


def terms(row):
    return tuple(int(term) for term in re.fullmatch(r"([1-9]\d\d)\+([1-9]\d\d)=\?", row["question"]).groups())


def test_sums_worked_out_by_hand():
    """457 + 286: 7+6 = 13 passes 1, 5+8 = 13 and 1 pass 1, 4+2 = 6 and 1 pass nothing."""
    row = sample_row((457, 286))
    assert row["question"] == "457+286=?"
    assert row["thinking_trajectories"] == ["06 13 13 011"]
    assert row["attempt"] == "\\boxed{743}"
    assert sample_row((999, 101))["thinking_trajectories"] == ["10 09 10 111"]


def test_sums_of_more_digits(tmp_path):
    """6406 + 4089: 6+9 = 15 passes 1, 0+8 and 1 pass nothing, 4+0 nothing, 6+4 = 10 pass 1."""
    assert sample_row((6406, 4089))["thinking_trajectories"] == ["10 04 08 15 1001"]
    rows = sample_rows("train", train_rows=500, digits=8)
    assert len({row["question"] for row in rows}) == 500
    assert all(re.fullmatch(r"[1-9]\d{7}\+[1-9]\d{7}=\?", row["question"]) for row in rows)
    check_disjoint(rows, sample_rows("validation", digits=8))
    with pytest.raises(ValueError, match="sums of 0 digits"):
        sample_rows("train", digits=0)
    with pytest.raises(ValueError, match="together at most 4,050"):
        sample_rows("train", digits=2)


def test_every_row_has_s1k_columns_and_a_true_answer(train, validation):
    for row in [*train, *validation]:
        a, b = terms(row)
        assert int(row["solution"]) == a + b
        assert row["attempt"] == f"\\boxed{{{row['solution']}}}"
        assert (row["cot_type"], row["source_type"]) == ("math", "addition")
        assert json.loads(row["metadata"]) == {"a": a, "b": b, "sum": a + b}


def test_the_trace_makes_every_column_add_up_on_its_own(train):
    for row in train[:2_000]:
        *sums, carries = row["thinking_trajectories"][0].split()
        a, b = row["question"].removesuffix("=?").split("+")
        passed, digits = 0, ""
        for x, y, column, carry in reversed(list(zip(a, b, sums, carries, strict=True))):
            assert int(column) == int(x) + int(y)
            digits = str((int(column) + passed) % 10) + digits
            passed = (int(column) + passed) // 10
            assert passed == int(carry)
        assert int(f"{passed}{digits}") == int(row["solution"])


def test_sizes_and_no_question_twice(train, validation):
    assert (len(train), len(validation)) == (20_000, 500)
    for rows in (train, validation):
        assert len({row["question"] for row in rows}) == len(rows)


def test_a_pure_function_of_its_arguments(train, validation):
    assert sample_rows("train") == train
    assert sample_rows("validation", seed=1) != validation
    assert sample_rows("validation", train_rows=7) == validation
    assert sample_rows("train", train_rows=700) == train[:700]


@pytest.mark.parametrize("seed", range(3))
def test_large_sizes_give_disjoint_splits(seed):
    sizes = {"seed": seed, "train_rows": 50_000, "validation_rows": 5_000}
    train, validation = sample_rows("train", **sizes), sample_rows("validation", **sizes)
    held_out = {frozenset(terms(row)) for row in validation}
    assert not [row for row in train if frozenset(terms(row)) in held_out]


def test_overlap_is_named(train):
    with pytest.raises(ValueError, match=re.escape(train[1]["question"])):
        check_disjoint(train, [train[1]])


def test_exchanged_terms_are_an_overlap():
    with pytest.raises(ValueError, match=r"286\+457=\? \(in training as 457\+286=\?\)"):
        check_disjoint([sample_row((457, 286))], [sample_row((286, 457))])
    check_disjoint([sample_row((457, 286))], [sample_row((457, 287))])


@pytest.mark.parametrize(
    ("split", "sizes", "match"),
    [
        ("test", {}, "no split 'test'"),
        ("train", {"train_rows": -1}, "cannot be had"),
        ("train", {"train_rows": 500_000}, "500,000 training"),
    ],
)
def test_wrong_arguments_are_refused(split, sizes, match):
    with pytest.raises(ValueError, match=match):
        sample_rows(split, **sizes)


def test_no_rows():
    assert sample_rows("train", train_rows=0) == []
    assert sample_rows("validation", validation_rows=0) == []
