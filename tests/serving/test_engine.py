"""Rows that join and leave at any turn get the answers that they get alone."""

import random
from dataclasses import replace

import pytest
import torch
from material import SIZES

from dream_lightning import SamplingParams, diffusion_generate, load_tokenizer
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser
from dream_lightning.model_factory import random_model
from dream_lightning.serving.engine import Engine, Row

TOKENIZER = load_tokenizer("bytes")
WAYS = [
    {}, {"cache": "dual"}, {"cache": "dual", "alg": "maskgit_plus", "threshold": 0.3, "stop_at_eos": True},
    {"cache": "dual", "refresh_every": 3}, {"temperature": 0.7}, {"temperature": 1.0, "alg_temp": 0.5, "top_p": 0.9},
    {"alg": "origin"}, {"min_new_tokens": 6}, {"block_length": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(SIZES | {"initializer_range": 0.4}, TOKENIZER).eval()


def make_row(dice, number, **options):
    size = 8 * dice.randint(1, 3)
    sampling = {"block_length": 8, "steps": size // 2, "max_new_tokens": size, "forbid_mask": True}
    params = SamplingParams(**sampling | options.pop("params", {}))
    prompt = [dice.randrange(256) for _ in range(dice.randint(1, 30))]
    return Row(number, 0, prompt, params, size, sample_id=dice.randrange(99), **options)


def run(engine, rows, dice):
    """Events of every row, which join a few at a time."""
    todo, events = list(rows), {row: [] for row in rows}
    while todo or engine.active or engine.waiting:
        for _ in range(dice.randint(0, 3)):
            engine.waiting.extend(todo[:1])
            del todo[:1]
        for row, event in engine.turn():
            events[row].append(event)
            assert len(engine.active) <= engine.most_rows
    return events


def alone(model, row):
    """Ids and text of the answer of `diffusion_generate` to this row."""
    ids = torch.tensor([row.prompt])
    options = {"sample_ids": torch.tensor([row.sample_id]), "num_return_sequences": row.copy + 1}
    answer = diffusion_generate(model, ids, params=row.params, **options).sequences[-1, ids.shape[1] :].tolist()
    answer = answer[: row.limit]
    answer = answer[: answer.index(TOKENIZER.eos_token_id)] if TOKENIZER.eos_token_id in answer else answer
    return answer, TOKENIZER.decode(answer, skip_special_tokens=True)


def test_answers_do_not_depend_on_when_a_row_joins_or_on_the_others(model):
    dice = random.Random(0)
    rows = [make_row(dice, n, params=WAYS[n % len(WAYS)], watched=n % 2 == 0) for n in range(2 * len(WAYS))]
    for row in rows:
        row.copy, row.limit = int(row.params.noisy and dice.random() < 0.5), row.limit - dice.randint(0, 7)
    for row, events in run(Engine(model, TOKENIZER, 5), rows, dice).items():
        ids, text = alone(model, row)
        assert "".join(event.get("text", "") for event in events) == text
        assert events[0] == {"prompt_tokens": len(row.prompt)}
        assert events[-1]["tokens"] == len(ids) and 0 < events[-1]["forwards"] <= row.params.steps
        assert events[-1]["finish"] == ("length" if len(ids) == row.limit else "stop")
        changes = dict(change for event in events for change in event.get("changes", []))
        assert bool(changes) == row.watched
        for position, token in enumerate(ids if row.watched else []):
            assert (
                len(changes[position]) == 1
                or changes[position] == TOKENIZER.decode([token])
                or "⟨" in changes[position]
            )


def test_a_stop_string_ends_an_answer_and_is_never_sent(model):
    dice = random.Random(1)
    rows = [make_row(dice, n) for n in range(8)]
    stopped = 0
    for row in rows:
        text = alone(model, row)[1]
        at = len(text) // 3
        row.stop = ("never there", text[at : at + 2])
    for row, events in run(Engine(model, TOKENIZER, 4), rows, dice).items():
        expected = alone(model, row)[1].partition(row.stop[1])
        assert "".join(event.get("text", "") for event in events) == expected[0]
        assert events[-1]["finish"] == "stop"
        stopped += len(row.ids) < row.params.max_new_tokens
    assert stopped  # before their last blocks


def test_cancelled_rows_leave_and_a_failing_turn_fails_its_rows_only(model):
    dice, gone = random.Random(2), set()
    engine = Engine(model, TOKENIZER, 2, gone.__contains__)
    failing = make_row(dice, 0, params={"compile": True})  # on a CPU
    rows = [failing, *(make_row(dice, n) for n in (1, 2, 3))]
    engine.waiting.extend(rows)
    events = list(engine.turn())
    assert [row.owner for row, event in events if "error" in event] == [0]
    assert "CUDA graphs need one GPU" in events[-1][1]["error"]
    gone |= {1, 3}
    events = list(engine.turn())
    assert {row.owner for row, _ in events} == {2} and not engine.waiting
    assert [row.owner for row in engine.active] == [2] and engine.room == 1
    for row, _ in engine.turn():  # the client leaves in the middle of a block
        gone.add(row.owner)
    list(engine.turn())
    assert not engine.active


def test_no_graph_is_captured_for_a_request_after_the_warm_up(model, monkeypatch):
    """The compiled road with its shapes and fixed buffers, but uncompiled: rows join and leave at any turn."""
    fast, dice, made = CompiledDenoiser(model, capture=False), random.Random(3), []
    monkeypatch.setattr("dream_lightning.sampling.generate._compiled", lambda model: fast)
    new_graph = fast.model._new_graph
    monkeypatch.setattr(fast.model, "_new_graph", lambda *inputs: made.append(inputs) or new_graph(*inputs))
    sizes = {"block_length": 8, "steps": 16, "max_new_tokens": 16, "forbid_mask": True, "compile": True}
    params = SamplingParams(**sizes, cache="dual", alg="maskgit_plus", threshold=0.3, stop_at_eos=True)
    engine = Engine(model, TOKENIZER, 6)
    engine.warm_up(64, params)
    assert len(made) == 2 * 4 and not engine.active  # with and next to a KV cache; 1, 2, 4 and 8 rows
    rows = [make_row(dice, n, params=vars(params)) for n in range(12)]
    for n, row in enumerate(rows):  # 42 to 64 tokens: with padding, and without
        row.limit, row.prompt = 16, [dice.randrange(256) for _ in range((26, 32, 36, 48)[n % 4])]
    answers = run(engine, rows, dice)
    assert len(made) == 8
    monkeypatch.undo()
    for row, events in answers.items():
        row.params = replace(row.params, compile=False)
        assert "".join(event.get("text", "") for event in events) == alone(model, row)[1]
