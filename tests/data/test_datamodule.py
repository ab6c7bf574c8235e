"""What S1KDataModule says and refuses before a model is loaded."""

import json
import logging
import math
import random
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from material import SIZES, quiet_trainer, tiny_data, tiny_module, write_jsonl

from dream_lightning import S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.cli import config_path
from dream_lightning.errors import UserError
from dream_lightning.evaluation.evaluate import evaluate
from dream_lightning.predict import PredictionWriter

BYTES, SMALL = load_tokenizer("bytes"), SIZES | {"max_position_embeddings": 256}


def rows(count=8, **last):
    made = [{"question": f"{n}+{n}?", "response": str(2 * n), "answer": str(2 * n)} for n in range(count)]
    return [*made[:-1], made[-1] | last]


@pytest.fixture
def told(caplog):
    """What setting up a data module says: information and warnings."""

    def of(data, stage="fit"):
        caplog.clear()
        caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            data.setup(stage)
        shown = [w for w in warned if w.category is not DeprecationWarning]  # from Python 3.12 on, one of every fork
        return [record.getMessage() for record in caplog.records], [str(w.message) for w in shown]

    return of


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, 0) for name in ("batch_size", "first_n", "max_length", "eos_fill_to", "validation_draws")),
        *((name, -1) for name in ("num_workers", "validation_questions", "validation_fraction", "seed")),
        *(("validation_fraction", bad) for bad in (1.1, math.nan, math.inf)),
        *(("extra_weight", {"x": bad}) for bad in (-1.0, math.nan, math.inf)),
        ("eos_fill_to", 8193),
        ("extra_weight", {"": 2.0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(UserError, match=f"{option}.* wanted"):
        S1KDataModule("bundled", tokenizer=BYTES, **{option: value})


def test_questions_without_a_reference_are_not_scored_and_counted(tmp_path, told):
    lines = [*rows(4), {"question": "?", "response": "x"}, *rows(1, answer=None)]
    for order in range(5):
        mixed = random.Random(order).sample(lines, 6)
        source = str(write_jsonl(tmp_path / "rows.jsonl", mixed))
        data = tiny_data(source, tmp_path, validation_source=source, predict_source=source)
        info, _ = told(data)
        assert "validation: 3 questions are answered and scored; 4 of 6 rows can be scored" in info
        assert len(data.questions) == 3 and all(e.reference is not None for e in data.questions)
        assert "6 questions are answered; 4 of 6 rows can be scored" in told(data, "predict")[0]
    none = str(write_jsonl(tmp_path / "none.jsonl", [{"question": f"{n}?", "response": "x"} for n in range(20)]))
    for stage in ("fit", "validate", "predict"):
        data = tiny_data(none, tmp_path, predict_source=none)
        assert "no question can be scored" in " ".join(told(data, stage)[1])


def test_the_number_of_scored_answers_is_logged(sums, tmp_path):
    trainer = quiet_trainer(limit_val_batches=1, default_root_dir=tmp_path)
    for stage, score in (("val", trainer.validate), ("test", trainer.test)):
        score(tiny_module(), tiny_data(sums, tmp_path), verbose=False)
        assert trainer.callback_metrics[f"{stage}/scored"] == 3


@pytest.mark.parametrize(
    ("command", "long"), [("fit", 1000), ("validate", 1000), ("predict", 1000), ("predict", 2_000_000)]
)
def test_a_question_that_is_too_long_is_named_before_the_model_is_built(tmp_path, command, long):
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows(3, question="1" * long)))
    module = tiny_module(new_model=SMALL, sampling=SamplingParams(max_new_tokens=100))
    data = tiny_data(source, tmp_path, validation_source=source, predict_source=source)
    count = "1,019" if long == 1000 else "2,000,000"
    message = rf"1 of 3 questions are longer than the 156 tokens .* rows.jsonl, row 3 \({count} tokens\); shorten"
    with pytest.raises(UserError, match=message):
        getattr(quiet_trainer(), command)(module, data)
    assert module.model is None


