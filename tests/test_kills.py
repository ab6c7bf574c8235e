"""Kills while training and while saving: the run ends with the same weights as one without kills."""

import json
import signal

import kill_runs
import torch
from material import logged
from meeting import MeetingPoint, Program

KILLS = 20


def test_twenty_kills_change_nothing(tmp_path):
    runs = ("whole", "killed")
    *kills, last = map(json.loads, Program(kill_runs.kills, tmp_path, KILLS, 0).end().splitlines())
    assert last == {"whole": 0, "killed": 0}, [(tmp_path / n / "checkpoints.log").read_text()[-3000:] for n in runs]
    ends = {"before a change": -signal.SIGKILL, "in a save": -signal.SIGXFSZ}
    assert len(kills) == KILLS and all(kill["exit"] == ends[kill["moment"]] for kill in kills)
    assert all(kill["left"] for kill in kills if kill["moment"] == "in a save")

    left = {name: sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in runs}
    assert left["killed"] == left["whole"] == ["best-step=120.ckpt", "last.ckpt"]  # and nothing incomplete
    for file in left["whole"]:
        whole, killed = (torch.load(tmp_path / name / "checkpoints" / file, weights_only=True) for name in runs)
        assert whole["global_step"] == 120
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            torch.testing.assert_close(whole[part], killed[part], rtol=0, atol=0)
    whole, killed = (logged(tmp_path / name) for name in runs)
    assert len([step for name, step in whole if name == "train/loss"]) == 120
    assert all(values == whole[key] and len(values) == 1 for key, values in killed.items())
    # A step is saved before it is logged, so a kill may lose the metrics of the step that the checkpoint is of.
    lost = whole.keys() - killed.keys()
    assert {step for _, step in lost} <= {kill["saved"] - 1 for kill in kills}
    assert not any(name.startswith("val/") for name, _ in lost)


def test_all_ranks_stop_after_the_same_step(tmp_path):
    """SIGTERM to one of two processes."""
    points = MeetingPoint(), MeetingPoint()
    ports = [point.environment["MASTER_PORT"] for point in points]
    folder = tmp_path / "checkpoints"
    output = Program(kill_runs.terminated, folder, *ports, **points[0].environment).end()
    log = (tmp_path / "checkpoints.log").read_text()
    assert json.loads(output) == [[143, 143], [0, 0]], log[-3000:]
    assert log.count("SIGTERM: stopping after this optimizer step") == 1
    assert log.count("Stopped by SIGTERM after step") == 1
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 40
