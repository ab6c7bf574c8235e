"""The command line as users type it."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from material import addition_rows, write_jsonl
from meeting import MeetingPoint

from dream_lightning import DreamConfig, DreamModel, S1KDataModule, load_tokenizer
from dream_lightning.cli import DreamCLI, main
from dream_lightning.training.sharded_checkpoint import read_rest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = [
    "--config=configs/tiny.yaml",
    "--model.new_model={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 256}",
    "--trainer.callbacks=[]",
    "--data.validation_questions=2",
    "--data.batch_size=4",
    "--trainer.limit_val_batches=1",
]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dream_lightning", *arguments])
    main()


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def one_parser():
    """The parsers of all commands, built once: that takes five times as long as parsing."""
    kept = {}

    def setup_parser(cli, *arguments):
        if not kept:
            LightningCLI.setup_parser(cli, *arguments)
            kept.update(vars(cli))
        vars(cli).update(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamCLI, "setup_parser", setup_parser, raising=False)
        yield


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_every_shipped_config_is_understood(at_root, one_parser, monkeypatch, capsys, config, subcommand):
    """Overlays that leave out a required option are completed by a full config, as README says."""
    whole = [] if {"model", "data"} <= yaml.safe_load(config.read_text()).keys() else ["--config=configs/tiny.yaml"]
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, subcommand, *whole, f"--config={config}", "--print_config")
    assert exit_.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {"trainer", "model", "data", "checkpoint", "autosave"} <= printed.keys()
    assert printed.get("return_predictions") == (False if subcommand == "predict" else None)
    for section, options in yaml.safe_load(config.read_text()).items():
        if isinstance(options, dict):
            assert options.keys() <= printed[section].keys()


@pytest.mark.parametrize("overlay", [c for c in CONFIGS if c.parent.name != "configs"], ids=lambda path: path.stem)
def test_every_overlay_goes_with_packed_rows(at_root, monkeypatch, capsys, overlay):
    """The configs for GPUs pack, and some options exclude that."""
    with pytest.raises(SystemExit):
        command(monkeypatch, "fit", "--config=configs/single_gpu_lora.yaml", f"--config={overlay}", "--print_config")
    options = yaml.safe_load(capsys.readouterr().out)["data"]
    S1KDataModule(**options, tokenizer=load_tokenizer("bytes"))


def test_help_documents_every_option(at_root, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "fit", "--help")
    text = capsys.readouterr().out
    for option in (
        "--model.weighting",
        "--data.overflow",
        "--model.sampling",
        "--checkpoint.monitor",
        "--trainer.logger",
    ):
        assert option in text
    assert "loss weight of a masked token" in text


def test_an_unknown_option_is_an_error(at_root, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "fit", "--config=configs/tiny.yaml", "--data.max_lenght=3")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "--data.max_lenght: did you mean --data.max_length?" in said
    assert len(said.splitlines()) <= 4, "what is wrong stands behind screens of usage"


def test_where_predict_writes_can_be_said_on_the_command_line(at_root, monkeypatch, capsys):
    """An option of `trainer.callbacks` is the last one's."""
    with pytest.raises(SystemExit):
        command(monkeypatch, "predict", "--config=configs/tiny.yaml", "--trainer.callbacks.path=x", "--print_config")
    writer = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][-1]
    assert writer["class_path"].endswith("PredictionWriter") and writer["init_args"]["path"] == "x"


def test_a_saved_config_can_be_used_again(at_root, monkeypatch, capsys, tmp_path):
    """With the default optimiser too, which the shipped configs all replace."""
    without = yaml.safe_load(Path("configs/tiny.yaml").read_text())
    del without["model"]["optimizer"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(without))
    with pytest.raises(SystemExit):
        command(monkeypatch, "fit", f"--config={file}", "--print_config")
    file.write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "fit", f"--config={file}", "--print_config")
    assert exit_.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"] == "dream_lightning.training.optimizer.adamw"


@pytest.mark.parametrize(("name", "said"), [("no.ckpt", "no.ckpt does not exist"), ("last", "no last.ckpt in")])
def test_a_checkpoint_that_is_not_there_is_one_message(at_root, monkeypatch, capsys, tmp_path, name, said):
    """Lightning itself goes on without `last`, and would report the scores of untrained weights."""
    monkeypatch.setenv("DREAM_TRACEBACK", "0")
    options = ("trainer.logger=false", "trainer.enable_progress_bar=false", f"trainer.default_root_dir={tmp_path}")
    folders = (f"checkpoint.dirpath={tmp_path}", f"autosave.dirpath={tmp_path}")
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "validate", *SMALL, *(f"--{o}" for o in options + folders), f"--ckpt_path={name}")
    assert exit_.value.code == 1
    shown = capsys.readouterr()
    assert said in shown.err and "val/nll" not in shown.out


