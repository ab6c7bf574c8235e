"""Sources and schemas of every kind → Examples; error messages name the row."""

import csv
import gzip
import io
import itertools
import json
import math
import os
import re

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


def test_a_records_own_task_and_id_take_precedence_and_the_task_words_the_prompt(tmp_path):
    rows = [{**QA[0], "id": "x", "task": "exact", "kept": [1, 2]}, {**QA[1], "id": 5, "task": None}, QA[2]]
    got = read_examples(write(tmp_path, rows), task="choice")
    assert [(e.id, e.task) for e in got] == [("x", "exact"), ("5", "choice"), ("train-3", "choice")]
    assert read_examples(tmp_path / "train.jsonl")[2].task is None
    assert got[0].record["kept"] == [1, 2]
    puzzle = {"question": "?", "numbers": [1, 2], "target": 3}
    (got,) = read_examples(write(tmp_path, [puzzle]), task="countdown")
    assert "Use each of the numbers 1, 2 exactly once" in got.prompt[0]["content"]


ABSENT = [{}, {"answer": None}, {"answer": ""}, {"answer": " "}, {"answer": math.nan}]


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("kind", [QA[0], {**chat(("user", "0+0?"), ("assistant", "0")), "other": 1}])
def test_columns_come_from_all_rows_whatever_their_order(tmp_path, kind, absent):
    rows = [{**kind, "id": n, "answer": answer} for n, answer in enumerate(("x", 2, 3.0, 2.5))]
    rows += [{**{k: v for k, v in kind.items() if k != "response"}, "id": 4, **absent}]
    for order in itertools.permutations(rows):
        got = {e.id: e for e in read_examples(write(tmp_path, order))}
        assert [got[str(n)].reference for n in range(5)] == ["x", "2", "3", "2.5", None]
        assert [bool(got[str(n)].answer) for n in range(5)] == [True] * 4 + ["messages" in kind]


def test_thinking_and_system_fields_are_read(tmp_path):
    one = {"prompt": "q", "response": "a", "reasoning_content": "t\n", "system": "S"}
    last = {"role": "assistant", "content": "a", "reasoning_content": "t\n", "name": None, "tool_calls": []}
    first = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "reasoning_content": "3"}]
    two = {"messages": [*first, {"from": "human", "value": "q", "role": None}, last], "system": "S", "tools": []}
    for row in (one, two):
        (got,) = read_examples(write(tmp_path, [row]))
        assert (got.thinking, got.answer, got.prompt[0]) == ("t\n", "a", {"role": "system", "content": "S"})
    assert got.prompt[2]["content"] == "<think>\n3\n</think>\n2"


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


