"""`predict` on one process and on two, killed and resumed: always the same file."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from material import write_jsonl
from meeting import MeetingPoint

from dream_lightning.cli import run

ROOT = Path(__file__).parents[1]
COUNT = 120


def arguments(folder: Path, source: Path, *more: str) -> list[str]:
    # A usual random model has near ties, which the rounding of another batch shape decides. This one has none, fills
    # positions in random order, and gets prompts of one length, so that only last batches differ in shape.
    sizes = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2"
    return [
        *("predict", "--config=configs/tiny.yaml", f"--data.predict_source={source}", "--data.batch_size=4"),
        f"--model.new_model={{{sizes}, initializer_range: 1.0}}",
        "--model.sampling={max_new_tokens: 30, steps: 15, alg: origin, temperature: 0.7, forbid_mask: true}",
        f"--trainer.logger.init_args.save_dir={folder}",
        *more,
    ]


def on_two(meeting: MeetingPoint, *options) -> subprocess.Popen:
    command = arguments(*options, "--trainer.devices=2", "--trainer.strategy=ddp")
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-m", "dream_lightning", *command],
        cwd=ROOT,
        env=os.environ | paths | meeting.environment,
        stdout=subprocess.DEVNULL,
        stderr=(options[0].parent / "stderr").open("a"),
        start_new_session=True,  # so that both can be killed at once
    )


def answers(folder: Path) -> list[dict]:
    lines = (folder / "tiny" / "predictions.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def test_two_ranks_killed_and_resumed_on_one_and_on_two_write_the_file_of_one(tmp_path, monkeypatch):
    questions = [{"question": f"{n:03} + {7 * n % 1000:03} = ?"} for n in range(COUNT)]
    source = write_jsonl(tmp_path / "questions.jsonl", questions)

    folder = tmp_path / "killed" / "tiny"
    kill = f"{{class_path: self_kill.KillAllInPrediction, init_args: {{batches: 4, folder: {folder}}}}}"
    points = MeetingPoint(), MeetingPoint()
    killed = on_two(points[0], tmp_path / "killed", source, f"--trainer.callbacks+={kill}")
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    answered = [part.read_bytes().count(b"\n") for part in folder.glob("*.rank-*.jsonl")]
    assert len(answered) == 2 and all(answered) and not (folder / "predictions.jsonl").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed on one")

    resumed = on_two(points[1], tmp_path / "killed", source)
    monkeypatch.chdir(ROOT)
    run(arguments(tmp_path / "whole", source))
    run(arguments(tmp_path / "resumed on one", source))
    assert resumed.wait() == 0, (tmp_path / "stderr").read_text()

    whole = answers(tmp_path / "whole")
    assert [line["prompt"] for line in whole] == [row["question"] for row in questions]
    assert len({line["prediction"] for line in whole}) > COUNT / 2
    for name in ("killed", "resumed on one"):
        assert answers(tmp_path / name) == whole
        names = sorted(file.name for file in (tmp_path / name / "tiny").iterdir() if file.is_file())
        assert names == ["predictions.jsonl", "predictions.jsonl.settings.json"]


def test_countdown_problems_are_asked_in_words_and_graded(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "problems.jsonl", [{"input": "30,100,93", "output": "23"}] * 2)
    monkeypatch.chdir(ROOT)
    run(arguments(tmp_path, source, "--data.task=countdown"))
    for line in answers(tmp_path):
        assert "30, 100, 93" in line["prompt"] and "to make 23" in line["prompt"]
        assert line["correct"] is False, "a random model does not solve it"
