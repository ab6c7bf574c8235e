"""PredictionWriter: no answer is lost or doubled after kills, and none is mixed with those of other settings."""

import itertools
import json
import random
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from kill_points import killed_before
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from material import quiet_trainer, write_jsonl
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


def simulated_run(path, dice, ranks, *, batches):
    """Ranks answer open questions until so many batches are done; returns whether that was all of them."""
    first, *others = processes = [PredictionFile(path) for _ in range(ranks)]
    left = sorted(set(ANSWERS) - first.open(SETTINGS))
    if left:
        first.write_settings(SETTINGS)
    dice.shuffle(left)
    while left and batches:
        rank, batch, left, batches = dice.randrange(ranks), left[:3], left[3:], batches - 1
        processes[rank].append(rank, {n: ANSWERS[n] for n in batch})
    if left or not batches:
        return False
    for process in others:
        process.close()
    first.merge(len(ANSWERS))
    first.close()
    return True


@pytest.mark.parametrize("seed", range(30))
def test_any_kills_on_any_numbers_of_ranks_give_the_file_of_one_run(path, seed):
    dice = random.Random(seed)
    for _ in range(100):
        if simulated_run(path, dice, dice.randint(1, 4), batches=dice.randint(0, 6)) and dice.random() < 0.5:
            break
        for file in path.parent.glob("*.jsonl"):
            if (content := file.read_bytes()) and dice.random() < 0.5:  # a kill leaves a part of the last line
                file.write_bytes(content[: dice.randint(content[:-1].rfind(b"\n") + 1, len(content))])
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
    told = "settings: sampling.steps was 4 and is 5; precision was None and is '32'. Move"
    with pytest.raises(UserError, match=told):
        PredictionFile(path).open(SETTINGS | {"sampling.steps": 5, "precision": "32"})
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


@pytest.mark.parametrize(
    ("content", "told"),
    [("notes without a newline", "with other settings"), ("not JSON\n", r"a line that is no prediction \(b'not JSON")],
)
def test_a_file_of_something_else_is_an_error_and_stays(path, content, told):
    path.parent.mkdir()
    path.write_text(content)
    file = PredictionFile(path)
    with pytest.raises(UserError, match=told):
        file.open(SETTINGS)
    file.close()
    assert path.read_text() == content and files(path) == [path.name]


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "3"])
def test_damaged_settings_are_named(path, content):
    simulated_run(path, random.Random(0), 2, batches=2)
    settings = path.with_name(FINISHED[1])
    settings.write_text(content)
    with pytest.raises(UserError, match=f"{settings} is damaged or no JSON object .* Move it away"):
        PredictionFile(path).open(SETTINGS)


