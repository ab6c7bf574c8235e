"""PredictionWriter: no answer is lost or doubled after kills, and none is mixed with those of other settings."""

import itertools
import json
import random
import re

import lightning as L
import pytest
import torch
import torch.distributed as dist
from kill_points import killed_before
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from material import write_jsonl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dream_lightning import S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.batch import Answers, Prediction, PromptBatch
from dream_lightning.errors import UserError
from dream_lightning.predict import PredictionFile, PredictionWriter, weights_fingerprint

SETTINGS = {"weights": "w", "sampling.steps": 4}
ANSWERS = {n: {"id": f"q{n}", "prediction": "½" * (n % 7)} for n in range(40)}
WHOLE = "".join(json.dumps({"number": n} | row, ensure_ascii=False) + "\n" for n, row in ANSWERS.items()).encode()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "predictions.jsonl"


def files(path):
    return sorted(file.name for file in path.parent.iterdir())


FINISHED = ["predictions.jsonl", "predictions.jsonl.settings.json"]


# The files, without a trainer


def simulated_run(path, dice, ranks, *, batches):
    """Ranks answer open questions until so many batches are done; returns whether that was all of them."""
    processes = [PredictionFile(path) for _ in range(ranks)]
    done = processes[0].open(SETTINGS)
    left = [n for n in ANSWERS if n not in done]
    if left:
        processes[0].write_settings(SETTINGS)
    dice.shuffle(left)
    for _ in range(batches):
        if not left:
            for process in processes[1:]:
                process.close()
            processes[0].merge(len(ANSWERS))
            processes[0].close()
            return True
        batch, left = left[:3], left[3:]
        rank = dice.randrange(ranks)
        processes[rank].append(rank, {n: ANSWERS[n] for n in batch})
    return False


def tear(file, dice):
    """A kill during a write leaves a part of the last line."""
    content = file.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    file.write_bytes(content[: dice.randint(last, len(content))])


@pytest.mark.parametrize("seed", range(30))
def test_any_kills_on_any_numbers_of_ranks_give_the_file_of_one_run(path, seed):
    dice = random.Random(seed)
    for _ in range(100):
        if simulated_run(path, dice, dice.randint(1, 4), batches=dice.randint(0, 6)) and dice.random() < 0.5:
            break
        for file in path.parent.glob("*.jsonl"):
            if file.stat().st_size and dice.random() < 0.5:
                tear(file, dice)
        if path.exists() and dice.random() < 0.5:  # a user removes a line
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(line for line in lines if line is not dice.choice(lines)))
    assert path.read_bytes() == WHOLE and files(path) == FINISHED


@pytest.mark.parametrize("ended", [False, True])
def test_a_kill_before_any_change_of_a_file_loses_nothing(tmp_path, ended):
    """From a run that was killed, and from a file with a line removed and a torn one."""
    for moment in itertools.count():
        path = tmp_path / str(moment) / "predictions.jsonl"
        simulated_run(path, random.Random(moment), 3, batches=99 if ended else 5)
        if ended:
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]) + b'{"id"')
        killed = [
            killed_before(moment, path.parent, lambda path=path: simulated_run(path, random.Random(1), 3, batches=99))
            for _ in range(2)
        ]
        assert simulated_run(path, random.Random(2), 2, batches=99)
        assert path.read_bytes() == WHOLE and files(path) == FINISHED
        if not killed[0]:
            break
    assert moment > 5


def test_a_file_that_any_rank_still_writes_is_refused(path):
    first, second = PredictionFile(path), PredictionFile(path)
    first.open(SETTINGS)
    first.write_settings(SETTINGS)
    second.append(1, {3: ANSWERS[3]})
    with pytest.raises(UserError, match="another predict is writing"):
        PredictionFile(path).open(SETTINGS)
    first.close()  # rank 0 was killed, rank 1 lives
    with pytest.raises(UserError, match="another predict is writing"):
        PredictionFile(path).open(SETTINGS, overwrite=True)
    second.close()
    assert PredictionFile(path).open(SETTINGS) == {3}


def test_answers_in_parts_are_guarded_like_the_file(path):
    simulated_run(path, random.Random(0), 2, batches=2)
    assert not path.exists()
    for other, told in (
        ({"weights": "other"}, "settings: weights was 'w' and is 'other'. Move"),
        ({"sampling.steps": 5}, "settings: sampling.steps was 4 and is 5. Move"),
        ({"precision": "32"}, "settings: precision was None and is '32'. Move"),
    ):
        with pytest.raises(UserError, match=told):
            PredictionFile(path).open(SETTINGS | other)
    with pytest.raises(UserError, match="only an S1KDataModule leaves their questions out"):
        PredictionFile(path).open(SETTINGS, resumable=False)
    assert len(PredictionFile(path).open(SETTINGS)) == 6
    assert PredictionFile(path).open({"weights": "other"}, overwrite=True) == set()


