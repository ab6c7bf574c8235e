"""The folders that `evaluate` and `compare` write, with a tiny random Dream and a grader that its bytes can satisfy."""

import json
import random
from dataclasses import replace
from html.parser import HTMLParser

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from material import SIZES, save_tiny_folder, write_jsonl

from dream_lightning import DreamModule, S1KDataModule, cli
from dream_lightning.adapters import LoraParams
from dream_lightning.batch import Example
from dream_lightning.data.prompt_format import encode_prompt
from dream_lightning.errors import UserError
from dream_lightning.evaluation import evaluate as module
from dream_lightning.evaluation.card import breakdown, scores
from dream_lightning.evaluation.compare import compare, read_run
from dream_lightning.evaluation.evaluate import BENCHMARKS, benchmark, evaluate, questions_of
from dream_lightning.evaluation.grid import combinations, evaluate_grid
from dream_lightning.evaluation.statistics import aup, mean_interval
from dream_lightning.model import load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.sampling import SamplingParams
from dream_lightning.tasks import proportion_interval
from dream_lightning.tasks.registry import TASKS, Task

WIDE = SIZES | {"initializer_range": 0.4}  # confidences that differ by more than rounding
SAMPLING = SamplingParams(max_new_tokens=6, steps=3, forbid_mask=True, temperature=1.0)


@pytest.fixture(autouse=True)
def parity(monkeypatch):
    """A task whose answers random bytes get right half of the time."""
    task = Task(lambda text: str(len(text.encode()) % 2), lambda answer, wanted: answer == wanted)
    monkeypatch.setitem(TASKS, "parity", task)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes")
    return random_model(WIDE, tokenizer).eval(), tokenizer


@pytest.fixture
def run(network, tmp_path):
    rows = [{"question": f"{n}?", "answer": str(n % 2), "task": "parity", "level": n % 3} for n in range(12)]
    source = write_jsonl(tmp_path / "parities.jsonl", [*rows, {"question": "and?", "task": "parity"}])

    def evaluated(folder, model=network[0], **options):
        options = {"sampling": SAMPLING, "batch_size": 5} | options
        return evaluate(model, network[1], [str(source)], name="tiny", out=tmp_path / folder, **options)

    return evaluated


