"""Runs that are told to stop: what they save, and that resuming changes nothing."""

import os
import signal
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from material import SIZES, addition_rows, logged, quiet_trainer, short_trainer, tiny_data, tiny_module, write_jsonl
from meeting import end, fork

from dream_lightning import SamplingParams
from dream_lightning.atomic import lock
from dream_lightning.training import Autosave

STEPS = 16
TRAIN, VALIDATE = "on_train_batch_start", "on_validation_batch_start"


class At(L.Callback):
    """Calls `work(pl_module)` in `hook` after optimizer step `step`, if its last argument is `last`, an index."""

    def __init__(self, hook, step, work, last=None):
        def call(trainer, pl_module, *args):
            if trainer.global_step == step and last in (None, args[-1]) and not trainer.sanity_checking:
                work(pl_module)

        setattr(self, hook, call)


def signal_at(step, number=signal.SIGTERM, hook=TRAIN, last=None):
    """By default at the first of a step's two micro-batches."""
    last = step % 5 * 2 if hook == TRAIN else last
    return At(hook, step, lambda _: signal.raise_signal(number), last)


def die(_):
    raise KeyError("killed")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("autosave") / "sums.jsonl", addition_rows(30))


def fit(source, folder, *callbacks, ckpt_path=None, every=100):
    """9 micro-batches an epoch, 2 a step (1 in its last); validation after steps 3, 10, 13 and in the middle of 7."""
    sampling, adamw = SamplingParams(max_new_tokens=4, steps=2), lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    module = tiny_module(new_model=SIZES | {"num_hidden_layers": 1}, sampling=sampling, optimizer=adamw)
    trainer = quiet_trainer(
        Autosave(folder / "checkpoints", every_n_train_steps=every, save_top_k=0, save_last=True),
        *callbacks,
        **{"max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1},
        **{"val_check_interval": 6, "check_val_every_n_epoch": None, "limit_val_batches": 1},
        logger=TensorBoardLogger(folder),
    )
    data = tiny_data(source, source.parent, batch_size=3)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def saved_step(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(source, folder), logged(folder)


def assert_same(module, folder, whole):
    """The same weights to the bit, and the same log."""
    for p, q in zip(whole[0].parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert logged(folder) == whole[1]


@pytest.mark.parametrize(
    ("step", "saved", "options"),
    [
        (3, 4, {}),
        (4, 5, {}),  # end of an epoch
        (9, 10, {}),  # a validation is due
        (0, 1, {"hook": "on_before_optimizer_step"}),
        (10, 10, {"hook": VALIDATE, "last": 0}),
        (13, 13, {"hook": VALIDATE, "last": 1}),
        (6, 7, {"hook": VALIDATE, "last": 0}),  # in the middle of a step
        (6, 7, {"number": signal.SIGINT}),
        (6, 7, {"number": signal.SIGUSR1}),
    ],
)
def test_told_to_stop_it_saves_and_resumes_to_the_same_weights(source, tmp_path, whole, capfd, step, saved, options):
    number = options.get("number", signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(source, tmp_path, signal_at(step, **options))
    assert stop.value.code == 128 + number
    assert saved_step(tmp_path) == saved
    assert f"{number.name}: stopping after this optimizer step" in capfd.readouterr().err
    assert_same(fit(source, tmp_path, ckpt_path="last"), tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once_without_saving_and_former_handlers_return(source, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit) as stop:
        fit(source, tmp_path, signal_at(4, signal.SIGINT), signal_at(4, signal.SIGINT))
    assert stop.value.code == 1 and not list((tmp_path / "checkpoints").iterdir())
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("moment", "every", "attempts"),
    [
        (At(TRAIN, 3, die, last=7), 3, (None, "last")),  # also in the first step of the resumed run
        (At("on_validation_batch_end", 10, die), 5, (None,)),
    ],
    ids=["in a step", "in a validation"],
)
def test_killed_it_resumes_to_the_same_weights(source, tmp_path, whole, moment, every, attempts):
    """A save is never in the middle of a step, and a validation that was killed is repeated."""
    for ckpt_path in attempts:
        with pytest.raises(KeyError):
            fit(source, tmp_path, moment, every=every, ckpt_path=ckpt_path)
        assert saved_step(tmp_path) % every == 0
    assert_same(fit(source, tmp_path, every=every, ckpt_path="last"), tmp_path, whole)


def test_a_diverged_run_does_not_replace_its_last_good_checkpoint(source, tmp_path):
    diverge = At(TRAIN, 7, lambda module: next(module.parameters()).data.fill_(torch.nan))
    with pytest.raises(ValueError, match="train/loss is nan at step 9: the run has diverged"):
        fit(source, tmp_path, diverge, every=3)
    assert saved_step(tmp_path) == 6


def test_the_last_step_is_saved_whatever_the_interval(source, tmp_path, whole):
    fit(source, tmp_path, every=7)
    assert saved_step(tmp_path) == STEPS
    assert_same(fit(source, tmp_path, every=7, ckpt_path="last"), tmp_path, whole)  # nothing left to do


def test_early_stopping_saves_where_it_stops(source, tmp_path):
    fit(source, tmp_path, EarlyStopping("val/nll", mode="max", patience=1))
    assert saved_step(tmp_path) == 6


def test_what_a_kill_left_incomplete_is_removed_and_nothing_else(source, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt.1234.partial", "my-dream.1234.partial", ".lock"):
        (folder / name).write_text("torn")
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        fit(source, tmp_path, ckpt_path="last")
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "my-dream.1234.partial"}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.ckpt"))}


@pytest.mark.parametrize("weights_only", [False, True])
def test_another_run_in_the_folder_moves_the_checkpoints_away_at_its_first_save(source, tmp_path, weights_only):
    """Not before, so that one that fails early changes nothing; `last.ckpt` is the newest, every time."""
    folder = tmp_path / "checkpoints"
    best = {"monitor": "val/nll", "enable_version_counter": False, "save_weights_only": weights_only}

    def start(*callbacks, **options):
        fit(source, tmp_path, *callbacks, ModelCheckpoint(folder, "best-{step}", mode="max", **best), **options)

    with pytest.raises(SystemExit):
        start(signal_at(6))
    first = contents(folder)
    assert {"last.ckpt"} < first.keys()
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="checkpoints of another run, .* --ckpt_path last"):
        start(At(TRAIN, 2, die))
    assert contents(folder) == first
    with pytest.raises(SystemExit):
        start(signal_at(4))
    moved = {f"version_0/{name}": content for name, content in first.items()}
    assert contents(folder).items() >= moved.items() and saved_step(tmp_path) == 5
    start(ckpt_path="last")  # resumes that run, and overwrites it alone
    assert contents(folder).items() >= moved.items() and saved_step(tmp_path) == STEPS
    second = contents(folder).items() - moved.items()
    start(ckpt_path=folder / "version_0" / "last.ckpt")  # no run of the folder itself
    assert saved_step(tmp_path) == STEPS
    kept = contents(folder).keys()
    assert kept >= {f"version_1/{name}" for name, _ in second} | moved.keys()
    assert not [path for path in folder.iterdir() if not path.name.endswith("ckpt") and not path.is_dir()]


def test_one_trainer_goes_on_in_its_own_folder(source, tmp_path):
    trainer = short_trainer(tmp_path, Autosave(tmp_path / "c", save_last=True, save_top_k=0), max_steps=2)
    module, data = tiny_module(), tiny_data(source, source.parent)
    for steps in (2, 3):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, data)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["last.ckpt"]


def test_two_runs_in_one_folder_at_once_are_refused(source, tmp_path):
    """The first is just saving; then it is killed, with a worker of its DataLoader still alive."""
    folder, (ours, theirs) = tmp_path / "checkpoints", os.pipe()
    folder.mkdir()
    saving = folder / "last.ckpt.1234.partial"

    def train():
        locked = lock(folder / ".lock", "")
        saving.write_text("half")
        worker = os.fork()
        os.write(theirs, b"1")
        time.sleep(20 if worker else 40)
        locked.close()

    first = fork(train, tmp_path / "log")
    os.read(ours, 1)
    with pytest.raises(ValueError, match=f"another process trains in {folder}: wait for it or end it"):
        fit(source, tmp_path)
    assert saving.exists()
    os.kill(first, signal.SIGKILL)
    assert end(first) == -signal.SIGKILL
    fit(source, tmp_path)
    assert saved_step(tmp_path) == STEPS and not saving.exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_built(source, tmp_path):
    (tmp_path / "file").write_text("")
    module = tiny_module()
    trainer = short_trainer(tmp_path, Autosave(tmp_path / "file" / "c", save_last=True))
    with pytest.raises(
        ValueError, match=r"folder of checkpoints is .*file/c, where no file can be written \(Not a directory\)"
    ):
        trainer.fit(module, tiny_data(source, source.parent))
    assert module.model is None


def test_a_slurm_job_is_requeued(source, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(SystemExit):
            fit(source, tmp_path, signal_at(3, number))
    assert commands == [["scontrol", "requeue", "17"]]
