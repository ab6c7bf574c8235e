"""Killed without warning again and again, while training and while saving: the same end as a run that never was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from meeting import MeetingPoint
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

HERE = Path(__file__).parent
KILLS = 20


def start(folder: Path, kills: int) -> subprocess.Popen:
    return python(HERE / "kill_runs.py", folder, str(kills), "0")


def python(script: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)} | environment
    command = [sys.executable, script, folder / "checkpoints", *arguments]
    folder.mkdir()
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(folder: Path) -> dict[tuple[str, int], set[str]]:
    """Scalar and step → its values, from the logs of all attempts."""
    values = {}
    for file in folder.glob("checkpoints.logs/*/events.out.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag != "hp_metric":
                    values.setdefault((value.tag, event.step), set()).add(
                        str(make_ndarray(value.tensor))
                    )  # text: NaN equals NaN
    return values


def test_twenty_kills_change_nothing(tmp_path):
    runs = {name: start(tmp_path / name, kills) for name, kills in (("whole", 0), ("killed", KILLS))}
    lines = {}
    for name, run in runs.items():
        output, errors = run.communicate(timeout=280)
        log = tmp_path / name / "checkpoints.log"
        assert run.returncode == 0, errors
        lines[name] = [json.loads(line) for line in output.splitlines()]
        assert lines[name][-1] == {"exit": 0}, log.read_text()[-3000:]
    kills = lines["killed"][:-1]
    ends = {"any time": -signal.SIGKILL, "before a change": -signal.SIGKILL, "in a save": -signal.SIGXFSZ}
    assert len(kills) == KILLS and all(kill["exit"] == ends[kill["moment"]] for kill in kills)
    assert all("last.ckpt.partial" in kill["left"] for kill in kills if kill["moment"] == "in a save")

    left = {name: sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in runs}
    assert left["killed"] == left["whole"] == ["best-step=120.ckpt", "last.ckpt"]  # and nothing half written
    for file in left["whole"]:
        whole, killed = (torch.load(tmp_path / name / "checkpoints" / file, weights_only=True) for name in runs)
        assert whole["global_step"] == 120
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert same(whole[part], killed[part]), (file, part)
    whole, killed = (logged(tmp_path / name) for name in runs)
    assert len([step for name, step in whole if name == "train/loss"]) == 120
    assert killed == whole and all(len(values) == 1 for values in whole.values())


def test_all_ranks_stop_after_the_same_step(tmp_path):
    """One of two is told to stop, in the middle of whatever the other does."""
    points = MeetingPoint(), MeetingPoint()
    ports = [point.environment["MASTER_PORT"] for point in points]
    run = python(HERE / "stop_ranks.py", tmp_path / "ranks", *ports, **points[0].environment)
    output, errors = run.communicate(timeout=280)
    log = (tmp_path / "ranks" / "checkpoints.log").read_text()
    assert run.returncode == 0, errors
    first, second = map(json.loads, output.splitlines())
    assert first == {"stopped": [143, 143]} and second == {"whole": [0, 0]}, log[-3000:]
    assert log.count("SIGTERM: stopping after this optimiser step") == 1
    assert log.count("Stopped by SIGTERM after step") == 1
    saved = torch.load(tmp_path / "ranks" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 40
