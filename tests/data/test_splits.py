"""Filters and splits are functions of the records."""

import pytest

from dream_lightning.batch import Example
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.sources import Row
from dream_lightning.data.splits import keep, mix, question_key, split, without_overlap
from dream_lightning.errors import UserError


def example(question, number=0):
    return Example(f"x-{number}", ({"role": "user", "content": question},), None, "a", None, f"x, row {number}")


def test_filters_keep_listed_values_of_every_column():
    rows = [Row({"kind": kind, "level": level}, "x", 0) for kind in "abc" for level in (1, 2)]
    assert len(keep(rows, {"kind": ["a", "b"]})) == 4
    got = keep(rows, {"kind": ["a", "b"], "level": ["2"]})
    assert [row.record for row in got] == [{"kind": "a", "level": 2}, {"kind": "b", "level": 2}]
    with pytest.raises(UserError, match="no column 'size', it has kind, level"):
        keep(rows, {"size": ["a"]})
    with pytest.raises(UserError, match=r"filters leave nothing: .* values found: a, b, c"):
        keep(rows, {"kind": ["x"]})


@pytest.mark.parametrize("seed", range(5))
def test_split_never_shares_a_question(seed):
    examples = [example(f"what is {i % 60}?" + " " * (i % 3), i) for i in range(100)]
    training, validation = split(examples, validation_fraction=0.2, seed=seed)
    assert sorted(e.id for e in training + validation) == sorted(e.id for e in examples)
    assert not {question_key(e) for e in training} & {question_key(e) for e in validation}
    assert 20 <= len(validation) <= 21
    assert split(examples[::-1], validation_fraction=0.2, seed=seed)[1] == validation[::-1]
    assert split(examples, validation_fraction=0.2, seed=seed + 1)[1] != validation


def test_split_is_exact_without_repeated_questions_and_refuses_an_empty_side():
    examples = [example(f"q{i}", i) for i in range(50)]
    assert len(split(examples, validation_fraction=0.1)[1]) == 5
    same = [example("same", i) for i in (1, 2)]
    for few, fraction in ((examples[:1], 0.5), (examples, 0.0), (examples, 1.0), (same, 0.5)):
        with pytest.raises(UserError, match=r"for training and .* for validation"):
            split(few, validation_fraction=fraction)


def test_question_key_ignores_spacing_and_punctuation_but_not_operators():
    assert question_key(example("Find  $2019^8+1$.")) == question_key(example("find $2019^8 + 1$ ."))
    assert len({question_key(example(q)) for q in ("3+4", "3-4", "34", "3,4", "!", "?")}) == 6


def test_the_three_s1k_questions_of_math_500(shared):
    kept, dropped = without_overlap(
        read_examples(shared("data/s1k/s1k_questions_1000.jsonl")), read_examples(shared("data/math500/test.jsonl"))
    )
    assert (len(kept), len(dropped)) == (997, 3)


def test_mixtures_have_the_shares_of_their_weights_and_every_example():
    parts = [[example("long question " * 5, i) for i in range(50)], [example("short", i) for i in range(7)]]
    for weights in ((1, 1), (1, 3), (9, 1)):
        mixed = mix(parts, dict(zip("ab", weights, strict=True)))
        long = sum(len(e.prompt[0]["content"]) + 1 for e in mixed if "long" in e.prompt[0]["content"])
        sizes = [long, sum(len(e.prompt[0]["content"]) + 1 for e in mixed) - long]
        assert sizes[0] / sum(sizes) == pytest.approx(weights[0] / sum(weights), rel=0.02)
        counts = [[sum(e is one for e in mixed) for one in part] for part in parts]
        assert all(min(count) >= 1 and max(count) <= min(count) + 1 for count in counts)
    assert mix(parts[:1], {"a": 3.0}) == parts[0]
    with pytest.raises(UserError, match="b has no text left to train on"):
        mix([parts[0], []], {"a": 1, "b": 1})
