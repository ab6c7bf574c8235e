"""What Windows refuses, emulated on Linux: to remove or rename what is open or mapped; `spawn` instead of `fork`.

The package is imported without the modules of POSIX in test_startup.py; grading without timers is in test_math.py.
"""

import multiprocessing
import os
import sys
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
from material import addition_rows, tiny_data, write_jsonl

from dream_lightning import atomic, cli
from dream_lightning.data import document_cache
from dream_lightning.experiments import sweep
from dream_lightning.training import preemption

SIZES = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
RESERVED = set('<>:"|?*\\')


def in_use(path) -> list[str]:
    """Files of this process at a path that are open or mapped."""
    maps = (line.split(None, 5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines())
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    used = {*maps, *(os.readlink(link) for link in links if os.path.lexists(link))}
    path = os.path.realpath(path)
    return [file for file in used if file == path or file.startswith(f"{path}/")]


@pytest.fixture
def windows(tmp_path, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("emulates Windows with /proc")

    def guarded(work):
        def checked(*paths, **options):
            for path in map(os.fspath, paths):
                if in_use(path) or RESERVED & set(os.path.basename(path)):
                    raise PermissionError(13, f"Windows refuses it, in use: {in_use(path)}", path)
            return work(*paths, **options)

        return checked

    for name in ("unlink", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    for name in ("fork", "getuid", "sched_getaffinity", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(preemption, "_SLURM", ())
    for module in (atomic, sys.modules[sweep.__module__]):
        monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dream-lightning"])
    return write_jsonl(tmp_path / "rows.jsonl", addition_rows(20))


def fit(*more):
    folders = [f"--{saver}.dirpath=logs/tiny/checkpoints" for saver in ("checkpoint", "autosave")]
    options = {"data.source": "rows.jsonl", "data.validation_source": "null", "data.eos_fill_to": "null"}
    options |= {"data.max_length": 256, "data.batch_size": 4, "data.cache_dir": "cache", "model.new_model": SIZES}
    options |= {"trainer.val_check_interval": 1, "trainer.logger.init_args.save_dir": "logs"}
    cli.run(["fit", "--config=tiny", *folders, *(f"--{name}={value}" for name, value in options.items()), *more])


def test_fit_saves_and_predict_answers(windows):
    fit("--trainer.max_steps=2")
    assert {path.suffix for path in Path("logs/tiny/checkpoints").iterdir()} == {".ckpt"}  # no lock, nothing partial
    cli.run(["predict", "--ckpt_path=logs/tiny", "--data.predict_source=rows.jsonl"])
    assert len(Path("logs/tiny/predictions.jsonl").read_text().splitlines()) == 20
    assert not list(Path("logs/tiny").glob("*.rank-*"))


def test_what_goes_to_a_process_pickles(windows, tmp_path):
    data = tiny_data(windows, tmp_path)
    data.setup("fit")
    loader = data.train_dataloader()
    encoder = partial(document_cache._encode_chunk, tokenizer=data.tokenizer, encoding=data.encoding, examples=[])
    parts = (loader.dataset, loader.collate_fn, loader.worker_init_fn, encoder)
    assert all(len(ForkingPickler.dumps(part)) for part in parts)


@pytest.mark.slow
def test_fit_with_spawned_processes(windows, monkeypatch):
    monkeypatch.setattr(document_cache, "_PARALLEL_FROM", 1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        fit("--trainer.max_steps=1", "--data.num_workers=1")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert Path("logs/tiny/checkpoints/last.ckpt").exists()


def test_a_sweep_starts_runs_without_inheriting_files(windows, monkeypatch, tmp_path):
    started = {}
    monkeypatch.setattr("subprocess.run", lambda _, **options: started.update(options) or SimpleNamespace(returncode=0))
    assert sys.modules[sweep.__module__].start(["fit"], tmp_path / "output.txt", 3) == 0 and "pass_fds" not in started
