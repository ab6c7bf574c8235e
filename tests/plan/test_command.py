"""`python -m dream_lightning plan`, and what users see of errors."""

import errno
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dream_lightning.cli import main, readable_errors
from dream_lightning.data import S1KDataModule
from dream_lightning.module import DreamModule
from dream_lightning.plan import environment
from dream_lightning.plan.environment import Gpu

ROOT = Path(__file__).parents[2]
ONE_STEP = [
    "--config=configs/tiny.yaml",
    "--trainer.callbacks=[]",
    "--trainer.logger=false",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--data.first_n=64",
]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Arguments → what was printed on both channels; the process must end well, or with `status`."""

    folders = [f"--trainer.default_root_dir={tmp_path}"]
    folders += [f"--{kind}.dirpath={tmp_path / 'checkpoints'}" for kind in ("checkpoint", "autosave")]

    def run(*arguments, status=0):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["dream_lightning", *map(str, arguments), *folders])
        try:
            main()
        except SystemExit as end:
            assert (end.code or 0) == status
        else:
            assert status == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def dream_7b(shared, tmp_path):
    """A folder with the official config.json and nothing else."""
    shutil.copy(shared("data/dream-v0-instruct-7b") / "config.json", tmp_path)
    return tmp_path


def config_of(folder, **sections):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_plan_of_the_qlora_config(command, dream_7b):
    out, _ = command(
        *("plan", "--config=configs/single_gpu_qlora.yaml", "--model.pretrained", dream_7b, "--gpu_memory_gib=24"),
    )
    for words in ("5,046,272 train (0.0662 %)", "1 × 8,192 tokens", "weights         5.18 GiB", "fits a card of 24.0"):
        assert words in out
    assert f"torch {version('torch')}" in out and "attention:" in out and "4-bit:" in out


def test_what_to_change_where_it_does_not_fit(command, dream_7b):
    out, _ = command(
        *("plan", "--config=configs/fsdp_full.yaml", "--trainer.strategy=auto", "--trainer.devices=1"),
        *("--model.pretrained", dream_7b, "--gpu_memory_gib=80"),
    )
    assert "does NOT fit" in out
    assert out.index("max_length=4096") < out.index("single_gpu_qlora") < out.index("fsdp_full.yaml on 2 GPUs")


def test_rows_and_their_complements_are_both_in_memory(command, dream_7b):
    own = config_of(dream_7b, model={"pretrained": str(dream_7b)}, data={"source": "nowhere", "batch_size": 3})
    for given, rows in (("false", 3), ("true", 6)):
        out, _ = command("plan", "--config", own, f"--model.complementary_masks={given}")
        assert f"\n{rows} × 8,192 tokens" in out


@pytest.mark.parametrize("strategy", ["fsdp2", {"class_path": "dream_lightning.strategy.FSDP2Strategy"}])
def test_a_plan_for_gpus_that_are_not_here(command, dream_7b, monkeypatch, strategy):
    """No Trainer, module or tokenizer is built: the configuration would not go through here."""
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda _: pytest.fail("was built"))
    trainer = {"accelerator": "gpu", "devices": 4, "num_nodes": 2, "strategy": strategy, "precision": "bf16-mixed"}
    own = config_of(dream_7b, trainer=trainer, model={"pretrained": str(dream_7b)}, data={"source": "nowhere"})
    out, _ = command("plan", "--config", own, "--gpu_memory_gib=80")
    assert "sharded over 8 GPUs" in out and "It fits" in out


def test_memory_to_spare_goes_into_fewer_recomputed_layers(command, dream_7b):
    own = ("--config=configs/single_gpu_qlora.yaml", "--model.pretrained", dream_7b)
    out, _ = command("plan", *own, "--gpu_memory_gib=24")
    assert out.splitlines()[-2] == "It fits a card of 24.0 GiB."
    assert out.splitlines()[-1].startswith("So it does with --model.gradient_checkpointing=11, which is faster: ")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("single_gpu_full", ["--config=configs/model/float8.yaml"], "do not train: set model.lora too"),
        ("single_gpu_lora", ["--model.float8_products=true"], "float8_products is for weights that train"),
        ("fsdp_lora", ["--model.quantize=nf4"], "quantised weights are not divided: set trainer.strategy=ddp"),
    ],
)
def test_what_fit_would_refuse_has_no_plan(command, dream_7b, config, options, message):
    _, err = command("plan", f"--config=configs/{config}.yaml", *options, "--model.pretrained", dream_7b, status=1)
    assert message in err.splitlines()[-2]


def test_divided_weights_need_a_number_of_gpus(command, dream_7b, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    of_two = ("plan", "--config=configs/fsdp_full.yaml", "--model.pretrained", dream_7b)
    _, err = command(*of_two, status=1)
    assert "trainer.devices is auto, and no GPU is visible here" in err
    assert "sharded over 2 GPUs" in command(*of_two, "--trainer.devices=2")[0]


@pytest.mark.parametrize("quantize", ["nf4", "nf4_float8"])
def test_without_bitsandbytes(command, dream_7b, monkeypatch, quantize):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(environment, "version", lambda name: _absent() if name == "bitsandbytes" else "1")
    data = {"source": "nowhere"}
    own = config_of(dream_7b, model={"pretrained": str(dream_7b), "quantize": quantize, "lora": {"rank": 8}}, data=data)
    out, _ = command("plan", "--config", own)
    assert "missing: pip install bitsandbytes" in out and "(nf4)" in out and "No GPU is visible" in out


def _absent():
    raise environment.PackageNotFoundError("bitsandbytes")


def test_a_hub_id_that_cannot_be_reached(command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, err = command("plan", "--model.pretrained=no/such-model", "--data.source=x", status=1)
    assert err.splitlines()[-2].startswith("error: 'no/such-model' is neither a folder here nor a hub id")


def test_out_of_memory_says_what_to_change(command, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(DreamModule, "training_step", too_much)
    monkeypatch.setattr("dream_lightning.plan.report.gpus", lambda: [Gpu("toy", 1.1, 0.1)])
    _, err = command("fit", *ONE_STEP, status=1)
    assert "error: the GPU's memory did not suffice (CUDA out of memory. Tried to allocate 1.00 GiB.)" in err
    assert "--data.batch_size=1 --trainer.accumulate_grad_batches=32" in err and "Traceback" not in err
    monkeypatch.setenv("DREAM_TRACEBACK", "1")
    with pytest.raises(ValueError) as error:
        command("fit", *ONE_STEP)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator=gpu"], "trainer.accelerator is gpu and torch sees no GPU"),
        (["--trainer.strategy=fsdp"], "requires a GPU accelerator"),
        (["--model.t_min=2"], "t_min is 2.0, wanted a probability"),
        (["--model.pretrained=x"], "wanted exactly one of them"),
        (["--data.source=no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--model.quantize=nf4"], "do not train: set model.lora too"),
        (["--model.optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["--model.lora.rank=0"], "rank is 0, it must be an integer of at least 1"),  # which jsonargparse wraps
    ],
)
def test_errors_for_users_are_one_message(command, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if torch.cuda.is_available():
        pytest.skip("two of these are about a machine without a GPU")
    _, err = command("fit", *ONE_STEP, *options, status=1)
    assert "Traceback" not in err
    assert "error: " in err.splitlines()[-2] and message in err.splitlines()[-2]


def test_a_package_that_an_option_needs_is_named(command, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", "")
    _, err = command("fit", *ONE_STEP, "--trainer.logger=WandbLogger", status=1)
    assert "Traceback" not in err and "error: Problem with given class_path" in err and len(err.splitlines()) < 6


def test_other_errors_keep_their_traceback():
    def unexpected():
        int("x")

    for error in (unexpected, lambda: torch.zeros(2).reshape(3), lambda: {}["key"]):
        with pytest.raises((ValueError, RuntimeError, KeyError)), readable_errors():
            error()
    with pytest.raises(SystemExit) as end, readable_errors():
        raise MisconfigurationException("no")
    assert end.value.code == 1
    with pytest.raises(FileNotFoundError), readable_errors():
        Path("no such file").read_text()


def test_a_full_disk_is_one_message(command, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "documents")

    monkeypatch.setattr(S1KDataModule, "tokenized", full)
    _, err = command("fit", *ONE_STEP, status=1)
    assert "Traceback" not in err
    assert "No space left on device: 'documents': free some space, or choose other folders" in err


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 5), "memory-efficient"), ((8, 0), "varlen flash"), ((9, 0), "cuDNN")]
)
def test_which_attention_is_said(monkeypatch, capability, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert environment._attention(True).startswith(kernel)
