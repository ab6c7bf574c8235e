"""PredictionWriter: what stands in the file after other settings, holes and foreign loaders."""

import json
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from material import write_jsonl

from dream_lightning import S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.answer_file import read_predictions
from dream_lightning.batch import Answers, Prediction, PromptBatch
from dream_lightning.predict import PredictionWriter


class Parrot(L.LightningModule):
    """Answers every question with its id; the last rows of a batch may be copies that do not count."""

    def __init__(self, *, copies: int = 0, text: str = r"\boxed{1}", error: Exception | None = None):
        super().__init__()
        self.pretrained, self.sampling = "a-parrot", SamplingParams()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.copies, self.text, self.error, self.asked = copies, text, error, []

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Answers:
        if self.error:
            raise self.error
        ids = [example.id for example in batch.examples]
        self.asked += ids
        predictions = [Prediction(i, "?", self.text, None, "1", "1", True, 1, 0.0) for i in ids]
        return Answers(predictions, [place < len(ids) - self.copies for place in range(len(ids))])


def ask(path, tmp_path, *, source, model=None, writer=None, checkpoint=None, **options):
    """Predict, and return who was asked and the file's ids."""
    model = model or Parrot()
    data = S1KDataModule(str(source), tokenizer=load_tokenizer("bytes"), batch_size=3, **options)
    predict = trainer(tmp_path, writer or PredictionWriter(str(path), show=2))
    predict.predict(model, data, return_predictions=False, ckpt_path=checkpoint, weights_only=True)
    return model.asked, [line["id"] for line in read_predictions(path)]


def trainer(tmp_path, *callbacks, **options):
    usual = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **(usual | options))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "predictions.jsonl"


@pytest.mark.parametrize("cut", [1, 20, "all but the newline", "inside a character"])
def test_a_torn_line_is_asked_again(sums, tmp_path, path, cut):
    _, ids = ask(path, tmp_path, source=sums, model=Parrot(text="½"))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {"all but the newline": -1, "inside a character": lines[2].index("½".encode()) + 1}.get(cut, cut)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    asked, resumed = ask(path, tmp_path, source=sums, model=Parrot(text="½"))
    assert sorted(asked) == sorted(ids[2:]) and resumed == ids
    assert path.read_bytes() == whole


def test_a_finished_file_stays_and_its_score_is_shown(sums, tmp_path, path, capsys):
    ask(path, tmp_path, source=sums)
    whole = path.read_bytes()
    capsys.readouterr()
    assert ask(path, tmp_path, source=sums)[0] == []
    assert path.read_bytes() == whole
    assert "4 of 4 scored are correct (100.0%)" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["pretrained", "sampling", "questions", "prompting"])
def test_other_settings_are_refused_and_nothing_is_lost(sums, tmp_path, path, changed):
    ask(path, tmp_path, source=sums)
    whole = path.read_bytes()
    other, options = Parrot(), {}
    if changed == "pretrained":
        other.pretrained = "another-parrot"
    elif changed == "sampling":
        other.sampling = SamplingParams(steps=7)
    else:
        options = {"questions": {"predict_source": str(sums)}, "prompting": {"system_prompt": "Be brief."}}[changed]
    named = "questions, records" if changed == "questions" else changed
    with pytest.raises(ValueError, match=rf"\({named} differ\)"):
        ask(path, tmp_path, source=sums, model=other, **options)
    assert path.read_bytes() == whole and other.asked == []
    overwriting = PredictionWriter(str(path), overwrite=True, show=0)
    asked, ids = ask(path, tmp_path, source=sums, model=other, writer=overwriting, **options)
    assert sorted(asked) == sorted(ids) and len(ids) == (40 if changed == "questions" else 4)