def test_a_question_that_is_too_long_gets_an_empty_answer_by_option(tmp_path):
    lines = [*rows(3, question="1" * 1000), {"question": "2" * 1000, "response": "x"}]
    source, module = str(write_jsonl(tmp_path / "rows.jsonl", lines)), tiny_module(new_model=SMALL)
    data = tiny_data(source, tmp_path, validation_source=source, predict_source=source, batch_size=2, too_long="skip")
    trainer = quiet_trainer(callbacks=[PredictionWriter(str(tmp_path / "p.jsonl"))], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 4 questions are longer .* row 3 \(1,019 tokens\), .* empty answer"):
        trainer.predict(module, data, return_predictions=False)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    got = [tuple(line[name] for name in ("too_long", "prediction", "correct", "forwards")) for line in lines]
    assert got[2:] == [(True, "", False, 0), (True, "", None, 0)] and not any(line["too_long"] for line in lines[:2])
    assert all(line["forwards"] for line in lines[:2])
    trainer.validate(module, data, verbose=False)
    assert trainer.callback_metrics["val/scored"] == 3 and trainer.callback_metrics["val/unparsed"] >= 0.33
    out = {"name": "tiny", "sampling": module.sampling, "batch_size": 4, "out": tmp_path / "card"}
    card = evaluate(module.model, module.tokenizer, [source], **out, too_long="skip")
    assert (card["tasks"]["rows"]["scored"], card["settings"]["too_long"]) == (3, "skip")
    with pytest.raises(UserError, match="or set too_long to skip"):
        evaluate(module.model, module.tokenizer, [source], **out | {"out": tmp_path / "other"})


def test_rows_in_training_and_validation_are_counted(tmp_path, told):
    training = write_jsonl(tmp_path / "train.jsonl", rows(8))
    validation = write_jsonl(tmp_path / "val.jsonl", [*rows(3, question="new?"), *rows(2, question="2 + 2?")])
    data = tiny_data(training, tmp_path, validation_source=str(validation))
    (warning,) = [w for w in told(data)[1] if "training data too" in w]
    assert warning.startswith(
        "4 of 5 validation questions are in the training data too, first val.jsonl, row 1: remove"
    )
    assert not any("training data too" in w for w in told(tiny_data(training, tmp_path))[1])


def test_special_tokens_in_responses_and_weights_without_effect_are_named(tmp_path, told):
    lines = rows(8, response="4<|im_end|>")
    lines[3]["response"] = "<|endoftext|> 3"
    source = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    weights = {"</thnik>": 9.0, "1": 2.0, "<|endoftext|>": 0.1}
    validation = write_jsonl(tmp_path / "validation.jsonl", rows(1, question="new?"))
    options = {"validation_source": str(validation), "validation_questions": 0}
    warned = " ".join(told(tiny_data(source, tmp_path, extra_weight=weights, **options))[1])
    assert "2 of 8 responses hold a special token as text, first <|endoftext|> in rows.jsonl, row 4" in warned
    assert re.findall(r"extra_weight: '(.*?)' is in no response", warned) == ["</thnik>"]
    chat = [{"role": r, "content": x} for r, x in zip(("user", "assistant") * 2, "awby", strict=True)]
    chats = str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}] * 3))
    for train_on, count in (("last", 1), ("all", 0)):
        data = tiny_data(chats, tmp_path, extra_weight={"w": 2.0}, train_on=train_on, **options)
        assert sum("extra_weight: 'w'" in warning for warning in told(data)[1]) == count
    harmless = str(write_jsonl(tmp_path / "harmless.jsonl", rows()))
    assert told(tiny_data(harmless, tmp_path, **options))[1] == []