ASK = [{"role": "user", "content": "1+1?"}]
SAY = [{"role": "assistant", "content": "<think>\nt\n</think>\n2"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}, *SAY]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "1+1?", "input": "", "output": SAY[0]["content"]},
        {"instruction": "1+1?", "input": None, "output": "2", "reasoning_content": "t"},
        {"prompt": "1+1?", "completion": SAY[0]["content"]}, {"prompt": ASK, "completion": SAY},
        {"prompt": ASK, "completion": SAY[0]["content"]}, {"prompt": "1+1?", "completion": SAY}, {"messages": PARTS},
    ],
)  # fmt: skip
def test_formats_of_other_programs(tmp_path, row):
    both = {"instruction": "Add.", "input": "1+1", "output": "2"}  # for `auto`, some row has an input
    rows = [row | {"system": "S"}, *([both] if "instruction" in row else [])]
    got, *more = read_examples(write(tmp_path, rows))
    assert got.prompt == ({"role": "system", "content": "S"}, *ASK) and (got.thinking, got.answer) == ("t", "2")
    assert all(e.prompt[0]["content"] == "Add.\n1+1" for e in more)


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
        ([QA[0], '{"question": "q", '], {}, "row 2 is damaged or no valid JSON"),
        ([QA[0], "[1]"], {}, "row 2 is a list, wanted a JSON object"),
        ([{"body": "x"}], {}, "has the columns body; wanted .* set prompt_column"),
        ([QA[0]], {"schema": "s1k"}, "row 1 has no column 'thinking_trajectories', it has question, response"),
        ([QA[0]], {"prompt_column": "quest"}, "row 1 has no column 'quest'"),
        ([QA[0]], {"reference_column": "gold"}, "row 1 has no column 'gold'"),
        ([QA[0], '{"question": "q", "question": "r"}'], {}, "row 2 .*'question' more than once"),
        ([QA[0], {"question": "\ud83d", "response": "r"}], {}, r"row 2 has half a surrogate pair in .*\\ud83d"),
        ([QA[0], {**QA[1], "deep": [{"\udc00": 1}]}], {}, "train.jsonl, row 2 has half a surrogate pair"),
        ([QA[0], '{"question": ' + "9" * 5000 + "}"], {}, "row 2 is damaged or no valid JSON .ValueError: Exceeds"),
        ([QA[0], "[" * 10**5 + "]" * 10**5], {}, "row 2 is damaged or no valid JSON .RecursionError"),
        ([{**QA[0], "reasoning_content": "t", "response": "<think>x</think>2"}], {}, "row 1: reasoning_content"),
        ([{**QA[0], "reasoning_content": ["t"]}], {}, "row 1: reasoning_content is no text"),
        ([{**chat(("user", "q")), "functions": [1]}], {}, "row 1 has functions, which is not read"),
        ([{**chat(("user", "q")), "tools": [1]}], {}, r"row 1: tools is \[1\], wanted a list of objects"),
        ([{**chat(("user", "q")), "tools": "[{"}], {}, "row 1: tools is damaged or no valid JSON"),
        ([chat(("user", [{"type": "image_url"}]))], {}, "message 1 has a content part 'image_url', wanted text"),
        ([chat(("user", ["x"]))], {}, "message 1 has a content part 'str', wanted text"),
        ([{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}], {}, "row 1 has a history"),
        ([{"prompt": [{"role": "user", "content": "q"}], "completion": 3}], {}, "row 1, message 2 .* a int, wanted"),
        ([{**chat(("system", "s"), ("user", "q")), "system": "S"}], {}, "message 1 is a system message, and so is"),
        ([{"messages": [{"role": "user", "content": "q", "name": "n"}]}], {}, r"message 1 \(user\) has name, which"),
        ([{"messages": [{"role": "assistant", "tool_calls": [1]}]}], {}, r"message 1: tool_calls is \[1\], wanted"),
        ([{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}], {}, "a tool call is .*'arguments'"),
        ([{"messages": [{"role": "user", "content": "q", "tool_calls": [{}]}]}], {}, r"\(user\) has tool_calls, which"),
        ([{"messages": [{"role": "user", "content": "q", "reasoning_content": "t"}]}], {}, "has reasoning_content,"),
        ([QA[0], {"question": None, "response": "r"}], {}, "row 2: question is null, wanted text"),
        ([{"question": "q", "response": 3}], {}, "row 1: response is a int, wanted text"),
        ([{"question": "q", "thinking_trajectories": [], "attempt": "a"}], {}, r"trajectories is \[\], wanted"),
        ([QA[0], {"question": " \n", "response": "r"}], {}, "row 2 has an empty prompt"),
        ([{"instruction": "a", "input": "b"}], {}, "set prompt_column to one of the columns instruction, input"),
        ([{**QA[0], "id": 1}, {**QA[1], "id": 1}], {}, "row 2 has the id '1', and so has train.jsonl, row 1"),
        ([chat(("assistant", "a"))], {}, "row 1: no user message"),
        ([chat(("user", "q"), ("system", "s"))], {}, "no user message before .* the roles are user, system"),
        ([chat(("user", "q"), ("bot", "a"))], {}, "message 2 has the role 'bot' and a str, wanted one of system"),
        ([chat(("user", None), ("assistant", "a"))], {}, "message 1 has the role 'user' and a NoneType"),
        ([{"messages": "hello"}], {}, "not a list of messages"),
        (QA, {"schema": "s2k"}, "schema is 's2k', wanted auto or one of text, prompt-response"),
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
    with pytest.raises(UserError, match=r"no-such/data-set .* hub data set.*check the name, .*HF_HUB_OFFLINE"):
        read_examples("no-such/data-set")
    for name in ("x" * 5000, "x/" * 3000, "~no-such-user/x.jsonl"):
        with pytest.raises(UserError, match=f"^{name[:20]}"):
            read_examples(name)