@pytest.mark.parametrize("answered", ["some", "all"])
def test_another_checkpoint_of_the_same_name_is_refused(sums, tmp_path, path, answered):
    """Training went on and overwrote last.ckpt."""
    checkpoint = tmp_path / "last.ckpt"
    for value in (1.0, 2.0):
        trained = Parrot()
        torch.nn.init.constant_(trained.weight, value)
        saving = trainer(tmp_path)
        saving.strategy.connect(trained)
        saving.save_checkpoint(checkpoint)
        if value == 1:
            ask(path, tmp_path, source=sums, checkpoint=checkpoint)
            if answered == "some":
                path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
            whole = path.read_bytes()
            ask(path, tmp_path, source=sums, checkpoint=checkpoint)
    model = Parrot()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"\(weights differ"):
        ask(path, tmp_path, source=sums, checkpoint=checkpoint, model=model)
    assert path.read_bytes() == whole and model.asked == []


def test_a_run_that_died_before_its_first_answer_stands_in_nobodys_way(sums, tmp_path, path):
    """Out of memory in the first batch: tried again with other settings."""
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(path, tmp_path, source=sums, model=Parrot(error=RuntimeError("out of memory")))
    other = Parrot()
    other.sampling = SamplingParams(max_new_tokens=8)
    asked, ids = ask(path, tmp_path, source=sums, model=other)
    assert sorted(asked) == sorted(ids) and len(ids) == 4


def test_a_file_that_is_not_ours_is_left_alone(sums, tmp_path, path):
    path.parent.mkdir()
    path.write_text("notes without a line's end")
    with pytest.raises(ValueError, match="other settings"):
        ask(path, tmp_path, source=sums)
    assert path.read_text() == "notes without a line's end"


def test_copies_that_even_out_the_ranks_are_not_written(sums, tmp_path, path):
    """4 questions in batches of 3 and 1; the last row of each does not count."""
    asked, ids = ask(path, tmp_path, source=sums, model=Parrot(copies=1))
    assert len(asked) == 4 and sorted(ids) == sorted(asked[:2])


def test_a_foreign_loader_writes_but_does_not_resume(sums, tmp_path, path):
    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    data.setup("predict")
    loader = data.predict_dataloader()
    writer = PredictionWriter(str(path), show=0)
    trainer(tmp_path, writer).predict(Parrot(), loader, return_predictions=False)
    assert len(list(read_predictions(path))) == 4
    with pytest.raises(ValueError, match="cannot leave questions out"):
        trainer(tmp_path, writer).predict(Parrot(), loader, return_predictions=False)


def questions(tmp_path, count=40):
    """Questions of very different lengths, in no order of them."""
    rows = [{"question": "+".join(["1"] * (1 + 7 * i % 23)) + " = ?", "reference": "1"} for i in range(count)]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


