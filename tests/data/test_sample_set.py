import json
import re

import pytest

from dream_lightning.data.sample_set import check_disjoint, sample_rows


@pytest.fixture(scope="module")
def train():
    return sample_rows("train")


@pytest.fixture(scope="module")
def validation():
    return sample_rows("validation")


def parts(row):
    a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=\?", row["question"]).groups()
    return int(a), sign, int(b)


def said(row):
    return row["question"], row["thinking_trajectories"], row["attempt"]


def test_a_known_sum_and_a_known_difference(train):
    """Worked out by hand: 7+6=13 carries to the tens, 5+8+1=14 to the hundreds; 3<6 and 3<8 borrow."""
    from dream_lightning.data.sample_set import _row

    assert said(_row((457, "+", 286))) == ("457+286=?", ["carries 110"], "\\boxed{743}")
    assert said(_row((743, "-", 286))) == ("743-286=?", ["borrows 110"], "\\boxed{457}")
    assert said(_row((704, "-", 306))) == ("704-306=?", ["borrows 110"], "\\boxed{398}")  # a borrow that passes a zero


def test_every_row_has_s1k_columns_and_a_true_answer(train, validation):
    for row in [*train, *validation]:
        a, sign, b = parts(row)
        result = a + b if sign == "+" else a - b
        assert row["solution"] == str(result)
        assert row["attempt"] == f"\\boxed{{{result}}}"
        assert row["cot_type"] == "math"
        assert row["source_type"] == {"+": "addition", "-": "subtraction"}[sign]
        assert json.loads(row["metadata"]) == {"a": a, "sign": sign, "b": b}


def test_the_trace_makes_every_column_add_up_on_its_own(train):
    for row in train[:2_000]:
        a, sign, b = parts(row)
        (trace,) = row["thinking_trajectories"]
        word, received = trace.split(" ")
        assert word == {"+": "carries", "-": "borrows"}[sign]
        for x, y, c, z in zip(str(a), str(b), received, row["solution"], strict=True):
            own = int(x) + int(y) + int(c) if sign == "+" else int(x) - int(y) - int(c)
            assert own % 10 == int(z)


def test_all_texts_have_one_length(train, validation):
    lengths = {tuple(map(len, (q, *traces, attempt))) for q, traces, attempt in map(said, [*train, *validation])}
    assert lengths == {(9, 11, 11)}


def test_sizes_and_halves(train, validation):
    assert (len(train), len(validation)) == (20_000, 500)
    for rows in (train, validation):
        assert len({row["question"] for row in rows}) == len(rows)
        assert sum(row["source_type"] == "addition" for row in rows) * 2 == len(rows)


def test_a_pure_function_of_its_arguments(train, validation):
    assert sample_rows("train") == train
    assert sample_rows("validation", seed=1) != validation
    assert sample_rows("validation", train_rows=7) == validation
    assert sample_rows("train", train_rows=700) == train[:700]


@pytest.mark.parametrize("seed", range(3))
def test_splits_are_disjoint_with_many_validation_rows(seed):
    sizes = {"seed": seed, "train_rows": 30_000, "validation_rows": 20_000}
    check_disjoint(sample_rows("train", **sizes), sample_rows("validation", **sizes))


def test_overlap_is_named(train):
    with pytest.raises(ValueError, match=re.escape(train[1]["question"])):
        check_disjoint(train, [train[1]])


def test_exchanged_terms_are_an_overlap_for_sums_only():
    from dream_lightning.data.sample_set import _row

    with pytest.raises(ValueError, match=r"286\+457=\? \(in training as 457\+286=\?\)"):
        check_disjoint([_row((457, "+", 286))], [_row((286, "+", 457))])
    check_disjoint([_row((743, "-", 286)), _row((457, "+", 286))], [_row((743, "-", 457)), _row((457, "+", 287))])


@pytest.mark.parametrize(
    ("split", "sizes", "match"),
    [
        ("test", {}, "no split 'test'"),
        ("train", {"train_rows": -1}, "cannot be had"),
        ("train", {"train_rows": 600_000}, "600,000 training"),
    ],
)
def test_wrong_arguments_are_refused(split, sizes, match):
    with pytest.raises(ValueError, match=match):
        sample_rows(split, **sizes)


def test_no_rows():
    assert sample_rows("train", train_rows=0) == []
    assert sample_rows("validation", validation_rows=0) == []