def test_the_same_inputs_give_the_same_card(run, tmp_path):
    card = run("a")
    assert run("b") == card
    for name in ("card.json", "items.jsonl", "README.md", "eval_results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    got, (_, items) = card["tasks"]["parities"], read_run(tmp_path / "a")
    assert (got["questions"], got["scored"], len(items)) == (13, 12, 13)
    right = sum(item["correct"] is True for item in items)
    assert 0 < right < 12
    assert got["accuracy"] == pytest.approx(right / 12)
    assert got["interval"] == list(proportion_interval(right, 12))
    assert sum(group["scored"] for group in got["groups"]["level"].values()) == 12
    assert json.loads((tmp_path / "a" / "eval_results.json").read_text()) == {"eval_parities_accuracy": right / 12}
    (result,) = ModelCard.load(tmp_path / "a" / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_type) == ("parities", "accuracy")
    assert (result.dataset_type, result.metric_value) == ("parities.jsonl", round(right / 12, 4))


def test_a_killed_run_resumes_to_the_same_card(run, tmp_path, monkeypatch):
    whole, calls, answer = run("whole"), [], module.answer_questions

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("killed")
        return answer(*arguments)

    monkeypatch.setattr(module, "answer_questions", dies)
    with pytest.raises(KeyError):
        run("killed")
    assert not (tmp_path / "killed" / "card.json").exists()
    assert run("killed") == whole
    assert len(calls) == 4  # batches of 5, 5 and 3 questions, and the one that was lost
    with pytest.raises(UserError, match=r"other settings: sampling.steps was 3 and is 6.*--out"):
        run("killed", sampling=SamplingParams(max_new_tokens=6, steps=6, forbid_mask=True, temperature=1.0))


def test_a_batch_that_does_not_fit_is_halved(run, monkeypatch, capsys):
    whole, answer, sizes = run("whole", batch_size=8), module.answer_questions, []

    def limited(model, tokenizer, batch, params):
        sizes.append(len(batch.examples))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return answer(model, tokenizer, batch, params)

    monkeypatch.setattr(module, "answer_questions", limited)
    small = run("small", batch_size=8)["tasks"]["parities"]
    assert small == whole["tasks"]["parities"], {k: (v, small[k]) for k, v in whole["tasks"]["parities"].items()}
    assert sizes[:2] == [8, 4] and max(sizes[2:]) == 2
    assert "out of memory: continuing with batch_size 2" in capsys.readouterr().out
    sizes.clear()
    run("twice", batch_size=8, samples=2)
    assert sizes.count(8) == 1  # the second sample begins with what fits


def test_several_answers_give_pass_at_k_and_an_interval_over_questions(run, tmp_path):
    got = run("many", samples=3)["tasks"]["parities"]
    items = [i for i in read_run(tmp_path / "many")[1] if i["correct"] is not None]
    by_question = {n: [i["correct"] for i in items if i["number"] == n] for n in range(12)}
    assert len({tuple(c) for c in by_question.values()}) > 1  # seeds differ
    assert got["pass@1"] == pytest.approx(got["accuracy"])
    assert got["pass@3"] == pytest.approx(sum(map(any, by_question.values())) / 12)
    assert {"pass@2", "maj@3"} <= got.keys()
    assert got["interval"] == list(mean_interval([sum(c) / 3 for c in by_question.values()]))
    with pytest.raises(UserError, match="samples is 2 and sampling has no noise"):
        run("none", samples=2, sampling=SamplingParams(forbid_mask=True))


def test_a_comparison_is_paired(run, network, tmp_path):
    run("a")
    torch.manual_seed(1)
    run("b", model=random_model(WIDE, network[1]).eval(), sampling=replace(SAMPLING, steps=2))
    result = compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")
    got, pairs = result["tasks"]["parities"], zip(read_run(tmp_path / "a")[1], read_run(tmp_path / "b")[1], strict=True)
    steps = [b["correct"] - a["correct"] for a, b in pairs if a["correct"] is not None]
    assert any(steps)
    assert got["difference"] == pytest.approx(sum(steps) / 12)
    assert (len(got["only_a"]), len(got["only_b"])) == (steps.count(-1), steps.count(1))
    assert got["interval"][0] <= got["difference"] <= got["interval"][1]
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert page.count("<details>") == len(got["only_a"]) + len(got["only_b"])
    assert "<th>what differs" in page and "<td>steps<td class=n>3<td class=n>2" in page
    same = compare(tmp_path / "a", tmp_path / "a", out=tmp_path / "d")["tasks"]["parities"]
    assert "what differs" not in (tmp_path / "d" / "comparison.html").read_text()
    assert (same["difference"], same["interval"], same["p"]) == (0, [0, 0], 1)
    run("fewer", questions=4)
    with pytest.raises(UserError, match=r"parities has other records in the two runs \(13, hash .* and 4, hash "):
        compare(tmp_path / "a", tmp_path / "fewer", out=tmp_path / "e")
    with pytest.raises(UserError, match=r"card.json cannot be read.*evaluate again"):
        compare(tmp_path / "a", tmp_path, out=tmp_path / "e")


class _References(HTMLParser):
    """What a page would load from elsewhere."""

    found: tuple = ()

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "xlink:href")
        self.found += tuple(v for n, v in attributes if n in names and v and not v.startswith("#"))


