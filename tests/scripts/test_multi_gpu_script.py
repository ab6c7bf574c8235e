"""The check of several GPUs, without GPUs."""

import importlib
import os
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    yield importlib.import_module("check_multi_gpu")
    sys.modules.pop("check_multi_gpu", None)


def test_told_to_stop_it_leaves_no_training_behind(check, tmp_path, monkeypatch):
    """Which is in a session of its own, and would hold the GPUs."""
    (tmp_path / "fit.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "fit.py"))
    log, sleep = tmp_path / "run.txt", time.sleep

    def told_to_stop(seconds):
        if log.read_text():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(check.time, "sleep", told_to_stop)
    with pytest.raises(KeyboardInterrupt):
        check.fit(tmp_path / "run", [], until=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize("resume", [True, False])
def test_without_resume_nothing_is_saved(check, tmp_path, monkeypatch, capsys, resume):
    runs = []

    def fit(probe, arguments, *, until):
        runs.append(arguments)
        start = {"seconds": 0.0, "step": 5 * ("--ckpt_path=last" in arguments), "gpu_gib": 1.0, "host_gib": 1.0}
        lines = [start] + [start | {"step": i, "seconds": i, "tokens": 9, "loss": 1.0} for i in range(start["step"], 9)]
        return {"lines": {line["step"]: line for line in lines}, "start": start}

    monkeypatch.setattr(check, "fit", fit)
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)  # pytest keeps its own handler
    check.main("configs/fsdp_full.yaml", "", str(tmp_path), resume=resume, alone=False)
    assert len(runs) == 1 + resume
    assert ("--autosave.every_n_train_steps=5" in runs[0]) == resume
    assert ("saving after step 5" in capsys.readouterr().out) == resume
