"""lm-evaluation-harness on a tiny random Dream, offline, with tasks of two files each."""

import json
import sys
from functools import partialmethod

import pytest
import torch
from material import SIZES, quiet_trainer, save_tiny_folder, tiny_data, tiny_module, write_jsonl

from dream_lightning.answering import answer_ids, answer_texts
from dream_lightning.errors import UserError
from dream_lightning.evaluation.likelihood import nll_bound
from dream_lightning.model import load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.sampling import SamplingParams

pytest.importorskip("lm_eval", reason="needs the extra `harness`: pip install 'dream_lightning[harness]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dream_lightning.evaluation.harness import DreamLM, main

TOKENIZER = load_tokenizer("bytes")
ASK = """
task: tiny_ask
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: tiny_choose
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
"""
QUESTIONS = [f"What is {i} + {i * 7}" + "?" * (i % 3 + 1) for i in range(7)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model({**SIZES, "initializer_range": 0.4}, TOKENIZER).eval()


@pytest.fixture(scope="module")
def lm(model):
    return DreamLM(model, tokenizer=TOKENIZER, batch_size=3, draws=8, max_new_tokens=16, steps=8)


def requests(kind, *arguments):
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def ask(lm, *texts, **kwargs):
    return lm.generate_until(requests("generate_until", *((text, {"until": [], **kwargs}) for text in texts)))


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_texts_are_answered_as_predict_answers_them_in_any_batch(tmp_path, style):
    module = tiny_module(new_model=SIZES | {"initializer_range": 0.4})
    rows = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": question} for question in QUESTIONS])
    data = tiny_data(rows, tmp_path, predict_source=str(rows), style=style)
    predicted = quiet_trainer().predict(module, data)
    by_prompt = {p.prompt: p.prediction for batch in predicted for p in batch.predictions}
    for batch_size in (1, 4):
        options = {"batch_size": batch_size, "style": style}
        answers = answer_texts(module.model, TOKENIZER, QUESTIONS, module.sampling, **options)
        assert answers == [by_prompt[question] for question in QUESTIONS]


def test_an_answer_ends_before_the_first_stop_string(model):
    params = SamplingParams(max_new_tokens=16, steps=8, forbid_mask=True)
    whole = answer_texts(model, TOKENIZER, QUESTIONS, params)
    stopped = answer_texts(model, TOKENIZER, QUESTIONS, params, stop=["absent", whole[0][3:5]])
    assert stopped == [text.split(whole[0][3:5])[0] for text in whole] != whole
    for options, message in (
        ({"stop": [""]}, "stop has an empty string"),
        ({"style": "rendered"}, "prompt 1 is empty"),
    ):
        with pytest.raises(UserError, match=message):
            answer_texts(model, TOKENIZER, ["a", ""], params, **options)


def test_only_special_tokens_of_the_template_are_special(lm):
    chat = lm.apply_chat_template([{"role": "user", "content": "What is <|mask|>?"}])
    ids = lm.tok_encode(chat)
    assert ids[0] == TOKENIZER.convert_tokens_to_ids("<|im_start|>") and TOKENIZER.mask_token_id not in ids
    assert TOKENIZER.decode(ids) == chat and lm.chat_template(True) and lm.tokenizer_name is not None
    assert lm.apply_chat_template([{"role": "assistant", "content": "It"}], False).endswith("It")


def test_what_a_task_sets_decides_the_answer(lm, model):
    def expected(**changes):
        params = SamplingParams(**{"max_new_tokens": 16, "steps": 8, "forbid_mask": True, **changes})
        return answer_texts(model, TOKENIZER, QUESTIONS, params, style="rendered")

    assert ask(lm, *QUESTIONS) == expected()
    assert ask(lm, *QUESTIONS, max_gen_toks=5) == expected(max_new_tokens=5, steps=3)
    assert ask(lm, *QUESTIONS, max_gen_toks=5, block_length=4) == expected(max_new_tokens=8, steps=4, block_length=4)
    warm = ask(lm, *QUESTIONS, temperature=0.9, do_sample=True)
    assert warm == expected(temperature=0.9) != expected()
    assert ask(lm, *QUESTIONS, temperature=0.9, do_sample=False, steps=16) == expected(steps=16)
    with pytest.raises(UserError, match="generation_kwargs has num_beams, wanted fields of SamplingParams"):
        ask(lm, "a", num_beams=2)


def test_options_of_the_model_change_the_answers(model):
    plain = {"pretrained": model, "tokenizer": TOKENIZER, "max_new_tokens": 16, "steps": 8}
    first = ask(DreamLM(**plain), *QUESTIONS)
    assert ask(DreamLM(**plain, add_bos_token=True), *QUESTIONS) != first
    assert ask(DreamLM(**plain, temperature=1.0), *QUESTIONS) != first
    letter = first[0][5]
    assert ask(DreamLM(**plain, think_end_token=letter), *QUESTIONS) == [t.split(letter)[-1].lstrip() for t in first]
    for options, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto', wanted a number"),
        ({"stepz": 3}, "model_args has stepz"),
        ({"max_length": 1000}, "max_length is 1000"),
    ):
        with pytest.raises(UserError, match=message):
            DreamLM(**plain, **options)


def test_log_likelihood_is_the_bound_and_greedy_is_what_the_model_writes(lm, model):
    found = lm.loglikelihood(requests("loglikelihood", ("ab", "wxyz"), ("", "xyz"), ("a ", "b")))
    texts = [("ab", "wxyz"), ("<|beginoftext|>", "xyz"), ("a", " b")]
    expected = [nll_bound(model, *map(TOKENIZER.encode, pair), draws=8).nll for pair in texts]
    assert [-value for value, _ in found] == pytest.approx(expected, rel=1e-4)

    contexts = [TOKENIZER.encode(text) for text in ("ab", "abc", "d")]
    params = SamplingParams(max_new_tokens=3, steps=3, alg="maskgit_plus", forbid_mask=True)
    written = answer_ids(model, contexts, params)
    others = [[ids[0] ^ 1, *ids[1:]] for ids in written]
    pairs = [(("", ""), *pair) for pair in zip(contexts * 2, written + others, strict=True)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True] * 3 + [False] * 3


def test_texts_longer_than_a_window_are_cut_into_windows(model):
    lm = DreamLM(model, tokenizer=TOKENIZER, max_length=5, draws=15)
    whole, short = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcdefg",), ("ab",)))
    ids, bos = TOKENIZER.encode("abcdefg"), TOKENIZER.bos_token_id
    windows = [([bos], ids[:4]), (ids[2:4], ids[4:])]
    assert whole == pytest.approx(-sum(nll_bound(model, *w, draws=15).nll for w in windows), rel=1e-4)
    assert short == pytest.approx(-nll_bound(model, [bos], ids[:2]).nll, rel=1e-4)
    with pytest.warns(UserWarning, match="a prompt of 7 tokens is cut to its last 4"):
        lm.loglikelihood(requests("loglikelihood", ("abcdefg", "h")))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    # Indexing the thousands of tasks of lm_eval takes 20 s and more.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    row = {"answer": "7", "choices": ["7", "a longer one"], "label": 0}
    asked = [{"question": question, **row} for question in QUESTIONS]
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = str(write_jsonl(tmp_path / "asked.jsonl", asked))
    for name, task in (("ask", ASK), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(task.replace("FILE", file))
    return folder


def test_two_tasks_run(lm, tasks, model):
    options = {"task_manager": TaskManager(include_path=str(tasks)), "bootstrap_iters": 0, "apply_chat_template": True}
    found = lm_eval.simple_evaluate(lm, tasks=["tiny_ask", "tiny_choose"], **options)
    assert set(found["samples"]) == {"tiny_ask", "tiny_choose"}
    params = SamplingParams(max_new_tokens=12, steps=6, forbid_mask=True)
    answers = answer_texts(model, TOKENIZER, QUESTIONS, params, stop=["\n\n"])
    assert [sample["resps"][0][0] for sample in found["samples"]["tiny_ask"]] == answers
    chosen = [sample["filtered_resps"] for sample in found["samples"]["tiny_choose"]]
    right = [a[0] > b[0] for a, b in chosen]
    assert found["results"]["tiny_choose"]["acc,none"] == pytest.approx(sum(right) / 7)


def test_the_command_finds_dream_by_name(tasks, tmp_path, monkeypatch, capsys):
    folder, out = save_tiny_folder(tmp_path / "model", positions=256), tmp_path / "out"
    options = f"pretrained={folder},max_new_tokens=8,steps=4,draws=4"
    command = ["--model_args", options, "--tasks", "tiny_ask,tiny_choose", "--include_path", str(tasks)]
    command += ["--batch_size", "4", "--limit", "3", "--output_path", str(out)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    main()
    (written,) = out.rglob("results_*.json")
    assert json.loads(written.read_text())["results"].keys() == {"tiny_ask", "tiny_choose"}
    assert "tiny_choose" in capsys.readouterr().out
