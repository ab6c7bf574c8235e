import json
import re

import pytest

from dream_lightning.data.sample_set import _row, check_disjoint, sample_rows


@pytest.fixture(scope="module")
def train():
    return sample_rows("train")


@pytest.fixture(scope="module")
def validation():
    return sample_rows("validation")


def terms(row):
    return tuple(int(term, 2) for term in re.fullmatch(r"([01]{8})\+([01]{8})=\?", row["question"]).groups())


def test_a_sum_worked_out_by_hand():
    """45 + 86 = 131: 101101 + 1010110 = 10000011, with a carry into every column but the three on the right."""
    row = _row((45, 86))
    assert row["question"] == "00101101+01010110=?"
    assert row["thinking_trajectories"] == ["carries 11111000"]
    assert row["attempt"] == "\\boxed{10000011}"


def test_every_row_has_s1k_columns_and_a_true_answer(train, validation):
    for row in [*train, *validation]:
        a, b = terms(row)
        assert int(row["solution"], 2) == a + b
        assert row["attempt"] == f"\\boxed{{{row['solution']}}}"
        assert (row["cot_type"], row["source_type"]) == ("math", "binary_addition")
        assert json.loads(row["metadata"]) == {"a": a, "b": b, "sum": a + b}


def test_the_trace_is_the_carries_and_makes_every_column_add_up_on_its_own(train):
    for row in train[:2_000]:
        (trace,) = row["thinking_trajectories"]
        carries = trace.removeprefix("carries ")
        a, b = (term for term in row["question"].removesuffix("=?").split("+"))
        leaves = "0"  # what the columns so far leave for the next, from the right
        for x, y, c, z in reversed(list(zip(a, b, carries, row["solution"], strict=True))):
            assert c == leaves
            total = int(x) + int(y) + int(c)
            assert int(z) == total % 2
            leaves = str(total // 2)
        assert leaves == "0"


def test_all_texts_have_one_length(train, validation):
    for row in [*train, *validation]:
        assert [len(row["question"]), len(row["thinking_trajectories"][0]), len(row["attempt"])] == [19, 16, 16]


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
def test_the_largest_sizes_give_disjoint_splits(seed):
    sizes = {"seed": seed, "train_rows": 32_896 - 2 * 5_000, "validation_rows": 5_000}
    train, validation = sample_rows("train", **sizes), sample_rows("validation", **sizes)
    assert (len(train), len(validation)) == (22_896, 5_000)
    held_out = {frozenset(terms(row)) for row in validation}
    assert not [row for row in train if frozenset(terms(row)) in held_out]


def test_overlap_is_named(train):
    with pytest.raises(ValueError, match=re.escape(train[1]["question"])):
        check_disjoint(train, [train[1]])


def test_exchanged_terms_are_an_overlap():
    with pytest.raises(ValueError, match=r"01010110\+00101101=\? \(in training as 00101101\+01010110=\?\)"):
        check_disjoint([_row((45, 86))], [_row((86, 45))])
    check_disjoint([_row((45, 86))], [_row((45, 87))])


@pytest.mark.parametrize(
    ("split", "sizes", "match"),
    [
        ("test", {}, "no split 'test'"),
        ("train", {"train_rows": -1}, "cannot be had"),
        ("train", {"train_rows": 32_000}, "32,000 training"),
    ],
)
def test_wrong_arguments_are_refused(split, sizes, match):
    with pytest.raises(ValueError, match=match):
        sample_rows(split, **sizes)


def test_no_rows():
    assert sample_rows("train", train_rows=0) == []
    assert sample_rows("validation", validation_rows=0) == []
