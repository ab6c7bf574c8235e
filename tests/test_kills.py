"""Killed without warning again and again, while training and while saving: the same end as a run that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
KILLS = 20


def start(folder: Path, kills: int) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    arguments = [sys.executable, HERE / "kill_runs.py", folder / "checkpoints", str(kills), "0"]
    folder.mkdir()
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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
    assert len(kills) == KILLS and all(kill["killed"] for kill in kills)
    # The file half written that a kill left shows that it came while saving.
    in_saves = [kill for kill in kills if kill["left"]]
    assert len(in_saves) >= 5 and len(kills) - len(in_saves) >= 5

    left = {name: sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in runs}
    assert left["killed"] == left["whole"] == ["best-step=200.ckpt", "last.ckpt"]  # and nothing half written
    for file in left["whole"]:
        whole, killed = (torch.load(tmp_path / name / "checkpoints" / file, weights_only=True) for name in runs)
        assert whole["global_step"] == 200
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert same(whole[part], killed[part]), (file, part)
