"""Files of every kind → Examples; what is wrong with a file is said with its row; subsets are functions of records."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dream_lightning.batch import Example
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.splits import first, fraction_of, question_key, split, without_overlap

QA = [{"question": f"{i}+{i}?", "response": str(2 * i)} for i in range(5)]


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def example(question, number=0):
    return Example(f"x-{number}", ({"role": "user", "content": question},), None, "a", None, f"x, row {number}")


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ── schemas ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_s1k(tmp_path):
    row = {"question": "q", "thinking_trajectories": ["t"], "attempt": "a", "solution": "s"}
    (got,) = read_examples(write(tmp_path, [row]))
    wanted = Example("train-1", ({"role": "user", "content": "q"},), "t", "a", "s", "train.jsonl, row 1")
    assert got == wanted
    assert read_examples(write(tmp_path, [row]), schema="s1k") == [wanted]


def test_s1k_11_gives_the_trace_that_is_asked_for(tmp_path):
    row = {"question": "q", "solution": "s"}
    for who in ("deepseek", "gemini"):
        row |= {f"{who}_thinking_trajectory": f"{who} t", f"{who}_attempt": f"{who} a"}
    path = write(tmp_path, [row])
    for trace, (got,) in {who: read_examples(path, trace=who) for who in ("deepseek", "gemini")}.items():
        assert (got.thinking, got.answer, got.reference) == (f"{trace} t", f"{trace} a", "s")


def test_messages_split_the_last_turn(tmp_path):
    rows = [
        chat(("system", "s"), ("user", "1"), ("assistant", "<think>x</think>kept"), ("user", "2"), ("assistant", "a")),
        chat(("user", "q"), ("assistant", "<think>\nt\n</think>\na")),
        chat(("user", "q")),
        chat(("user", "q"), ("assistant", "<think>never closed")),
    ]
    got = read_examples(write(tmp_path, rows))
    assert [len(e.prompt) for e in got] == [4, 1, 1, 1]
    assert got[0].prompt[2]["content"] == "<think>x</think>kept"
    assert [(e.thinking, e.answer) for e in got] == [(None, "a"), ("t", "a"), (None, ""), (None, "<think>never closed")]


def test_conversations_are_messages_by_other_names(tmp_path):
    turns = [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "q"), ("gpt", "<think>t</think>a"))]
    (got,) = read_examples(write(tmp_path, [{"conversations": turns}]))
    (wanted,) = read_examples(
        write(tmp_path, [chat(("system", "s"), ("user", "q"), ("assistant", "<think>t</think>a"))])
    )
    assert got == wanted


def test_prompt_and_response_by_usual_and_by_given_names(tmp_path):
    path = write(tmp_path, [{"prompt": "q", "completion": "<think>\nt\n</think>\na", "answer": 7, "other": "o"}])
    (got,) = read_examples(path)
    assert (got.prompt[0]["content"], got.thinking, got.answer, got.reference) == ("q", "t", "a", "7")
    (got,) = read_examples(path, prompt_column="other", response_column="prompt", reference_column="other")
    assert (got.prompt[0]["content"], got.thinking, got.answer, got.reference) == ("o", None, "q", "o")


def test_own_ids_are_kept(tmp_path):
    got = read_examples(write(tmp_path, [{**QA[0], "id": "x"}, {**QA[1], "id": 5}]))
    assert [e.id for e in got] == ["x", "5"]


@pytest.mark.parametrize(
    ("file", "count", "reference"),
    [
        ("math500/test.jsonl", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("gsm8k/test.jsonl", 1319, "#### 18"),
        ("s1k/s1k_questions_1000.jsonl", 1000, "A^2 + B^2 \\leq 1"),
    ],
)
def test_real_questions_without_answers(shared, file, count, reference):
    got = read_examples(shared(f"data/{file}"))
    assert len(got) == len({e.id for e in got}) == count
    assert reference in got[0].reference
    assert all(e.answer == "" and e.thinking is None and e.reference for e in got)


def test_real_s1k(shared):
    got = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))
    assert len(got) == 91
    assert all(e.thinking and e.answer and e.reference for e in got)
    math = read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"), filters={"cot_type": ["math"]})
    assert 0 < len(math) < 91


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_source_gives_the_same(tmp_path):
    wanted = [(e.prompt, e.answer) for e in read_examples(write(tmp_path, QA))]
    (tmp_path / "a.json").write_text(json.dumps(QA))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), tmp_path / "b.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, QA[0])
        table.writeheader()
        table.writerows(QA)
    datasets.Dataset.from_list(QA).save_to_disk(str(tmp_path / "d"))
    both = {"train": datasets.Dataset.from_list(QA), "test": datasets.Dataset.from_list(QA[:1])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "e"))
    (tmp_path / "f" / "data").mkdir(parents=True)
    write(tmp_path / "f" / "data", QA[:2], "train-0.jsonl")
    write(tmp_path / "f" / "data", QA[2:], "train-1.jsonl")
    write(tmp_path / "f" / "data", QA[:1], "test.jsonl")
    for name in ("a.json", "b.parquet", "c.csv", "d", "e", "f"):
        got = read_examples(tmp_path / name)
        assert [(e.prompt, e.answer) for e in got] == wanted, name
        assert len({e.id for e in got}) == len(QA)
    assert len(read_examples(tmp_path / "e", split="test")) == len(read_examples(tmp_path / "f", split="test")) == 1
    for name, remedy in (("e", "name the folder of one of them"), ("f", "name the file itself")):
        with pytest.raises(ValueError, match=remedy):
            read_examples(tmp_path / name, split="validation")
    assert len(read_examples(tmp_path / "e" / "test", split="validation")) == 1


def test_blank_lines_and_line_separators_in_text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes('\ufeff{"question": "a\u2028b", "response": "c"}\n\n{"question": "d", "response": "e"}'.encode())
    got = read_examples(path)
    assert [e.prompt[0]["content"] for e in got] == ["a\u2028b", "d"]
    assert got[1].origin == "train.jsonl, row 3"


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "has no rows"),
        ([QA[0], '{"question": "q", '], {}, "train.jsonl, row 2: not valid JSON"),
        ([QA[0], "[1]"], {}, "row 2 is a list, wanted a JSON object"),
        ([{"text": "x"}], {}, "has the columns text; wanted .* set prompt_column"),
        ([QA[0]], {"schema": "s1k"}, "row 1 has no column 'thinking_trajectories', it has question, response"),
        ([QA[0]], {"schema": "messages"}, "row 1 has no column 'messages'"),
        ([QA[0]], {"prompt_column": "quest"}, "row 1 has no column 'quest'"),
        ([QA[0]], {"reference_column": "gold"}, "row 1 has no column 'gold'"),
        ([QA[0], {"question": "q"}], {}, "row 2 has no column 'response'"),
        ([QA[0], {"question": None, "response": "r"}], {}, "row 2: question is null, wanted text"),
        ([{"question": "q", "response": 3}], {}, "row 1: response is a int, wanted text"),
        ([{"question": "q", "thinking_trajectories": [], "attempt": "a"}], {}, "thinking_trajectories is a list"),
        ([{"question": "q", "thinking_trajectories": ["t"]}], {}, "no column 'attempt'"),
        ([QA[0], {"question": " \n", "response": "r"}], {}, "row 2 has an empty prompt"),
        ([{"instruction": "a", "input": "b"}], {}, "instruction and input: set prompt_column"),
        ([{**QA[0], "id": 1}, {**QA[1], "id": 1}], {}, "row 2 has the id '1', and so has train.jsonl, row 1"),
        ([chat(("assistant", "a"))], {}, "row 1: no user's turn"),
        (
            [chat(("user", "q"), ("assistant", "a"), ("system", "s"))],
            {},
            "no user's turn before .* user, assistant, system",
        ),
        ([chat(("user", "q"), ("tool", "a"))], {}, "turn 2 has the role 'tool', wanted system, user or assistant"),
        ([chat(("user", None), ("assistant", "a"))], {}, "turn 1 has no text"),
        ([chat(("user", ""), ("assistant", "a"))], {}, "empty prompt"),
        ([{"messages": "hello"}], {}, "not a list of turns"),
        (QA, {"filters": {"kind": ["a"]}}, "no column 'kind' to filter by"),
        (QA, {"filters": {"response": ["x"]}}, "filters leave nothing: .* values found: 0, 2, 4"),
    ],
)
def test_errors_name_the_row(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path, rows), **options)


def test_a_subset_of_a_hub_data_set(monkeypatch):
    """GSM8K has two and no default: without a name the hub refuses."""

    def load(name, subset, *, split):
        assert (name, split) == ("openai/gsm8k", "train")
        if subset is None:
            raise ValueError(
                "Config name is missing. Please pick one among the available configs: ['main', 'socratic']"
            )
        return [{"question": "1+1=?", "answer": f"2 of {subset}"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_examples("openai/gsm8k", subset="main")[0].reference == "2 of main"
    with pytest.raises(ValueError, match=r"among the available configs.*Check the name, the subset \(None\)"):
        read_examples("openai/gsm8k")


def test_errors_about_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("nowhere.jsonl", "data/nowhere.jsonl", "nowhere"):
        with pytest.raises(ValueError, match="does not exist: name a file, a folder, or a hub data set"):
            read_examples(name)
    with pytest.raises(ValueError, match=r"no data from 'no-such/data-set'.*HF_HUB_OFFLINE"):
        read_examples("no-such/data-set")
    with pytest.raises(ValueError, match=r"train.txt is a .txt file, wanted .jsonl"):
        read_examples(write(tmp_path, QA, "train.txt"))
    for name in ("broken.parquet", "broken.json"):
        with pytest.raises(ValueError, match=name):
            read_examples(write(tmp_path, ["{"], name))
    with pytest.raises(ValueError, match="row 1 has not as many fields as the header"):
        read_examples(write(tmp_path, ["question,response", "a,b,c"], "a.csv"))


# ── subsets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_filters_keep_listed_values_of_every_column(tmp_path):
    rows = [{**QA[0], "kind": kind, "level": level} for kind in "abc" for level in (1, 2)]
    path = write(tmp_path, rows)
    assert len(read_examples(path, filters={"kind": ["a", "b"]})) == 4
    got = read_examples(path, filters={"kind": ["a", "b"], "level": ["2"]})
    assert [e.origin for e in got] == ["train.jsonl, row 2", "train.jsonl, row 4"]


@pytest.mark.parametrize("seed", range(5))
def test_split_never_shares_a_question(seed):
    examples = [example(f"what is {i % 60}?" + " " * (i % 3), i) for i in range(100)]
    training, validation = split(examples, validation_fraction=0.2, seed=seed)
    assert sorted(e.id for e in training + validation) == sorted(e.id for e in examples)
    assert not {question_key(e) for e in training} & {question_key(e) for e in validation}
    assert 20 <= len(validation) <= 21
    assert split(examples[::-1], validation_fraction=0.2, seed=seed)[1] == validation[::-1]


def test_split_depends_on_the_seed_and_refuses_an_empty_side():
    examples = [example(f"q{i}", i) for i in range(50)]
    assert split(examples, seed=0) != split(examples, seed=1)
    assert len(split(examples, validation_fraction=0.1)[1]) == 5
    for few, fraction in (
        (examples[:1], 0.5),
        (examples, 0.0),
        (examples, 1.0),
        ([example("same", i) for i in (1, 2)], 0.5),
    ):
        with pytest.raises(ValueError, match=r"for training and .* for validation"):
            split(few, validation_fraction=fraction)


def test_fraction_and_first():
    examples = [example(f"q{i}", i) for i in range(50)]
    tenth, half = fraction_of(examples, 0.1), fraction_of(examples, 0.5)
    assert (len(tenth), len(half)) == (5, 25)
    assert {e.id for e in tenth} < {e.id for e in half}
    assert half == [e for e in examples if e in half]
    assert first(examples, 3) == examples[:3]
    for bad in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="fraction is"):
            fraction_of(examples, bad)


def test_question_key_ignores_spacing_and_punctuation_but_not_operators():
    def key(question):
        return question_key(example(question))

    assert key("Find  $2019^8+1$.") == key("find $2019^8 + 1$ .")
    assert len({key("3+4"), key("3-4"), key("34"), key("3,4"), key("!"), key("?")}) == 6


def test_the_three_s1k_questions_of_math_500(shared):
    kept, dropped = without_overlap(
        read_examples(shared("data/s1k/s1k_questions_1000.jsonl")), read_examples(shared("data/math500/test.jsonl"))
    )
    assert (len(kept), len(dropped)) == (997, 3)