def parquet(rows, damage=False, names=None):
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    pyarrow.parquet.write_table(table.rename_columns(names) if names else table, file, compression="snappy")
    content = bytearray(file.getvalue())
    if damage:
        content[4:40] = bytes(reversed(content[4:40]))
    return bytes(content)


LINES = "".join(json.dumps(row) + "\n" for row in QA).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", LINES, "is a .tsv file, wanted .jsonl"),
        ("a.json", b"{", "is damaged or no valid JSON"),
        ("a.json", b"{}", "holds a dict, wanted a list"),
        ("a.json", rb'[{"question": "\ud83d\ude00"}, {"question": "\ud83d"}]', "row 2 has half a surrogate pair"),
        ("a.json", b"\xff\xfe" + LINES.decode().encode("utf-16-le"), "is UTF-16 text, wanted a .json file"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 text, wanted a .jsonl file"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "is binary data or UTF-16 text, wanted"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "is gzip, wanted a .jsonl file: unpack"),
        ("a.parquet", gzip.compress(LINES, mtime=0), "is gzip, wanted a .parquet file: unpack"),
        ("a.csv", parquet(QA), "is parquet, wanted a .csv file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is the pointer of a git-lfs file"),
        ("a.jsonl", b"<!DOCTYPE html>", "is a web page"),
        ("a.jsonl", b'{"question": "\xe9"}', "row 1 is damaged or no valid JSON .UnicodeDecodeError"),
        ("a.parquet", LINES, "is damaged or no .parquet file .ArrowInvalid"),
        ("a.parquet", parquet(QA)[:-100], "is damaged or no .parquet file"),
        ("a.parquet", parquet(QA * 999, damage=True), "cannot be read|is damaged"),
        ("a.parquet", parquet(QA, names=["question", "question"]), "has 'question' more than once"),
        ("a.csv", b"question,response\na,b,c\n", "line 2: wanted 2 fields as in the header"),
        ("a.csv", b"question,response,question\na,b,c\n", "has 'question' more than once"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read_examples(tmp_path / name)


def test_what_is_no_file_and_damaged_folders_are_named(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    for source in (tmp_path, tmp_path / "train.jsonl", "/dev/null"):
        with pytest.raises(UserError, match=r"(train.jsonl|null) is a pipe or device, wanted a regular file"):
            read_examples(source)
    (tmp_path / "x" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train.jsonl is a folder, wanted a regular file"):
        read_examples(tmp_path / "x")
    for number, damage in enumerate((b"", b"x", b"ARROW1\0\0", b"{}")):
        for file in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
            folder = tmp_path / f"{number}-{file}"
            datasets.Dataset.from_list(QA).save_to_disk(str(folder))
            (folder / file).write_bytes(damage)
            if (file, damage) != ("dataset_info.json", b"{}"):
                with pytest.raises(UserError, match=re.escape(folder.name)):
                    read_examples(folder)


def test_look_alikes_of_a_splits_files_are_not_read_and_named(tmp_path):
    read = ["train.jsonl", "train-1.jsonl", "train_2.jsonl", "train.3.jsonl", "train-00000-of-00004.jsonl"]
    read += ["train-00001-of-00004-0123456789abcdef.jsonl"]
    ignored = ["training_old.jsonl", "train_backup.jsonl", "train1.jsonl", "train_stats.json", "trainer_state.json"]
    for name in read + ignored:
        write(tmp_path, QA[:1], name)
    with pytest.warns(UserWarning) as warned:
        assert len(read_examples(tmp_path)) == len(read)
    (warning,) = [str(w.message) for w in warned]
    named, unread = warning.split(" are read, ")
    assert all(name in named for name in read) and all(name in unread for name in ignored)
