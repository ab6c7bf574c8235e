"""The four stages on bundled data, run in a few steps."""

import importlib
from pathlib import Path

import pytest
import torch

from dream_lightning.experiments.runs import find_runs
from dream_lightning.model import DreamModel

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.filterwarnings("ignore")
def test_each_stage_starts_from_the_model_of_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("sys.argv", ["dream-lightning"])
    stages = importlib.import_module("stages")
    few = {"trainer.max_steps": 4, "trainer.val_check_interval": 4, "trainer.log_every_n_steps": 1}
    few |= {"trainer.enable_progress_bar": "false", "data.cache_dir": tmp_path / "cache"}
    arguments = [f"--out={tmp_path}", *(f"--{name}={value}" for name, value in few.items())]
    stages.main(arguments)
    before = None
    for stage in stages.STAGES:
        saved = torch.load(tmp_path / stage / "checkpoints/last.ckpt", weights_only=True)
        settings, (run,) = saved["settings"], find_runs(tmp_path / stage)
        assert settings["model.pretrained"] == before and saved["global_step"] == 4
        before = str(tmp_path / stage / "model")
        trained = DreamModel.from_pretrained(before).state_dict()  # bit for bit, not rounded to bfloat16
        assert all(torch.equal(tensor, saved["state_dict"][f"model.{name}"]) for name, tensor in trained.items())
        assert sorted(run.curves["val/nll"]) == [3] and ("val/accuracy" in run.curves) == (stage != "pretrain")
        assert settings["data.max_length"] == (512 if stage in ("pretrain", "sft") else 1024)
        assert bool(settings["data.extra_weight"]) == (stage == "distill")
    printed = capsys.readouterr().out
    assert printed.count("val/nll") == 4
    stages.main(arguments)  # all is complete
    assert "dream-lightning fit" not in capsys.readouterr().out