def test_pages_are_self_contained_and_escape_texts(run, tmp_path):
    run("a")
    page = tmp_path / "a" / "card.html"
    parser = _References()
    parser.feed(page.read_text())
    assert parser.found == ()
    card, items = read_run(tmp_path / "a")
    items[0]["prediction"] = "<script>alert(1)</script>"
    module.write_run(tmp_path / "a", card, items, {"device": "x", "tasks": {"parities": {"tokens_per_second": 1}}})
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_scores_count_what_their_names_say():
    def item(correct, answer, prediction, tokens, thinking=0):
        counted = {"tokens": tokens, "thinking_tokens": thinking, "filled": 8, "forwards": 2}
        return {"correct": correct, "answer": answer, "prediction": prediction} | counted

    items = [item(True, "1", "1", 3), item(False, None, " ", 8, 4), item(False, "2", "2", 1), item(None, "3", "3", 8)]
    got = scores([items])
    wanted = {"questions": 4, "scored": 3, "unparsed": 1 / 3, "empty": 1 / 4, "terminated": 1 / 2, "mean_tokens": 5}
    wanted |= {"mean_thinking_tokens": 1, "tokens_per_forward": 4, "accuracy": 1 / 3, "median_tokens": 5.5}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)
    assert "accuracy" not in scores([items[3:]])


def test_an_answer_that_ends_at_max_length_without_eos_is_not_terminated(run, network, tmp_path):
    (model, tokenizer), length = network, 28
    banned = [*set(range(model.config.vocab_size)) - {*b"01234567", tokenizer.eos_token_id}]
    options = {"max_new_tokens": 99, "max_length": length, "steps": 4, "temperature": 1.0, "banned_tokens": banned}
    card = run("short", sampling=SamplingParams(forbid_mask=True, **options))["tasks"]["parities"]
    ends = []
    for item in read_run(tmp_path / "short")[1]:
        question = Example("", ({"role": "user", "content": item["prompt"]},), None, "", None, "")
        ends.append(item["tokens"] < length - len(encode_prompt(question, tokenizer)))
    assert 0 < sum(ends) < len(ends) == 13 and card["terminated"] == pytest.approx(sum(ends) / 13)


def test_benchmarks_are_names_files_or_tasks_with_a_source(tmp_path):
    rows = [{"question": f"{n}?", "answer": f"since {n}\n#### {n}"} for n in range(4)]
    file = write_jsonl(tmp_path / "test.jsonl", rows)
    assert benchmark("gsm8k", {})[1].source == "openai/gsm8k"
    name, found = benchmark("gsm8k", {"gsm8k": str(file)})
    assert (name, found.task, found.subset) == ("gsm8k", "math", None)
    assert benchmark(str(file), {})[0] == "test"
    assert [e.prompt[-1]["content"] for e in questions_of(found, count=2)] == ["0?", "1?"]
    with pytest.raises(UserError, match=r"gsm9k is no file and no benchmark .*set --sources '\{gsm9k: FILE\}'"):
        benchmark("gsm9k", {})
    for one in (found, BENCHMARKS["math500"], BENCHMARKS["aime25"], replace(found, split="train")):
        with pytest.raises(UserError, match=r"few_shot is 1 and .* has no training split: set shots"):
            questions_of(one, few_shot=1)
    with pytest.raises(UserError, match=r"few_shot shows .*test.jsonl, row 1, which .*test.jsonl asks too: set shots"):
        questions_of(found, count=2, few_shot=1, shots=str(file))
    write_jsonl(tmp_path / "train.jsonl", [{"question": "9?", "answer": "so\n#### 9"}])
    (one, *_) = questions_of(replace(found, source=str(tmp_path)), few_shot=1)
    shown = [("user", "9?"), ("assistant", "so\n#### 9"), ("user", "0?")]
    assert [(m["role"], m["content"]) for m in one.prompt] == shown
    assert questions_of(found, few_shot=1, shots=str(tmp_path / "train.jsonl"))[0].prompt == one.prompt


