"""`python kill_runs.py FOLDER KILLS SEED`: train until the run was killed KILLS times, then to its end.

This run is in FOLDER/killed, and one without kills in FOLDER/whole. Every attempt is a fork of this process, so imports
are loaded once. Prints a line of JSON for each kill: its moment, how the attempt ended, and what it left incomplete;
then one with the exit statuses of both runs. The kills do not depend on the speed of the machine.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from kill_points import Watch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from material import addition_rows, write_jsonl

from dream_lightning import DreamModule, S1KDataModule, SamplingParams
from dream_lightning.training import Autosave
from dream_lightning.training.checkpointing import SafeCheckpointIO

STEPS = 120
MOMENTS = ("any time", "before a change", "in a save")
FEW = 5  # steps that an attempt does at most before it waits for its kill


def train(folder: Path, devices: int = 1, steps: int = STEPS, callbacks: tuple[L.Callback, ...] = ()) -> None:
    """What `fit --ckpt_path last` does with base.yaml, smaller."""
    torch.manual_seed(0)
    module = DreamModule(
        new_model={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer="bytes",
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        sampling=SamplingParams(max_new_tokens=4, steps=2),
    )
    options = {"batch_size": 2, "validation_questions": 1, "cache_dir": str(folder.parent / "cache")}
    data = S1KDataModule(str(folder.parent / "sums.jsonl"), tokenizer=module.tokenizer, **options)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto", "max_steps": steps},
        **{"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "use_distributed_sampler": False},
        **{"limit_val_batches": 1, "val_check_interval": 20, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        callbacks=[
            *callbacks,
            ModelCheckpoint(folder, filename="best-{step}", monitor="val/nll", enable_version_counter=False),
            Autosave(folder, every_n_train_steps=1, save_top_k=0, save_last=True),
        ],
        plugins=[SafeCheckpointIO()],
        logger=TensorBoardLogger(folder.parent, name=f"{folder.name}.logs") if devices == 1 else False,
    )
    trainer.fit(module, data, ckpt_path="last", weights_only=True)


def attempt(work: Callable[[], None], folder: Path) -> int:
    """Fork a process that does `work`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """The exit status of a process, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Wait(L.Callback):
    """Do a few steps, then wait for the kill."""

    def on_train_start(self, trainer, pl_module):
        self.last = trainer.global_step + FEW

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        while trainer.global_step == self.last:
            signal.pause()


def killed_at_change(folder: Path, watched: Path, number: int, is_one: Callable[[str], bool], kill: Callable) -> None:
    """Train, and call `kill` before the n-th such change of the files in `watched`."""
    left = number

    def count(what: str) -> None:
        nonlocal left
        if is_one(what):
            if left == 0:
                kill()
            left -= 1

    with Watch(watched, count):
        train(folder)


def killed_in_save(folder: Path, save: int, size: int) -> None:
    """Train until the n-th save has written so many bytes: the kernel ends a process at its limit of a file's size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    killed_at_change(
        folder,
        folder,
        save,
        lambda what: what.startswith("open last.ckpt.") and what.endswith(".partial"),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def kill(moment: str, folder: Path, chance: random.Random) -> int:
    """Train up to such a moment; returns how it ended."""
    if moment == "before a change":
        number, die = chance.randrange(60), lambda: os.kill(os.getpid(), signal.SIGKILL)
        return end(attempt(lambda: killed_at_change(folder, folder.parent, number, lambda what: True, die), folder))
    if moment == "in a save":
        save, size = chance.randrange(FEW), chance.randrange(20_000)
        return end(attempt(lambda: killed_in_save(folder, save, size), folder))
    pid = attempt(lambda: train(folder, callbacks=(Wait(),)), folder)
    time.sleep(chance.uniform(0, 0.6))
    os.kill(pid, signal.SIGKILL)
    return end(pid)


def run(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    whole, killed = (folder / name / "checkpoints" for name in ("whole", "killed"))
    for checkpoints in (whole, killed):
        checkpoints.parent.mkdir(parents=True)
        write_jsonl(checkpoints.parent / "sums.jsonl", addition_rows(40))
    alone = attempt(lambda: train(whole), whole)
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        status = kill(moment, killed, chance)
        left = sorted(path.name for path in killed.glob("*.partial"))
        last = killed / "last.ckpt"
        saved = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        print(json.dumps({"moment": moment, "exit": status, "left": left, "saved": saved}), flush=True)
    print(json.dumps({"whole": end(alone), "killed": end(attempt(lambda: train(killed), killed))}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