def test_the_file_is_in_the_order_of_the_questions_though_batches_go_by_length(tmp_path, path):
    source = questions(tmp_path)
    asked, ids = ask(path, tmp_path, source=source, predict_source=str(source))
    assert ids == [f"questions-{n}" for n in range(1, 41)]
    lengths = [7 * (int(i.removeprefix("questions-")) - 1) % 23 for i in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert [file.name for file in sorted(path.parent.iterdir())] == [path.name, path.name + ".settings.json"]


def test_a_part_of_the_batches_then_the_rest(tmp_path, path):
    """`limit_predict_batches` leaves holes in the order of the questions, which the next run fills."""
    source, seen = questions(tmp_path), Parrot()
    data = S1KDataModule(str(source), predict_source=str(source), tokenizer=load_tokenizer("bytes"), batch_size=3)
    some = trainer(tmp_path, PredictionWriter(str(path), show=0), limit_predict_batches=4)
    some.predict(seen, data, return_predictions=False)
    numbers = [int(line["id"].removeprefix("questions-")) for line in read_predictions(path)]
    assert len(numbers) == 12 and numbers == sorted(numbers)
    asked, ids = ask(path, tmp_path, source=source, predict_source=str(source))
    assert ids == [f"questions-{n}" for n in range(1, 41)]
    assert sorted(asked + seen.asked) == sorted(ids)


def test_a_line_taken_out_is_asked_again_and_put_in_its_place(tmp_path, path):
    source = questions(tmp_path)
    ask(path, tmp_path, source=source, predict_source=str(source))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7] + lines[8:]))
    asked, _ = ask(path, tmp_path, source=source, predict_source=str(source))
    assert asked == ["questions-8"] and path.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"filters": {"kind": ["a"]}}, id="filters"),
        pytest.param({"reference_column": "other"}, id="column"),
        pytest.param("file", id="the file was edited"),
    ],
)
def test_other_records_under_the_same_name_are_refused(tmp_path, path, change):
    rows = [{"question": f"{n}?", "reference": "1", "other": "2", "kind": "ab"[n % 2]} for n in range(6)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    ask(path, tmp_path, source=source, predict_source=str(source), reference_column="reference")
    whole, model = path.read_bytes(), Parrot()
    options = {"reference_column": "reference"}
    if change == "file":
        write_jsonl(source, [{**row, "question": row["question"] + " "} for row in rows])
    else:
        options |= change
    with pytest.raises(ValueError, match=r"\(records differ\): records was 6, hash"):
        ask(path, tmp_path, source=source, model=model, predict_source=str(source), **options)
    assert path.read_bytes() == whole and model.asked == []


def test_any_precision(sums, tmp_path, path):
    """Under some Lightning rebuilds every batch, the questions in it too."""
    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    half = trainer(tmp_path, PredictionWriter(str(path), show=0), precision="bf16-true")
    half.predict(Parrot(), data, return_predictions=False)
    assert len(list(read_predictions(path))) == 4
    with pytest.raises(ValueError, match=r"precision was bf16-true and is 32-true"):
        ask(path, tmp_path, source=sums)


def test_two_runs_at_once_are_refused(sums, tmp_path, path):
    class Meanwhile(Parrot):
        def predict_step(self, batch, batch_idx):
            with pytest.raises(ValueError, match="another predict is writing"):
                ask(path, tmp_path, source=sums)
            return super().predict_step(batch, batch_idx)

    assert len(ask(path, tmp_path, source=sums, model=Meanwhile())[1]) == 4


def test_the_bar_shows_tokens_a_second(sums, tmp_path, path):
    """4 answers of 1 token each."""
    bar, speeds = TQDMProgressBar(), []

    class Watching(PredictionWriter):
        def on_predict_batch_end(self, trainer, *arguments):
            super().on_predict_batch_end(trainer, *arguments)
            speeds.append((bar.predict_progress_bar.postfix, self._tokens))

    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    watched = trainer(tmp_path, bar, Watching(str(path), show=0), enable_progress_bar=True)
    watched.predict(Parrot(), data, return_predictions=False)
    assert [tokens for _, tokens in speeds] == [3, 4]
    assert all(re.fullmatch(r"[\d,]+ tokens/s", shown) for shown, _ in speeds)


def test_the_table_shows_texts_as_they_are(sums, tmp_path, path, capsys, monkeypatch):
    """Brackets, backslashes and colons mean something to rich."""
    monkeypatch.setenv("COLUMNS", "120")
    ask(path, tmp_path, source=sums)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    odd = {"prompt": r"[bold] \[x] :apple:", "answer": None, "reference": r"[1, 2)\\[/]", "correct": False}
    path.write_text("".join(json.dumps(line | odd) + "\n" for line in lines))
    capsys.readouterr()
    assert ask(path, tmp_path, source=sums)[0] == []
    shown = capsys.readouterr().out
    for text in (odd["prompt"], odd["reference"], "(unparsed)", "no", "0 of 4 scored", "4 without an answer"):
        assert text in shown


def test_the_file_lies_where_runs_of_its_name_log(tmp_path):
    logger = CSVLogger(tmp_path, name="mine")
    L.Trainer(
        logger=logger, enable_progress_bar=False, accelerator="cpu", callbacks=[PredictionWriter(show=0)]
    ).predict(
        Parrot(),
        S1KDataModule("bundled", tokenizer=load_tokenizer("bytes"), validation_source="bundled", batch_size=250),
        return_predictions=False,
    )
    assert len(list(read_predictions(tmp_path / "mine" / "predictions.jsonl"))) == 500
