"""Sources and schemas of every kind → Examples; error messages name the row."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dream_lightning.batch import Example
from dream_lightning.data.schemas import SCHEMAS, Schema, question, read_examples
from dream_lightning.errors import UserError

QA = [{"question": f"{i}+{i}?", "response": str(2 * i)} for i in range(5)]


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_s1k(tmp_path):
    row = {"question": "q", "thinking_trajectories": ["t"], "attempt": "a", "solution": "s"}
    path = write(tmp_path, [row])
    wanted = Example("train-1", ({"role": "user", "content": "q"},), "t", "a", "s", "train.jsonl, row 1")
    assert read_examples(path) == read_examples(path, schema="s1k") == [wanted]
    assert read_examples(path)[0].record == row


def test_s1k_11_gives_the_trace_that_is_asked_for(tmp_path):
    row = {"question": "q", "solution": "s"}
    for model in ("deepseek", "gemini"):
        row |= {f"{model}_thinking_trajectory": f"{model} t", f"{model}_attempt": f"{model} a"}
    path = write(tmp_path, [row])
    for schema, model in (("auto", "deepseek"), ("s1k-1.1", "deepseek"), ("s1k-1.1-gemini", "gemini")):
        (got,) = read_examples(path, schema=schema)
        assert (got.thinking, got.answer, got.reference) == (f"{model} t", f"{model} a", "s")


def test_a_schema_of_a_users_own_is_detected_first(tmp_path, monkeypatch):
    def read(row, columns):
        return question(row.text("response")), None, row.text(columns.reference)

    monkeypatch.setitem(SCHEMAS, "backwards", Schema(lambda names: "response" in names, read))
    (got,) = read_examples(write(tmp_path, [QA[1]]), reference_column="question")
    assert (got.prompt[0]["content"], got.answer, got.reference) == ("2", "1+1?", "1+1?")
    assert read_examples(tmp_path / "train.jsonl", schema="prompt-response")[0].answer == "2"


def test_a_records_own_task_and_id_take_precedence(tmp_path):
    rows = [{**QA[0], "id": "x", "task": "sudoku", "numbers": [1, 2]}, {**QA[1], "id": 5, "task": None}, QA[2]]
    got = read_examples(write(tmp_path, rows), task="countdown")
    assert [(e.id, e.task) for e in got] == [("x", "sudoku"), ("5", "countdown"), ("train-3", "countdown")]
    assert read_examples(tmp_path / "train.jsonl")[2].task is None
    assert got[0].record["numbers"] == [1, 2]


def test_messages_and_conversations_split_the_last_message(tmp_path):
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
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    renamed = [[{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]] for row in rows]
    assert read_examples(write(tmp_path, [{"conversations": messages} for messages in renamed])) == got


def test_prompt_and_response_by_usual_and_by_given_names(tmp_path):
    path = write(tmp_path, [{"prompt": "q", "completion": "<think>\nt\n</think>\na", "answer": 7, "other": "o"}])
    (got,) = read_examples(path)
    assert (got.prompt[0]["content"], got.thinking, got.answer, got.reference) == ("q", "t", "a", "7")
    (got,) = read_examples(path, prompt_column="other", response_column="prompt", reference_column="other")
    assert (got.prompt[0]["content"], got.thinking, got.answer, got.reference) == ("o", None, "q", "o")


@pytest.mark.parametrize(
    ("file", "count", "reference", "answered"),
    [
        ("math500/test.jsonl", 500, "\\left( 3, \\frac{\\pi}{2} \\right)", False),
        ("gsm8k/test.jsonl", 1319, "#### 18", False),
        ("s1k/s1k_questions_1000.jsonl", 1000, "A^2 + B^2 \\leq 1", False),
        ("s1k/s1k_gemini_traces.jsonl", 91, "", True),
    ],
)
def test_real_records(shared, file, count, reference, answered):
    got = read_examples(shared(f"data/{file}"))
    assert len(got) == len({e.id for e in got}) == count
    assert reference in got[0].reference and all(e.reference for e in got)
    assert {(bool(e.answer), bool(e.thinking)) for e in got} == {(answered, answered)}


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
    for name, remedy in (("e", "name the folder of one"), ("f", "name the file itself")):
        with pytest.raises(UserError, match=remedy):
            read_examples(tmp_path / name, split="validation")
    assert len(read_examples(tmp_path / "e" / "test", split="validation")) == 1


def test_blank_lines_and_line_separators_in_text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes('\ufeff{"question": "a\u2028b", "response": "c"}\n\n{"question": "d", "response": "e"}'.encode())
    got = read_examples(path)
    assert [e.prompt[0]["content"] for e in got] == ["a\u2028b", "d"]
    assert got[1].origin == "train.jsonl, row 3"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "has no rows"),
        ([QA[0], '{"question": "q", '], {}, "train.jsonl, row 2: not valid JSON"),
        ([QA[0], "[1]"], {}, "row 2 is a list, wanted a JSON object"),
        ([QA[0], "null"], {}, "row 2 is a NoneType, wanted a JSON object"),
        ([{"text": "x"}], {}, "has the columns text; wanted .* set prompt_column"),
        ([QA[0]], {"schema": "s1k"}, "row 1 has no column 'thinking_trajectories', it has question, response"),
        ([QA[0]], {"schema": "messages"}, "row 1 has no column 'messages'"),
        ([QA[0]], {"prompt_column": "quest"}, "row 1 has no column 'quest'"),
        ([QA[0]], {"reference_column": "gold"}, "row 1 has no column 'gold'"),
        ([QA[0], {"question": "q"}], {}, "row 2 has no column 'response'"),
        ([QA[0], {"question": None, "response": "r"}], {}, "row 2: question is null, wanted text"),
        ([{"question": "q", "response": 3}], {}, "row 1: response is a int, wanted text"),
        (
            [{"question": "q", "thinking_trajectories": [], "attempt": "a"}],
            {},
            "trajectories is \\[\\], wanted",
        ),
        ([{"question": "q", "thinking_trajectories": ["t"]}], {}, "no column 'attempt'"),
        ([QA[0], {"question": " \n", "response": "r"}], {}, "row 2 has an empty prompt"),
        ([{"instruction": "a", "input": "b"}], {}, "the columns instruction, input: set prompt_column to one"),
        ([{**QA[0], "id": 1}, {**QA[1], "id": 1}], {}, "row 2 has the id '1', and so has train.jsonl, row 1"),
        ([chat(("assistant", "a"))], {}, "row 1: no user message"),
        ([chat(("user", "q"), ("system", "s"))], {}, "no user message before .* the roles are user, system"),
        ([chat(("user", "q"), ("tool", "a"))], {}, "message 2 has the role 'tool' and a str, wanted one of system"),
        ([chat(("user", None), ("assistant", "a"))], {}, "message 1 has the role 'user' and a NoneType"),
        ([chat(("user", ""), ("assistant", "a"))], {}, "empty prompt"),
        ([{"messages": "hello"}], {}, "not a list of messages"),
        (QA, {"schema": "s2k"}, "schema is 's2k', wanted auto or one of prompt-response"),
    ],
)
def test_errors_name_the_row(tmp_path, rows, options, message):
    with pytest.raises(UserError, match=message):
        read_examples(write(tmp_path, rows), **options)


def test_a_subset_of_a_hub_data_set(monkeypatch):
    """GSM8K has two and no default: without a name the hub refuses."""

    def load(name, subset, *, split):
        assert (name, split) == ("openai/gsm8k", "train")
        if subset is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['main', …]")
        return [{"question": "1+1=?", "answer": f"2 of {subset}"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_examples("openai/gsm8k", subset="main")[0].reference == "2 of main"
    with pytest.raises(UserError, match=r"among the available configs.*check the name, the subset \(None\)"):
        read_examples("openai/gsm8k")


def test_errors_about_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("nowhere.jsonl", "data/nowhere.jsonl", "nowhere"):
        with pytest.raises(UserError, match="does not exist: name a file, a folder, or a hub data set"):
            read_examples(name)
    with pytest.raises(UserError, match=r"no file, folder or hub data set 'no-such/data-set'.*HF_HUB_OFFLINE"):
        read_examples("no-such/data-set")
    with pytest.raises(UserError, match=r"train.txt is a .txt file, wanted .jsonl"):
        read_examples(write(tmp_path, QA, "train.txt"))
    for name in ("broken.parquet", "broken.json"):
        with pytest.raises(UserError, match=name):
            read_examples(write(tmp_path, ["{"], name))
    with pytest.raises(UserError, match=r"a.csv, line 2: wanted 2 fields as in the header"):
        read_examples(write(tmp_path, ["question,response", "a,b,c"], "a.csv"))
