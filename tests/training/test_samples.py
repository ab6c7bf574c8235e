"""SampleLogger: what TensorBoard's Text tab gets."""

import html
import re
import sys
from types import ModuleType

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from material import logged, quiet_trainer, tiny_data, tiny_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from dream_lightning import SamplingParams, load_tokenizer
from dream_lightning.batch import Answers, Prediction
from dream_lightning.training import SampleLogger, Throughput
from dream_lightning.training.samples import history_text, samples_text

NEW_TOKENS = 24


def parts(source, tmp_path, callback, logger, **options):
    """Trainer, module and data for four steps with a validation after every second one."""
    module = tiny_module(sampling=SamplingParams(max_new_tokens=NEW_TOKENS, steps=12, forbid_mask=True))
    options = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    trainer = quiet_trainer(callback, logger=logger, default_root_dir=tmp_path, **options)
    return trainer, module, tiny_data(source, tmp_path, batch_size=2)


def fit(*arguments, **options):
    trainer, module, data = parts(*arguments, **options)
    trainer.fit(module, data)
    return trainer


def texts(folder, tag):
    """step → text, as TensorBoard reads them."""
    events = EventAccumulator(str(folder)).Reload()
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def test_samples_and_a_history_are_logged_at_every_validation(sums, tmp_path):
    """Not in the sanity check; as many as asked for, though they come in two batches."""
    fit(sums, tmp_path, SampleLogger(count=3), TensorBoardLogger(tmp_path, name=None, version=""))
    samples, histories = texts(tmp_path, "val/samples"), texts(tmp_path, "val/denoising")
    assert list(samples) == list(histories) == [1, 3]
    for text in samples.values():
        heads = re.findall(r"^    (\d)\. (?:wrong|correct): answer .*, reference \d+$", text, flags=re.MULTILINE)
        assert heads == ["1", "2", "3"] and len(re.findall(r"\d+ \+ \d+ = \?", text)) >= 3
    for text in histories.values():
        lines = text.split("\n")
        assert [int(re.match(r"    step +(\d+)/12: ", line)[1]) for line in lines] == [1, 3, 4, 6, 7, 9, 10, 12]
        masks = [line.count("▒") for line in lines]
        assert NEW_TOKENS - 4 <= masks[0] < NEW_TOKENS
        assert masks == sorted(masks, reverse=True) and masks[-1] == 0


class Run:
    """In place of a run of Weights & Biases."""

    def __init__(self):
        self.calls, self.config = [], {}
        self.log = self.calls.append


@pytest.fixture
def wandb_run(monkeypatch):
    """Lightning's WandbLogger finds a package wandb that hands out this run."""
    run = Run()
    package = {"run": None, "init": lambda **_: run, "Table": lambda columns, data, dataframe: (columns, data)}
    parts = {"wandb": package, "wandb.sdk.lib": {"RunDisabled": type(None)}, "wandb.wandb_run": {"Run": Run}}
    for name, values in ({"wandb.sdk": {}} | parts).items():
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
        vars(module).update(values)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return run


def test_weights_and_biases_gets_the_numbers_of_tensorboard_and_tables_of_whole_texts(sums, tmp_path, wandb_run):
    """Scalar by scalar, step by step, none more and none less."""
    run_loggers = [TensorBoardLogger(tmp_path), WandbLogger()]
    fit(sums, tmp_path, None, run_loggers, callbacks=[Throughput(), SampleLogger(count=3)], log_every_n_steps=1)
    scalars, tables = {}, {}
    for call in wandb_run.calls:
        step = call.pop("trainer/global_step")
        for name, value in call.items():
            kept = tables if isinstance(value, tuple) else scalars
            assert (name, step) not in kept or name == "epoch"
            kept[name, step] = value
    written = {key: values for key, values in logged(tmp_path).items() if not key[0].endswith("text_summary")}
    assert {key: float(*values) for key, values in written.items()} == pytest.approx(scalars, nan_ok=True)
    assert {("val/nll", 3), ("train/loss", 2), ("train/tokens_per_second", 1)} < scalars.keys()
    assert {name for name, _ in tables} == {"val/samples", "val/denoising"}
    columns, rows = tables["val/samples", 3]
    assert columns == ["question", "answer", "reference", "correct", "response"] and len(rows) == 3
    assert all("= ?" in row[0] and row[3] in ("True", "False") for row in rows)