def test_groups_are_columns_with_several_values():
    def example(n, **record):
        return Example(str(n), ({"role": "user", "content": "?"},), None, "", "1", "x", record=record)

    examples = [example(n, source="ab"[n % 2], level=1) for n in range(4)]
    items = [{"correct": n % 2 == 0, "answer": "1"} for n in range(4)]
    got = breakdown([items], examples)
    assert {c: {v: g["accuracy"] for v, g in groups.items()} for c, groups in got.items()} == {
        "source": {"a": 1, "b": 0}
    }


def test_a_grid_is_one_evaluation_for_each_valid_combination(run, network, tmp_path, capsys):
    run("a")  # writes the file of questions
    grid = {"steps": [3, 6], "tokens_per_step": [None, 2], "alg": ["entropy", "origin"]}
    options = {"name": "tiny", "sampling": SAMPLING, "batch_size": 5, "out": tmp_path / "grid"}
    got = evaluate_grid(*network, str(tmp_path / "parities.jsonl"), grid=grid, **options)
    labels = [row["sampling"] for row in got["rows"]]
    assert len(labels) == 6 and "steps=6,tokens_per_step=2,alg=entropy" in labels
    assert "left out: steps=3,tokens_per_step=2,alg=origin: tokens_per_step is set and alg" in capsys.readouterr().out
    by_label = {row["sampling"]: row for row in got["rows"]}
    assert (
        by_label["steps=3,tokens_per_step=None,alg=entropy"]["accuracy"]
        == read_run(tmp_path / "a")[0]["tasks"]["parities"]["accuracy"]
    )
    assert by_label["steps=6,tokens_per_step=None,alg=entropy"]["tokens_per_forward"] == pytest.approx(1, abs=0.2)
    assert got["aup"] == aup([(row["tokens_per_forward"], row["accuracy"]) for row in got["rows"]])
    page = (tmp_path / "grid" / "grid.html").read_text()
    assert all(label in page for label in labels)
    for wrong in ({"step": [1]}, {"steps": []}, {"steps": 3}, {}):
        with pytest.raises(UserError, match="grid"):
            combinations(SAMPLING, wrong)


def test_the_commands_from_a_folder_to_a_comparison(few_bundled, tmp_path, monkeypatch, capsys):
    def printed(*words):
        cli.run([str(word) for word in words])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    folder = save_tiny_folder(tmp_path / "model", positions=256)
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in random.Random(0).sample(range(99), 3)]
    file, short = write_jsonl(tmp_path / "sums.jsonl", rows), ("--sampling.max_new_tokens=4", "--sampling.steps=2")
    options = ("--model", folder, "--tasks", str(file), "--sampling.forbid_mask=true", *short)
    prompts = printed("evaluate", *options, "--show_prompts=1")
    assert f"{rows[0]['question']}<|im_end|>" in prompts and not (tmp_path / "evaluation").exists()
    for name in "ab":
        shown = printed("evaluate", *options, "--out", tmp_path / name)
    assert "3 of 3 questions scored" in shown and "card.html" in shown
    assert "B − A = 0.0 %" in printed("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    checkpoint = tmp_path / "tuned.ckpt"
    module = DreamModule(folder, lora=LoraParams(rank=2))
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[])
    trainer.fit(module, S1KDataModule("bundled", tokenizer=module.tokenizer, first_n=1, validation_questions=0))
    trainer.save_checkpoint(checkpoint)
    shown = printed("evaluate", "--model", checkpoint, *options[2:], "--with_base=true", "--out", tmp_path / "d")
    assert "B − A" in shown
    cards = {name: json.loads((tmp_path / "d" / name / "card.json").read_text()) for name in ("base", "tuned")}
    assert cards["base"]["model"]["weights"] != cards["tuned"]["model"]["weights"]
    assert (tmp_path / "d" / "base" / "items.jsonl").read_text() == (tmp_path / "a" / "items.jsonl").read_text()