def test_a_file_that_cannot_be_written_is_named_and_a_full_disk_keeps_the_answers(path, tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file" / "p.jsonl", tmp_path, Path("/proc/p.jsonl")):
        with pytest.raises(UserError, match=f"{wrong} cannot be written .* set --trainer.callbacks.path=FILE"):
            PredictionFile(wrong).open(SETTINGS)
    file = PredictionFile(path)
    file.open(SETTINGS)
    file.write_settings(SETTINGS)
    file.append(0, {3: ANSWERS[3]})
    disk, file._part = file._part, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(
        UserError, match=f"{path} cannot be written .No space left on device.; the answers in it are kept"
    ):
        file.append(0, {4: ANSWERS[4]})
    file._part.close()
    disk.close()
    assert PredictionFile(path).open(SETTINGS) == {3}


class Parrot(L.LightningModule):
    """A stub that gives every question the same answer; the last rows of a batch may be copies that do not count."""

    def __init__(self, *, copies: int = 0, error: Exception | None = None, **settings):
        super().__init__()
        vars(self).update({"pretrained": "a-parrot", "sampling": SamplingParams(), **settings})
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.copies, self.error, self.asked = copies, error, []

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Answers:
        if self.error:
            raise self.error
        ids = [example.id for example in batch.examples]
        self.asked += ids
        predictions = [Prediction(i, "?", r"\boxed{1}", None, "1", "1", True, 1, 0.0) for i in ids]
        return Answers(predictions, [row < len(ids) - self.copies for row in range(len(ids))])


def bytes_data(source, **options):
    return S1KDataModule(str(source), tokenizer=load_tokenizer("bytes"), batch_size=3, **options)


def ids_in(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def ask(path, sums):
    """Predict; returns who was asked and the ids in the file."""

    def predict(model=None, *, overwrite=False, checkpoint=None, trainer=None, predict_source=None, **options):
        model, options = model or Parrot(), {"predict_source": predict_source and str(predict_source), **options}
        predict = quiet_trainer(callbacks=[PredictionWriter(str(path), overwrite)], **trainer or {}).predict
        predict(model, bytes_data(sums, **options), return_predictions=False, ckpt_path=checkpoint, weights_only=True)
        return model.asked, ids_in(path)

    return predict


def test_a_finished_file_is_not_asked_again_and_its_score_is_printed(ask, path, capsys):
    ask()
    whole = path.read_bytes()
    capsys.readouterr()
    assert ask()[0] == []
    assert path.read_bytes() == whole and files(path) == FINISHED
    assert "4 questions, 0 without an answer; 4 of 4 scored are correct" in capsys.readouterr().out


ROWS = [{"question": f"{n}?", "reference": "1", "other": "2", "kind": "ab"[n % 2]} for n in range(6)]
PUZZLES = [{"question": "Make it.", "nums": "30,100,93", "target": str(n), "reference": "1"} for n in range(6)]


@pytest.mark.parametrize(
    ("options", "rows", "changed"),
    [
        ({"model": Parrot(pretrained="another")}, ROWS, "pretrained was 'a-parrot' and is 'another'"),
        ({"model": Parrot(sampling=SamplingParams(steps=7))}, ROWS, "sampling.steps was 256 and is 7"),
        ({"trainer": {"precision": "bf16-true"}}, ROWS, "precision was '32-true' and is 'bf16-true'"),
        ({"system_prompt": "Be brief."}, ROWS, "system_prompt was None and is 'Be brief.'"),
        ({"filters": {"kind": ["a"]}}, ROWS, "records was '6, hash .* and is '3, hash .*'"),
        ({"reference_column": "other"}, ROWS, "records was .*"),
        ({}, [{**row, "question": row["question"] + " "} for row in ROWS], "records was .*"),
        ({"task": "countdown"}, [{**row, "target": "7"} for row in PUZZLES], "records was .*"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(ask, tmp_path, path, options, rows, changed):
    """One difference at a time, and no other is named. Lightning rebuilds the examples of a batch in bf16-true."""
    file, task = tmp_path / "rows.jsonl", options.get("task")
    usual = {"predict_source": write_jsonl(file, PUZZLES if task else ROWS), "reference_column": "reference"}
    ask(**usual, task=task)
    write_jsonl(file, rows)
    whole, options = path.read_bytes(), usual | {"model": Parrot()} | options
    with pytest.raises(UserError, match=f"with other settings: {changed}. Move"):
        ask(**options)
    assert path.read_bytes() == whole and options["model"].asked == [] and files(path) == FINISHED
    asked, ids = ask(**options, overwrite=True)
    assert sorted(asked) == sorted(ids) and len(ids) == (3 if "filters" in options else 6)


@pytest.mark.parametrize("answered", ["some", "all"])
def test_another_checkpoint_of_the_same_name_is_refused(ask, tmp_path, path, answered):
    """Training resumed and overwrote last.ckpt."""
    checkpoint, model = tmp_path / "last.ckpt", Parrot()
    torch.nn.init.ones_(model.weight)
    saving = quiet_trainer()
    saving.strategy.connect(model)
    saving.save_checkpoint(checkpoint)
    ask(checkpoint=checkpoint)
    whole = path.read_bytes() if answered == "all" else b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    path.write_bytes(whole)
    torch.nn.init.zeros_(model.weight)
    saving.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="with other settings: weights was"):
        ask(model, checkpoint=checkpoint)
    assert path.read_bytes() == whole and model.asked == []


def test_a_run_that_died_leaves_nothing_and_copies_of_questions_are_not_written(ask):
    """Out of memory in the first batch, then other settings; batches of 3 and 1 whose last rows do not count."""
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(Parrot(error=RuntimeError("out of memory")))
    asked, ids = ask(Parrot(sampling=SamplingParams(max_new_tokens=8), copies=1))
    assert len(asked) == 4 and sorted(ids) == sorted(asked[:2])


def test_another_dataloader_writes_but_does_not_resume(sums, path):
    data = bytes_data(sums)
    data.setup("predict")
    predict = quiet_trainer(callbacks=[PredictionWriter(str(path))]).predict
    predict(Parrot(), data.predict_dataloader(), return_predictions=False)
    assert len(ids_in(path)) == 4
    with pytest.raises(UserError, match="only an S1KDataModule leaves their questions out"):
        predict(Parrot(), data.predict_dataloader(), return_predictions=False)


def test_batches_go_by_length_the_file_by_question_and_what_is_missing_is_filled_in(ask, tmp_path, path):
    rows = [{"question": "+".join(["1"] * (1 + 7 * i % 23)) + " = ?", "reference": "1"} for i in range(40)]
    source, ids = write_jsonl(tmp_path / "questions.jsonl", rows), [f"questions-{n}" for n in range(1, 41)]
    asked, some = ask(predict_source=source, trainer={"limit_predict_batches": 4})
    lengths = [7 * (int(i.removeprefix("questions-")) - 1) % 23 for i in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert len(some) == 12 and some == [i for i in ids if i in asked]
    others, whole = ask(predict_source=source)
    assert whole == ids and sorted(asked + others) == sorted(ids) and files(path) == FINISHED
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7] + lines[8:]))  # a user removes a line
    assert ask(predict_source=source)[0] == ["questions-8"]
    assert path.read_bytes() == b"".join(lines)


def test_the_progress_bar_shows_tokens_per_second_and_the_default_path_is_that_of_the_logger(sums, tmp_path):
    bar, shown = TQDMProgressBar(), []

    class Watching(PredictionWriter):
        def on_predict_batch_end(self, trainer, *arguments):
            super().on_predict_batch_end(trainer, *arguments)
            shown.append(bar.predict_progress_bar.postfix)

    options = {"enable_progress_bar": True, "logger": CSVLogger(tmp_path, name="mine")}
    predict = quiet_trainer(callbacks=[bar, Watching()], **options).predict
    predict(Parrot(), bytes_data(sums), return_predictions=False)
    assert len(shown) == 2 and all(re.fullmatch(r"[\d,]+ tokens/s", text) for text in shown)
    assert len(ids_in(tmp_path / "mine" / "predictions.jsonl")) == 4


def test_the_fingerprint_depends_on_values_types_names_and_shapes_and_not_on_sharding(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    weight = torch.arange(6000.0).reshape(60, 100)
    same = [weight, weight.clone(), distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])]
    others = [weight + 1e-3, weight.bfloat16(), weight[:50]]
    modules = [torch.nn.ParameterDict({"weight": value}) for value in (*same, *others)]
    modules.append(torch.nn.ParameterDict({"weight": weight, "bias": torch.zeros(1)}))
    prints = [weights_fingerprint(module) for module in modules]
    dist.destroy_process_group()
    assert len(set(prints[:3])) == 1 and len(set(prints)) == 1 + 4
