"""SampleLogger: what TensorBoard's Text tab gets."""

import html
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from dream_lightning import DreamModule, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.batch import Answers, Prediction
from dream_lightning.training import SampleLogger
from dream_lightning.training.samples import _markdown

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
NEW_TOKENS, STEPS = 24, 12


def parts(source, tmp_path, callback, logger, **options):
    """Trainer, module and data for four steps with a validation after every second one."""
    L.seed_everything(0, verbose=False)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, steps=STEPS, forbid_mask=True)
    module = DreamModule(new_model=SIZES, tokenizer="bytes", sampling=sampling)
    data = S1KDataModule(
        str(source),
        tokenizer=module.tokenizer,
        cache_dir=str(tmp_path / "cache"),
        batch_size=2,
        validation_questions=3,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **({"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None} | options),
    )
    return trainer, module, data


def fit(*arguments, **options):
    trainer, module, data = parts(*arguments, **options)
    trainer.fit(module, data)
    return trainer


def texts(folder, tag):
    """step → text, as TensorBoard reads them."""
    events = EventAccumulator(str(folder)).Reload()
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from material import addition_rows, write_jsonl

    folder = tmp_path_factory.mktemp("run")
    source = write_jsonl(folder / "sums.jsonl", addition_rows(40))
    logger = TensorBoardLogger(folder, name=None, version="")
    fit(source, folder, SampleLogger(count=2, moments=4), logger)
    return folder


def test_samples_are_written_at_every_validation(run_folder):
    """Not at the sanity check; as many as asked for, though they come in two batches."""
    samples = texts(run_folder, "val/samples")
    assert list(samples) == [2, 4]
    for text in samples.values():
        table, *responses = text.split("\n\nResponse ")
        header, _, *rows = table.split("\n")
        assert header == "|  | question | answer | reference | correct |"
        assert len(rows) == len(responses) == 2
        assert all(re.search(r"\d+ \+ \d+ = \?", part) for part in [*rows, *responses])


def test_the_history_goes_from_masks_to_text(run_folder):
    histories = texts(run_folder, "val/denoising")
    assert list(histories) == [2, 4]
    for text in histories.values():
        lines = text.split("\n")
        steps = [int(re.match(r"    step +(\d+)/12: ", line)[1]) for line in lines]
        assert steps == [1, 5, 8, 12]
        masks = [line.count("▒") for line in lines]
        # Two of 24 positions a step, on average; the last step leaves none.
        assert NEW_TOKENS - 4 <= masks[0] < NEW_TOKENS
        assert masks == sorted(masks, reverse=True) and masks[-1] == 0


def test_a_checkpoint_is_scored_at_its_own_step(sums, tmp_path):
    """Lightning's step is 0 outside of fit, as if the weights were new."""
    fit(sums, tmp_path, SampleLogger(), False).save_checkpoint(tmp_path / "a.ckpt")
    logger = TensorBoardLogger(tmp_path / "logs", name=None, version="")
    trainer, module, data = parts(sums, tmp_path, SampleLogger(count=1), logger)
    trainer.validate(module, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    scores = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in scores.Scalars("val/nll")] == [4]
    assert list(texts(tmp_path / "logs", "val/samples")) == [4]
    trainer.fit(module, data)  # anew, with steps of its own
    scores.Reload()
    assert {event.step for event in scores.Scalars("val/nll")} == {1, 3, 4}


def test_no_questions_no_texts(sums, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs", name=None, version="")
    fit(sums, tmp_path, SampleLogger(), logger, limit_val_batches=0)
    assert EventAccumulator(str(tmp_path / "logs")).Reload().Tags()["tensors"] == []


@pytest.mark.parametrize("with_csv", [True, False])
def test_loggers_without_texts_are_left_alone(sums, tmp_path, with_csv):
    logger = CSVLogger(tmp_path / "logs") if with_csv else False
    fit(sums, tmp_path, SampleLogger(), logger)
    if with_csv:
        assert "val/accuracy" in next((tmp_path / "logs").rglob("metrics.csv")).read_text()


def test_copies_that_even_out_the_ranks_are_left_out():
    callback = SampleLogger(count=3)
    for batch in range(2):
        predictions = [Prediction(f"{batch}{i}", "?", "", None, None, None, None, 0, 0.0) for i in range(2)]
        callback.on_validation_batch_end(None, None, Answers(predictions, [True, False]), None, batch)
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
def test_texts_show_in_tensorboard_as_they_are(text):
    """Through TensorBoard's own renderer: the same characters in cell and code block, no markup but line breaks."""
    page = markdown_to_safe_html(_markdown([{"question": text, "correct": "yes", "response": f"{text}!"}]))
    cells = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    (block,) = re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)
    assert len(cells) == 3 and cells[2] == "yes"
    assert set(re.findall(r"<[^>]*>", cells[1])) <= {"<br>"} and "<" not in block
    cell = html.unescape(cells[1].replace("<br>", "\n")).replace("\N{NO-BREAK SPACE}", " ")
    plain = re.sub(r"\r\n?", "\n", text)
    assert cell == plain
    assert html.unescape(block).strip("\n") == f"{plain}\n\n{plain}!".strip("\n")


def history(callback, responses):
    tokenizer = load_tokenizer("bytes")
    states = torch.tensor([tokenizer.encode(r, add_special_tokens=False) for r in responses])
    return callback._as_text(states, tokenizer)


def test_history_marks_line_ends_and_eos():
    tokenizer = load_tokenizer("bytes")
    mask, eos = tokenizer.mask_token, tokenizer.eos_token
    states = [mask * 5, f"a{mask * 2}{eos * 2}", f"a\n{eos}b{eos}"]
    assert history(SampleLogger(), states).split("\n") == [
        "    step 1/3: ▒▒▒▒▒",
        "    step 2/3: a▒▒∎×2",
        "    step 3/3: a↵∎b∎×1",
    ]


def test_long_texts_show_both_ends_in_lines_that_fit():
    text = "a" * 3000 + "b" * 3000
    row, _, _, _, *block = _markdown([{"question": text, "response": text}]).split("\n")[2:]
    assert html.unescape(row) == "| 1 | " + "a" * 100 + " [… 5,800 characters …] " + "b" * 100 + " |"
    assert max(map(len, block)) <= 4 + 100
    shown = "".join(line[4:] for line in block)
    assert shown == 2 * ("a" * 1000 + " [… 4,000 characters …] " + "b" * 1000)
    lines = history(SampleLogger(), [text]).split("\n")
    assert max(map(len, lines)) <= 4 + len("step 1/1: ") + 100
    assert len({len(line) - len(line.lstrip(" step1/:")) for line in lines[:9]}) == 1  # all below the first one