def test_answers_that_end_elsewhere_than_filled_training_rows_are_told(tmp_path, told):
    lines = [{"question": "1+1?" * (n + 1), "response": "2", "answer": "2"} for n in range(8)]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)

    def warnings_of(sampling=None, causal=False, **options):
        data = tiny_data(source, tmp_path, **{"validation_source": str(source), "style": "bare"} | options)
        data.trainer = SimpleNamespace(lightning_module=tiny_module(sampling=sampling or {}, causal=causal))
        return [warning for warning in told(data)[1] if "end elsewhere" in warning]

    whole = {"eos_fill_to": 40, "max_length": 40, "validation_questions": 8}
    (warning,) = warnings_of({"max_new_tokens": 31}, **whole)
    assert warning.startswith("7 of 8 questions are answered in rows that end elsewhere"), warning
    assert "after a prompt of 5 tokens, the answer has 31, and data.eos_fill_to fills a response to 35" in warning
    assert warning.endswith("set model.sampling.max_new_tokens to 40 and model.sampling.max_length to 40")
    (warning,) = warnings_of({"max_new_tokens": 40, "max_length": 40}, **whole | {"max_length": 99})
    assert "8 of 8" in warning and "to 40 and model.sampling.max_length to 99" in warning
    for sampling, options in (
        ({"max_new_tokens": 40, "max_length": 40}, whole),
        ({"max_new_tokens": 40, "max_length": 99}, whole | {"max_length": 99}),
        ({"max_new_tokens": 40}, whole | {"max_length": 99}),
        *(({}, whole | o) for o in ({"eos_fill_to": None}, {"eos_fill_to": 2}, {"validation_questions": 0})),
        *(({}, whole | o) for o in ({"batch_cutoff": True}, {"causal": True})),
    ):
        assert not warnings_of(sampling, **options), (sampling, options)


@pytest.mark.parametrize(
    ("name", "lengths"), [("tiny", range(7, 9)), ("sudoku", [81]), ("countdown", range(10, 16))], ids=str
)  # of questions
def test_answers_of_the_shipped_configs_end_where_their_training_rows_do(name, lengths, tmp_path, told):
    config = yaml.safe_load(Path(config_path(name)).read_text())
    lines = [{"prompt": "1" * length, "response": "2" * 25, "answer": "2"} for length in lengths]
    source = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    files = {"source": source, "validation_source": source, "cache_dir": str(tmp_path)}
    data = S1KDataModule(**config["data"] | files, tokenizer=BYTES)
    data.trainer = SimpleNamespace(lightning_module=tiny_module(sampling=config["model"]["sampling"]))
    assert not [warning for warning in told(data)[1] if "end elsewhere" in warning]


def test_training_filters_leave_the_validation_set(tmp_path, told):
    source = write_jsonl(tmp_path / "rows.jsonl", [row | {"kind": "ab"[n % 2]} for n, row in enumerate(rows(20))])

    def parts(**options):
        return [[e.id for e in part] for part in tiny_data(source, tmp_path, **options).read()]

    (training, validation), (fewer, same) = parts(), parts(training_filters={"kind": ["b"]}, first_n=5)
    assert same == validation
    assert fewer == [id_ for id_ in training if int(id_.split("-")[1]) % 2 == 0][:5]
    with pytest.raises(UserError, match=r"no row has kind in \['c'\]; values found: a, b"):
        parts(training_filters={"kind": ["c"]})
    data = tiny_data(source, tmp_path, short_first=True)
    told(data)
    order = [data.train_set.lengths[key.index] for (key,) in data.train_dataloader().sampler]
    assert order == sorted(order)


def test_mixtures_and_all_responses_change_what_is_trained(tmp_path):
    chats = [{"messages": [{"role": r, "content": f"{n} {r}"} for r in ("user", "assistant") * 2]} for n in range(20)]
    parts = [str(write_jsonl(tmp_path / f"{i}.jsonl", x)) for i, x in enumerate((chats, rows(40)))]
    options = {"tokenizer": BYTES, "cache_dir": str(tmp_path / "cache")}

    def read(**more):
        data = S1KDataModule(dict(zip(parts, (1.0, 3.0), strict=True)), **options | more)
        return (data, *data.read())

    data, training, validation = read()
    ids = {e.origin for e in training}, {e.origin for e in validation}
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 60 and len(ids[1]) == 6
    count = sum("0.jsonl" in e.origin for e in training)
    assert count <= 20 and len(training) - count > 5 * count
    last, whole = (len(data.tokenized(training, data.encoding | {"train_on": t})) for t in ("last", "all"))
    assert whole == last + count == len(training) + count
    for bad, message in (
        ({"first_n": 3}, "a mixture: .* leave first_n out"),
        ({"train_on": "all"}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            read(**bad, trajectories=True)
    with pytest.raises(UserError, match=f"weight of {parts[0]} is 0"):
        S1KDataModule({parts[0]: 0}, **options)