def test_a_file_that_is_no_checkpoint_is_one_message(at_root, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DREAM_TRACEBACK", "0")
    (tmp_path / "a.ckpt").write_text("hello")
    options = ("trainer.logger=false", "trainer.enable_progress_bar=false", f"trainer.default_root_dir={tmp_path}")
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "validate", *SMALL, *(f"--{o}" for o in options), f"--ckpt_path={tmp_path / 'a.ckpt'}")
    assert exit_.value.code == 1
    assert "a.ckpt is not whole, or no checkpoint: take an earlier one" in capsys.readouterr().err


def test_validate_prints_every_score_once(at_root, monkeypatch, capsys, tmp_path):
    trainer = ("logger=false", "enable_progress_bar=false", f"default_root_dir={tmp_path}")
    command(monkeypatch, "validate", *SMALL, *(f"--trainer.{option}" for option in trainer))
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in ("val/nll", "val/accuracy", "val/unparsed")] == [1, 1, 1]
    assert "DataLoader" not in shown


def losses(folder: Path) -> dict[int, str]:
    """step → loss as it was written, from every metrics file in the folder."""
    found = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open() as lines:
            found |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(lines) if row["train/loss"]}
    return found


def fit(folder: Path, *arguments: str) -> list[str]:
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: %s, flush_logs_every_n_steps: 1}}"
    return [
        *("fit", *SMALL),
        f"--trainer.logger={logger % folder}",
        f"--checkpoint.dirpath={folder / 'checkpoints'}",
        f"--autosave.dirpath={folder / 'checkpoints'}",
        "--autosave.every_n_train_steps=3",
        "--trainer.max_steps=60",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=20",
        "--trainer.enable_progress_bar=false",
        *arguments,
    ]


def test_kill_and_resume_give_the_same_losses(at_root, monkeypatch, tmp_path):
    """Killed without warning in the middle of an epoch, then started again with `--ckpt_path last`."""
    kill = "--trainer.callbacks+={class_path: self_kill.KillAtStep, init_args: {step: 26}}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = [sys.executable, "-m", "dream_lightning", *fit(tmp_path / "killed", kill)]
    killed = subprocess.run(process, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(losses(tmp_path / "killed")) == 25

    command(monkeypatch, *fit(tmp_path / "whole"))
    command(monkeypatch, *fit(tmp_path / "killed", "--ckpt_path=last"))
    expected = losses(tmp_path / "whole")
    assert len(expected) == 60 and losses(tmp_path / "killed") == expected


@pytest.mark.parametrize("config", ["fsdp_lora", "ddp_qlora"])
def test_a_config_for_several_gpus_runs_here(tmp_path, config):
    """As it stands but for the sizes: two processes over gloo; test_distributed.py has what they compute."""
    if config == "ddp_qlora":
        pytest.importorskip("bitsandbytes")
    tokenizer = load_tokenizer("bytes")
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("mask", "pad", "bos", "eos")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    DreamModel(DreamConfig(vocab_size=320, num_key_value_heads=1, **sizes, **ids)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "sums.jsonl", addition_rows(40))
    command = [
        *(sys.executable, "-m", "dream_lightning", "fit", f"--config=configs/{config}.yaml"),
        f"--model.pretrained={tmp_path / 'base'}",
        f"--data.source={tmp_path / 'sums.jsonl'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.schema=auto",
        "--data.max_length=256",
        "--data.num_workers=0",
        "--data.validation_questions=3",
        "--model.sampling={max_new_tokens: 8, steps: 4, forbid_mask: true}",
        "--model.compile_layers=false",
        *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.num_sanity_val_steps=0"),
        "--trainer.accumulate_grad_batches=1",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        *(f"--{saver}.dirpath={tmp_path / 'checkpoints'}" for saver in ("checkpoint", "autosave")),
        "--autosave.every_n_train_steps=1",
    ]

    def run(*options: str) -> str:
        meeting = MeetingPoint()  # each run its own
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | meeting.environment
        done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    run("--trainer.max_steps=1")
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert (read_rest(last) if last.is_dir() else torch.load(last, weights_only=True))["global_step"] == 1
    if config == "fsdp_lora":  # whose checkpoint is restored late
        said = run("--trainer.max_steps=2", "--ckpt_path=last")
        assert "Restored all states" in said and "begins anew" not in said