def steps_of(folder):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("val/nll")]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "val_check_interval": 3}], ids=str)
def test_the_same_weights_are_scored_at_the_same_step(sums, tmp_path, options):
    """In fit, also in the middle of a step; by another trainer; from a checkpoint. Texts stand next to scores."""
    best = ModelCheckpoint(tmp_path, "best", monitor="val/nll", save_top_k=-1, save_on_train_epoch_end=False)
    logs = {name: TensorBoardLogger(tmp_path / name, name=None, version="") for name in "abc"}
    trainer, module, data = parts(sums, tmp_path, SampleLogger(), logs["a"], **options)
    trainer.callbacks.append(best)
    trainer.fit(module, data)
    in_fit = steps_of(tmp_path / "a")
    assert len(in_fit) == 2 and list(texts(tmp_path / "a", "val/samples")) == in_fit
    saved = sorted(tmp_path.glob("best*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path, step in zip(saved, in_fit, strict=True):
        logger = TensorBoardLogger(tmp_path / path.stem, name=None, version="")
        other, fresh, _ = parts(sums, tmp_path, SampleLogger(count=1), logger)
        other.validate(fresh, data, ckpt_path=path, weights_only=True)
        assert steps_of(tmp_path / path.stem) == list(texts(tmp_path / path.stem, "val/samples")) == [step]
    for logger, tester in (("b", trainer), ("c", None)):
        tester = tester or parts(sums, tmp_path, SampleLogger(), logs["c"])[0]
        tester.loggers = [logs[logger]]
        tester.validate(module, data)
    last = trainer.global_step - 1
    assert steps_of(tmp_path / "b") == steps_of(tmp_path / "c") == [last]
    trainer = parts(sums, tmp_path, SampleLogger(), logs["c"])[0]
    trainer.fit(module, data)  # a new run, with steps of its own
    assert set(steps_of(tmp_path / "c")) == {1, 3}


def test_without_questions_or_a_logger_of_texts_there_are_none(sums, tmp_path):
    fit(sums, tmp_path, SampleLogger(), TensorBoardLogger(tmp_path, name=None, version=""), limit_val_batches=0)
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"] == []
    fit(sums, tmp_path, SampleLogger(), CSVLogger(tmp_path))
    assert "val/accuracy" in next(tmp_path.rglob("metrics.csv")).read_text()


def prediction(id_, prompt="?", text="", **options):
    options = {"thinking": None, "answer": None, "reference": None, "correct": None} | options
    return Prediction(id_, prompt, text, tokens=0, seconds=0.0, **options)


def test_copies_that_fill_up_the_ranks_are_left_out():
    callback = SampleLogger(count=3)
    for batch in range(2):
        answers = Answers([prediction(f"{batch}{i}") for i in range(2)], [True, False])
        callback.on_validation_batch_end(None, None, answers, None, batch)
    assert [p.id for p in callback._predictions] == ["00", "10"]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nfirst\r\nsecond\rthird\n</think>\n",
        r"\[ x_1 * y_2 \] \( a_i \) \{1 \| 2\} \\ \_ $|x| < 3$ & so on",
        "[1, 2] and [a](http://b) ![c](d.png) **e** _f_ `g | h` <b>i</b> &lt; &#124; https://k",
        "| a | b |\n|---|---|\n# c\n- d\n1. e\n> f\n```python\ng\n```\n~~~",
        "columns 11  1   00",
        "▒ ∎ ½ 中文",
        "",
    ],
)
def test_tensorboard_shows_texts_unmodified(text):
    """Through TensorBoard's own renderer: the same characters, no markup."""
    answered = prediction("0", text, f"{text}!", correct=True, answer="x_1", reference="*2*")
    page = markdown_to_safe_html(samples_text([answered, answered]))
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)
    plain = re.sub(r"\r\n?", "\n", text)
    for number, block in enumerate(blocks, start=1):
        assert "<" not in block
        head = f"{number}. correct: answer x_1, reference *2*"
        assert html.unescape(block).strip("\n") == f"{head}\n\n{plain}\n\n{plain}!".strip("\n")
    assert len(blocks) == 2


def test_a_history_marks_masks_line_ends_and_eos():
    tokenizer = load_tokenizer("bytes")
    mask, eos = tokenizer.mask_token, tokenizer.eos_token
    states = [mask * 5, f"a{mask * 2}{eos * 2}", f"a\n{eos}b{eos}"]
    states = torch.tensor([tokenizer.encode(state, add_special_tokens=False) for state in states])
    assert history_text(states, tokenizer).split("\n") == [
        "    step 1/3: ▒▒▒▒▒",
        "    step 2/3: a▒▒∎×2",
        "    step 3/3: a↵∎b∎×1",
    ]


def test_long_texts_show_both_ends_in_lines_that_fit():
    text = "a" * 3000 + "b" * 3000
    lines = samples_text([prediction("0", text, text)]).split("\n")
    assert max(map(len, lines)) <= 4 + 100
    shown = "".join(line[4:] for line in lines[2:])
    assert shown == 2 * ("a" * 1000 + " [… 4,000 characters …] " + "b" * 1000)
    tokenizer = load_tokenizer("bytes")
    lines = history_text(torch.tensor([tokenizer.encode(text, add_special_tokens=False)]), tokenizer).split("\n")
    assert max(map(len, lines)) <= 4 + len("step 1/1: ") + 100
    assert len({len(line) - len(line.lstrip(" step1/:")) for line in lines[:9]}) == 1  # aligned
