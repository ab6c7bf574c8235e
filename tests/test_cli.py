"""The program as users run it."""

import gc
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from material import addition_rows, save_tiny_folder, write_jsonl
from meeting import CommandOfRanks

from dream_lightning import S1KDataModule, cli, load_tokenizer
from dream_lightning.__main__ import main
from dream_lightning.cli import readable_errors, shipped_configs
from dream_lightning.commands import COMMANDS, SUMMARIES
from dream_lightning.errors import UserError
from dream_lightning.training.sharded_checkpoint import read_rest

pytestmark = pytest.mark.usefixtures("cached_parsers")
ROOT = Path(__file__).parents[1]
SMALL = [
    "--config=tiny",
    "--model.new_model={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 256}",
    "--trainer.callbacks=[]",
    "--data.validation_questions=2",
    "--data.batch_size=4",
    "--trainer.limit_val_batches=1",
]
SILENT = ("--trainer.logger=false", "--trainer.enable_progress_bar=false")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DREAM_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "tune_gc", lambda: None)


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("fit", …)` → what is printed, what is written to stderr, and the exit status."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dream-lightning", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        printed, said = capsys.readouterr()
        if isinstance(status, str):  # Python prints it
            said, status = status, 1
        return printed, said, status

    return run


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith("experiments/")])
@pytest.mark.parametrize("subcommand", ["fit", "predict"])
def test_every_shipped_config_parses_by_its_name(command, subcommand, name):
    options = yaml.safe_load(shipped_configs()[name].read_text())
    base = [] if {"model", "data"} <= options.keys() else ["--config", "single_gpu_lora"]  # an overlay
    printed, _, status = command(subcommand, *base, f"--config={name}", "--print_config")
    assert status == 0
    parsed = yaml.safe_load(printed)
    assert {"trainer", "model", "data", "checkpoint", "autosave"} <= parsed.keys()
    assert parsed.get("return_predictions") == (False if subcommand == "predict" else None)
    for section, values in options.items():
        assert values.keys() <= parsed[section].keys()
    if base:  # the configs for GPUs pack rows, which some options exclude
        S1KDataModule(**parsed["data"], tokenizer=load_tokenizer("bytes"))


def test_every_command_and_config_is_listed(command, tmp_path, monkeypatch):
    printed = command()[0]
    for name, summary in SUMMARIES.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", printed, flags=re.MULTILINE) and len(summary) < 65
    for name, (_, summary) in COMMANDS.items():
        assert cli.function_of(name).__doc__.splitlines()[0] == summary
    printed = command("configs")[0].splitlines()
    assert [line.split()[0] for line in printed] == list(shipped_configs())
    assert all(line.endswith((".", ").")) and len(line) < 140 for line in printed), "the first line is not a sentence"
    monkeypatch.chdir(tmp_path)
    command("configs", "copy", "model/float8")
    assert Path("float8.yaml").read_text() == shipped_configs()["model/float8"].read_text()
    assert "float8.yaml exists here" in command("configs", "copy", "model/float8")[1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["ft"], 1, "there is no command ft: did you mean fit?"),
        (["fit", "--config", "tinny"], 1, "config tinny is neither a file nor shipped: did you mean tiny?"),
        (["fit", "--config=tiny", "--data.max_lenght=3"], 2, "--data.max_lenght: did you mean --data.max_length?"),
        (["chat", "--modell=x"], 2, "--modell: did you mean --model?"),
        (
            ["show", "--source=bundled", "--tokenizer=bytes", "--row=0"],
            1,
            "row of bundled is 0, wanted at least 1 and at most 20000",
        ),
        (
            ["fit", "--config=tiny", "--model.lora={r: 4}"],
            2,
            "'r' is not accepted in --model.lora={r: 4}: did you mean rank",
        ),
        (["fit", "--model.lora={rank: 4, rank: 8}"], 1, "--model.lora has rank in line 1 and again in line 1"),
        (["fit", "--config=tiny", "--data.batch_size=1" + 30 * "0"], 1, "data.batch_size is 1000"),
        (["fit", "--config=tiny", "--model.optimizer.lr=.nan"], 1, "lr is nan, wanted a finite number"),
        (["fit", "--config=tiny", "--trainer.devices=-1"], 1, "none is used: set it to 1"),
        (["fit", "--config=tests"], 1, "config tests is a folder, wanted a YAML file"),
        (["fit", f"--config={'x' * 5000}"], 1, "File name too long"),
        (["plan", "--config=tiny", "--gpu_memory_gib=-1"], 1, "gpu_memory_gib is -1.0, wanted at least 0"),
        (["show", "--source=bundled", "--tokenizer=bytes", "--t=2"], 1, "t is 2.0, wanted at least 0 and at most 1"),
        (["show", "--source=bundled", "--tokenizer=bytes", "--seed=-1"], 1, "seed is -1, wanted at least 0"),
        (["chat", "--model=tests/models/sudoku4", "--device=tpux"], 1, "device is tpux (Expected one of cpu"),
        (["configs", "copy"], 1, "got configs copy, wanted nothing or: configs copy NAME"),
    ],
)
def test_a_mistake_is_one_short_message(command, arguments, status, message):
    _, said, got = command(*arguments)
    assert got == status and message in said
    assert "Traceback" not in said and len(said.splitlines()) <= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  cart_p: 0.2\n  cart_p: 0.3", "c.yaml has cart_p in line 2 and again in line 3: delete one"),
        ("model: {}\ndata: {}\nmodel: {}", "c.yaml has model in line 1 and again in line 3"),
        ("model: part.yaml", "part.yaml has seed in line 1 and again in line 2"),
        ("model: [1\ndata: }", "c.yaml is no YAML (while parsing a flow sequence in line 1, column 8"),
        ("a: " + "[" * 5000, "c.yaml is no YAML"),
        ("\0", "c.yaml is no YAML"),
        ("\x1b]52;c;aGk=\x07: 1", "c.yaml is no YAML"),
    ],
)
def test_a_config_with_a_repeated_key_or_no_yaml_is_named(command, tmp_path, text, message):
    (tmp_path / "part.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "c.yaml").write_text(text)
    for arguments in (["--config", str(tmp_path / "c.yaml")], [f"--model={tmp_path / 'c.yaml'}"]):
        _, said, status = command("fit", *arguments)
        assert status == 1 and message in said and len(said.splitlines()) <= 3 and "\x1b" not in said


def test_predict_takes_its_file_as_an_option(command):
    """An option of `trainer.callbacks` belongs to the last one."""
    printed = command("predict", "--config=tiny", "--trainer.callbacks.path=x", "--print_config")[0]
    writer = yaml.safe_load(printed)["trainer"]["callbacks"][-1]
    assert writer["class_path"].endswith("PredictionWriter") and writer["init_args"]["path"] == "x"


def test_a_saved_config_can_be_used_again(command, tmp_path):
    """With the default optimizer too, which the shipped configs replace."""
    config = yaml.safe_load(shipped_configs()["tiny"].read_text())
    del config["model"]["optimizer"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    first = command("fit", f"--config={file}", "--print_config")[0]
    file.write_text(first)
    again, _, status = command("fit", f"--config={file}", "--print_config")
    assert status == 0 and yaml.safe_load(again) == yaml.safe_load(first)


@pytest.mark.parametrize("action", ["fit", "validate"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.ckpt", "no.ckpt does not exist"),
        ("last", "no last.ckpt in FOLDER: leave --ckpt_path out to start"),
        ("best", "name the best-step=….ckpt in FOLDER"),
        ("torn.ckpt", "torn.ckpt is damaged or no checkpoint"),
    ],
)
def test_a_missing_or_torn_checkpoint_is_one_message(command, few_bundled, tmp_path, action, name, message):
    """Lightning itself continues without `last`, with untrained weights."""
    (tmp_path / "torn.ckpt").write_text("hello")
    path = tmp_path / name if name.endswith("ckpt") else name
    folders = [f"--{option}={tmp_path}" for option in ("checkpoint.dirpath", "autosave.dirpath")]
    root = f"--trainer.default_root_dir={tmp_path}"
    printed, said, status = command(action, *SMALL, *SILENT, *folders, root, f"--ckpt_path={path}")
    assert status == 1 and message.replace("FOLDER", str(tmp_path)) in said
    assert not re.search("val/nll|step=|Trained", printed + said.replace("best-step=", ""))


def test_help_is_short_where_defaults_are_objects_and_says_only_what_has_an_effect(command):
    printed = " ".join(command("plan", "--help")[0].split())
    assert "default: Throughput, ProgressBar, SampleLogger," in printed and "Namespace(" not in printed
    assert not re.search("--ckpt_path|--weights_only|SUPPRESS", printed) and "--gpu_memory_gib" in printed


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--checkpoint.dirpath=FILE/c", "checkpoint.dirpath is FILE/c, where no file can be written"),
        ("--autosave.dirpath=FILE/c", "autosave.dirpath is FILE/c"),
        ("--trainer.default_root_dir=FILE/c", "trainer.default_root_dir is FILE/c"),
        ("--trainer.logger.init_args.save_dir=FILE/c", "trainer.logger.init_args.save_dir is FILE/c"),
        ("--trainer.accelerator=gpu", "torch sees no GPU: set it to auto or cpu"),
    ],
)
def test_outputs_and_devices_are_tried_before_anything_is_built(command, tmp_path, monkeypatch, option, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (file := tmp_path / "file").write_text("")
    folders = [f"--{option}={tmp_path}" for option in ("checkpoint.dirpath", "autosave.dirpath")]
    folders += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    _, said, status = command("fit", *SMALL, *folders, option.replace("FILE", str(file)))
    assert status == 1 and words.replace("FILE", str(file)) in said and len(said.splitlines()) <= 4


def test_several_processes_tell_an_error_once(monkeypatch, capsys, tmp_path):
    """The cause, and only if nobody knows it that a process died; each launch for itself."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    lost = RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]: Connection reset by peer")
    taken = torch.distributed.DistNetworkError("The server socket has failed to listen. port: 29500, code: EADDRINUSE")
    launches = {
        "1": ([lost, lost], ["a process died"]),
        "2": ([UserError("lr is 0"), UserError("lr is 0"), lost], ["lr is 0"]),
        "3": ([UserError("a"), UserError("b")], ["a", "b"]),
        "4": ([taken], ["port 4 is in use by another program: set MASTER_PORT"]),
    }
    for port, (errors, told) in launches.items():
        monkeypatch.setenv("MASTER_PORT", port)
        for error in errors:
            with pytest.raises(SystemExit), readable_errors():
                raise error
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == len(told)
        assert all(line.startswith(f"error: {words}") for line, words in zip(said, told, strict=True))


def test_validate_prints_every_score_once(command, few_bundled, tmp_path):
    printed = command("validate", *SMALL, *SILENT, f"--trainer.default_root_dir={tmp_path}")[0]
    assert [printed.count(name) for name in ("val/nll", "val/accuracy", "val/unparsed")] == [1, 1, 1]
    assert "DataLoader" not in printed


def test_lightning_still_reads_checkpoints_in_the_method_that_we_replace():
    assert "ckpt_path" in inspect.getsource(LightningCLI._parse_ckpt_path)


def raise_wrapped():
    try:
        raise UserError("got 1, wanted 2")
    except UserError as error:
        raise ValueError("Parser key model") from error


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (raise_wrapped, "got 1, wanted 2"),
        (lambda: torch.optim.AdamW([torch.zeros(1)], lr=-1), "Invalid learning rate"),
        (lambda: (_ for _ in ()).throw(MisconfigurationException("two loggers")), "two loggers"),
        (lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")), "make room"),
        (lambda: Path("/proc/x").mkdir(), "/proc/x: No such file or directory"),
        (lambda: (_ for _ in ()).throw(UserError("\x1b]0;title\x07\x1b[2J\u202e")), "␛]0;title␇␛[2J⟨U+202E⟩"),
    ],
)
def test_errors_for_users_are_their_message_alone(monkeypatch, capsys, mistake, message):
    with pytest.raises(SystemExit) as end, readable_errors():
        mistake()
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("error: ") and message in said and "Parser key" not in said
    monkeypatch.setenv("DREAM_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError, MisconfigurationException)), readable_errors():
        mistake()


@pytest.mark.parametrize("bug", [ValueError("ours"), FileNotFoundError(2, "gone"), RuntimeError("x")])
def test_all_other_errors_keep_their_traceback(bug):
    with pytest.raises(type(bug)), readable_errors():
        raise bug


def test_full_collections_become_rare(monkeypatch):
    usual = gc.get_threshold()
    monkeypatch.undo()
    try:
        cli.tune_gc()
        assert gc.get_freeze_count() > 100_000 and gc.get_threshold() == (*usual[:2], 1000)
    finally:
        gc.unfreeze()
        gc.set_threshold(*usual)


def test_a_wheel_holds_every_module_config_and_the_program(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("dream_lightning", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    built = subprocess.run([*pip, str(tmp_path)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [
        f for pattern in ("*.py", "*.yaml", "*.html", "py.typed") for f in (tmp_path / "dream_lightning").rglob(pattern)
    ]
    assert {str(file.relative_to(tmp_path)) for file in files} <= names
    assert {f"dream_lightning/configs/{name}.yaml" for name in shipped_configs()} <= names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "dream-lightning = dream_lightning.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.mark.parametrize("config", ["fsdp_lora", "ddp_qlora"])
def test_a_config_for_several_gpus_runs_on_two_processes(tmp_path, config):
    """With smaller sizes, over gloo; test_distributed.py tests the numbers."""
    if config == "ddp_qlora":
        pytest.importorskip("bitsandbytes")
    save_tiny_folder(tmp_path / "base", positions=512)
    write_jsonl(tmp_path / "sums.jsonl", addition_rows(40))
    command = [
        *("fit", "--config", config),
        *(f"--model.pretrained={tmp_path / 'base'}", f"--data.source={tmp_path / 'sums.jsonl'}"),
        *(f"--data.cache_dir={tmp_path / 'cache'}", "--data.schema=auto", "--data.max_length=256"),
        *("--data.num_workers=0", "--data.validation_questions=3", "--model.compile_layers=false"),
        "--model.sampling={max_new_tokens: 8, steps: 4, block_length: 8, compile: false}",
        *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.num_sanity_val_steps=0"),
        *("--trainer.accumulate_grad_batches=1", f"--trainer.logger.init_args.save_dir={tmp_path}"),
        *(f"--{saver}.dirpath={tmp_path / 'checkpoints'}" for saver in ("checkpoint", "autosave")),
        "--autosave.every_n_train_steps=1",
    ]

    if config == "ddp_qlora":  # the program as users start it: Lightning starts the second process
        program = [sys.executable, "-m", "dream_lightning", *command, "--trainer.max_steps=1"]
        ended = subprocess.run(program, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 0, ended.stderr
    else:
        CommandOfRanks(*command, "--trainer.max_steps=1").end()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert (read_rest(last) if last.is_dir() else torch.load(last, weights_only=True))["global_step"] == 1
    if config == "fsdp_lora":  # its checkpoint is restored late
        said = CommandOfRanks(*command, "--trainer.max_steps=2", "--ckpt_path=last").end()
        assert "Restored all states" in said and "begins anew" not in said


def test_the_authors_overlay_is_the_published_recipe():
    """CART and the batch cutoff; focal reweighting and eos as one unit are overlays of their own."""
    overlay = {name: yaml.safe_load(file.read_text()) for name, file in shipped_configs().items()}
    recipe = {"weighting": "cart", "cart_p": 0.1, "normalizer": "micro_batch", "stratified_t": False}
    assert overlay["objective/authors"] == {"model": recipe, "data": {"batch_cutoff": True, "packing": False}}
    assert overlay["objective/focal"] == {"model": {"focal_alpha": 0.25, "focal_gamma": 2.0}}
    assert overlay["objective/eos_as_one"] == {"model": {"treat_eos_as_one": True}}