def test_missing_and_repeated_answers_are_an_error(path):
    file = PredictionFile(path)
    file.open(SETTINGS)
    for _ in range(2):
        file.append(0, {0: ANSWERS[0]})
    with pytest.raises(UserError, match="2 answers were written but 1 found"):
        file.merge(2)
    assert not path.exists()


def test_a_line_that_is_no_prediction_is_an_error_and_stays(path):
    simulated_run(path, random.Random(0), 1, batches=99)
    path.write_text("not JSON\n")
    with pytest.raises(UserError, match=r"a line that is no prediction \(b'not JSON"):
        PredictionFile(path).open(SETTINGS)
    assert path.read_text() == "not JSON\n"


# The callback


class Parrot(L.LightningModule):
    """A stub that gives every question the same answer; the last rows of a batch may be copies that do not count."""

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
        return Answers(predictions, [row < len(ids) - self.copies for row in range(len(ids))])


def trainer(tmp_path, *callbacks, **options):
    usual = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **(usual | options))


def ids_in(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def ask(path, tmp_path, *, source, model=None, overwrite=False, checkpoint=None, limit=None, **options):
    """Predict; returns who was asked and the ids in the file."""
    model = model or Parrot()
    options = {name: str(value) if name == "predict_source" else value for name, value in options.items()}
    data = S1KDataModule(str(source), tokenizer=load_tokenizer("bytes"), batch_size=3, **options)
    predict = trainer(tmp_path, PredictionWriter(str(path), overwrite), limit_predict_batches=limit)
    predict.predict(model, data, return_predictions=False, ckpt_path=checkpoint, weights_only=True)
    return model.asked, ids_in(path)


def questions(tmp_path, count=40):
    """Questions of very different lengths, not in the order of their lengths."""
    rows = [{"question": "+".join(["1"] * (1 + 7 * i % 23)) + " = ?", "reference": "1"} for i in range(count)]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


def test_a_finished_file_is_not_asked_again_and_its_score_is_printed(sums, tmp_path, path, capsys):
    ask(path, tmp_path, source=sums)
    whole = path.read_bytes()
    capsys.readouterr()
    assert ask(path, tmp_path, source=sums)[0] == []
    assert path.read_bytes() == whole and files(path) == FINISHED
    assert "4 questions, 0 without an answer; 4 of 4 scored are correct" in capsys.readouterr().out


ROWS = [{"question": f"{n}?", "reference": "1", "other": "2", "kind": "ab"[n % 2]} for n in range(6)]
PUZZLES = [{"question": "Make it.", "nums": "30,100,93", "target": str(n), "reference": "1"} for n in range(6)]


@pytest.mark.parametrize(
    ("options", "rows", "changed"),
    [
        ({"model": {"pretrained": "another-parrot"}}, ROWS, "pretrained was 'a-parrot' and is 'another-parrot'. Move"),
        ({"model": {"sampling": SamplingParams(steps=7)}}, ROWS, "sampling.steps was 256 and is 7. Move"),
        ({"system_prompt": "Be brief."}, ROWS, "system_prompt was None and is 'Be brief.'. Move"),
        ({"filters": {"kind": ["a"]}}, ROWS, "records was '6, hash .* and is '3, hash .*'. Move"),
        ({"reference_column": "other"}, ROWS, "records was .*. Move"),
        ({}, [{**row, "question": row["question"] + " "} for row in ROWS], "records was .*. Move"),
        ({"task": "countdown"}, [{**row, "target": "7"} for row in PUZZLES], "records was .*. Move"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(sums, tmp_path, path, options, rows, changed):
    file = tmp_path / "rows.jsonl"
    usual = {"source": sums, "predict_source": file, "reference_column": "reference", "task": options.get("task")}
    write_jsonl(file, PUZZLES if usual["task"] else ROWS)
    ask(path, tmp_path, **usual)
    write_jsonl(file, rows)
    whole, other = path.read_bytes(), Parrot()
    vars(other).update(options.get("model", {}))
    options = usual | {name: value for name, value in options.items() if name != "model"}
    with pytest.raises(UserError, match=f"with other settings: {changed}"):
        ask(path, tmp_path, model=other, **options)
    assert path.read_bytes() == whole and other.asked == [] and files(path) == FINISHED
    asked, ids = ask(path, tmp_path, model=other, overwrite=True, **options)
    assert sorted(asked) == sorted(ids) and len(ids) == (3 if "filters" in options else 6)


@pytest.mark.parametrize("answered", ["some", "all"])
def test_another_checkpoint_of_the_same_name_is_refused(sums, tmp_path, path, answered):
    """Training resumed and overwrote last.ckpt."""
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
    with pytest.raises(UserError, match="with other settings: weights was"):
        ask(path, tmp_path, source=sums, checkpoint=checkpoint, model=model)
    assert path.read_bytes() == whole and model.asked == []


def test_a_run_that_died_before_its_first_answer_leaves_nothing(sums, tmp_path, path):
    """Out of memory in the first batch, then tried with other settings."""
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(path, tmp_path, source=sums, model=Parrot(error=RuntimeError("out of memory")))
    other = Parrot()
    other.sampling = SamplingParams(max_new_tokens=8)
    asked, ids = ask(path, tmp_path, source=sums, model=other)
    assert sorted(asked) == sorted(ids) and len(ids) == 4


def test_a_file_of_something_else_is_not_changed(sums, tmp_path, path):
    path.parent.mkdir()
    path.write_text("notes without a newline at the end")
    with pytest.raises(UserError, match="other settings"):
        ask(path, tmp_path, source=sums)
    assert path.read_text() == "notes without a newline at the end" and files(path) == [path.name]


def test_copies_that_give_the_ranks_equal_batches_are_not_written(sums, tmp_path, path):
    """4 questions in batches of 3 and 1; the last row of each does not count."""
    asked, ids = ask(path, tmp_path, source=sums, model=Parrot(copies=1))
    assert len(asked) == 4 and sorted(ids) == sorted(asked[:2])


def test_another_dataloader_writes_but_does_not_resume(sums, tmp_path, path):
    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    data.setup("predict")
    loader = data.predict_dataloader()
    writer = PredictionWriter(str(path))
    trainer(tmp_path, writer).predict(Parrot(), loader, return_predictions=False)
    assert len(ids_in(path)) == 4
    with pytest.raises(UserError, match="only an S1KDataModule leaves their questions out"):
        trainer(tmp_path, writer).predict(Parrot(), loader, return_predictions=False)


def test_batches_go_by_length_the_file_by_question_and_what_is_missing_is_filled_in(tmp_path, path):
    source, ids = questions(tmp_path), [f"questions-{n}" for n in range(1, 41)]
    asked, some = ask(path, tmp_path, source=source, predict_source=source, limit=4)
    lengths = [7 * (int(i.removeprefix("questions-")) - 1) % 23 for i in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert len(some) == 12 and some == [i for i in ids if i in asked]
    others, whole = ask(path, tmp_path, source=source, predict_source=source)
    assert whole == ids and sorted(asked + others) == sorted(ids) and files(path) == FINISHED
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7] + lines[8:]))  # a user removes a line
    assert ask(path, tmp_path, source=source, predict_source=source)[0] == ["questions-8"]
    assert path.read_bytes() == b"".join(lines)


def test_any_precision(sums, tmp_path, path):
    """With some of them Lightning rebuilds every batch, including its examples."""
    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    half = trainer(tmp_path, PredictionWriter(str(path)), precision="bf16-true")
    half.predict(Parrot(), data, return_predictions=False)
    assert len(ids_in(path)) == 4
    with pytest.raises(UserError, match=r"precision was 'bf16-true' and is '32-true'"):
        ask(path, tmp_path, source=sums)


def test_the_progress_bar_shows_tokens_per_second_and_the_default_path_is_that_of_the_logger(sums, tmp_path):
    bar, shown = TQDMProgressBar(), []

    class Watching(PredictionWriter):
        def on_predict_batch_end(self, trainer, *arguments):
            super().on_predict_batch_end(trainer, *arguments)
            shown.append(bar.predict_progress_bar.postfix)

    data = S1KDataModule(str(sums), tokenizer=load_tokenizer("bytes"), batch_size=3)
    logger = CSVLogger(tmp_path, name="mine")
    watched = trainer(tmp_path, bar, Watching(), enable_progress_bar=True, logger=logger)
    watched.predict(Parrot(), data, return_predictions=False)
    assert len(shown) == 2 and all(re.fullmatch(r"[\d,]+ tokens/s", text) for text in shown)
    assert len(ids_in(tmp_path / "mine" / "predictions.jsonl")) == 4


# Which weights answered


@pytest.fixture
def mesh(tmp_path):
    """Of one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def module_of(weight, **parameters):
    module = L.LightningModule()
    for name, value in {"weight": weight, **parameters}.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    return module


def test_the_fingerprint_depends_on_values_types_names_and_shapes_and_not_on_sharding(mesh):
    weight = torch.arange(6000.0).reshape(60, 100)
    same = [weight, weight.clone(), distribute_tensor(weight, mesh, [Shard(0)])]
    others = [weight + 1e-3, weight.bfloat16(), weight[:50]]
    modules = [*map(module_of, [*same, *others]), module_of(weight, bias=torch.zeros(1))]
    assert len({weights_fingerprint(module) for module in modules}) == 1 + 4
