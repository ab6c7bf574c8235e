"""`predict` on one process and on two, killed and resumed: always the same file."""

import json
import shutil
import signal
from pathlib import Path

from material import write_jsonl
from meeting import CommandOfRanks

from dream_lightning.cli import run

COUNT = 50


def arguments(folder: Path, source: Path, *more: str) -> list[str]:
    # A usual random model has near ties, which the rounding of another batch shape decides. This one has none, fills
    # positions in random order, and gets prompts of one length, so that only last batches differ in shape.
    sizes = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2"
    return [
        *("predict", "--config=tiny", f"--data.predict_source={source}", "--data.batch_size=4"),
        f"--model.new_model={{{sizes}, initializer_range: 1.0}}",
        "--model.sampling={max_new_tokens: 30, steps: 15, alg: origin, temperature: 0.7, forbid_mask: true}",
        f"--trainer.logger.init_args.save_dir={folder}",
        *more,
    ]


def on_two(*options) -> CommandOfRanks:
    return CommandOfRanks(*arguments(*options, "--trainer.devices=2", "--trainer.strategy=ddp"))


def answers(folder: Path) -> list[dict]:
    lines = (folder / "tiny" / "predictions.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def test_two_ranks_killed_and_resumed_on_one_and_on_two_write_the_file_of_one(tmp_path, monkeypatch):
    questions = [{"question": f"{n:03} + {7 * n % 1000:03} = ?"} for n in range(COUNT)]
    source = write_jsonl(tmp_path / "questions.jsonl", questions)

    folder = tmp_path / "killed" / "tiny"
    kill = f"{{class_path: self_kill.KillAllInPrediction, init_args: {{batches: 3, folder: {folder}}}}}"
    on_two(tmp_path / "killed", source, f"--trainer.callbacks+={kill}").end(-signal.SIGKILL)
    answered = [part.read_bytes().count(b"\n") for part in folder.glob("*.rank-*.jsonl")]
    assert len(answered) == 2 and all(answered) and not (folder / "predictions.jsonl").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed on one")

    resumed = on_two(tmp_path / "killed", source)
    monkeypatch.setattr("sys.argv", ["dream-lightning"])  # the command is written there
    run(arguments(tmp_path / "whole", source))
    run(arguments(tmp_path / "resumed on one", source))
    resumed.end()

    whole = answers(tmp_path / "whole")
    assert [line["prompt"] for line in whole] == [row["question"] for row in questions]
    assert len({line["prediction"] for line in whole}) > COUNT / 2
    for name in ("killed", "resumed on one"):
        assert answers(tmp_path / name) == whole
        names = sorted(file.name for file in (tmp_path / name / "tiny").iterdir() if file.is_file())
        assert names == ["predictions.jsonl", "predictions.jsonl.settings.json"]


def test_countdown_problems_are_asked_in_words_and_graded(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "problems.jsonl", [{"input": "30,100,93", "output": "23"}] * 2)
    monkeypatch.setattr("sys.argv", ["dream-lightning"])
    run(arguments(tmp_path, source, "--data.task=countdown"))
    for line in answers(tmp_path):
        assert "30, 100, 93" in line["prompt"] and "to make 23" in line["prompt"]
        assert line["correct"] is False, "a random model does not solve it"
