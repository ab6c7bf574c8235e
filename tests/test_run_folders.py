"""A run after `fit`: its summary, what its checkpoint knows, and every command by the folder alone."""

import io
import logging
import re
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from material import addition_rows, quiet_trainer, tiny_data, tiny_module, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dream_lightning import DreamModule, cli
from dream_lightning.errors import UserError
from dream_lightning.export import export_checkpoint
from dream_lightning.locate import TRAINED, find_model, trained, with_checkpoint
from dream_lightning.training import RunSummary

SIZES = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
LAST = "logs/tiny/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder in which two steps of `tiny` were trained by the command line, and what it said."""
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "rows.jsonl", addition_rows(20))
    folders = [f"--{saver}.dirpath=logs/tiny/checkpoints" for saver in ("checkpoint", "autosave")]
    options = [
        "--data.source=rows.jsonl",
        "--data.validation_source=null",
        "--data.max_length=256",
        "--data.style=plain",
    ]
    options += [
        "--data.eos_fill_to=null",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        "--data.batch_size=4",
    ]
    options += [f"--model.new_model={SIZES}", "--trainer.logger.init_args.save_dir=logs", "--data.cache_dir=cache"]
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dream-lightning"])
        logging.getLogger("lightning.pytorch").addHandler(handler)
        cli.run(["fit", "--config=tiny", *folders, *options])
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    return folder, said.getvalue()


@pytest.fixture
def inside(run, monkeypatch):
    monkeypatch.chdir(run[0])
    return run[0]


def test_fit_ends_with_scores_checkpoints_and_commands(run):
    first, _, said = run[1].partition("Trained to step 2 in")
    assert re.search(
        r"Validation: 2 questions, 2 at once, of \d+ \+ 30 tokens: at most 15 forwards, [\d.]+ s on this CPU; "
        r"likelihood of \d+ tokens, [\d.]+ s; 2 validations, \d+% of the fit",
        first,
    )
    assert "of it validation" in said and "kWh" not in said
    assert "0 of 2, 95 % interval 0.0% to 65.8%" in said and "nats a token" in said
    for line in (
        f"Last checkpoint: {LAST}",
        "Best checkpoint: logs/tiny/checkpoints/best-step=2.ckpt (val/nll",
        f"  dream-lightning chat --model {LAST}",
        f"  dream-lightning export --model {LAST} --folder my-dream",
        "  tensorboard --logdir logs\n    and open http://localhost:6006/#custom_scalars",
    ):
        assert f"\n{line}" in said


def test_tensorboard_opens_on_loss_validation_and_speed_and_compares_runs(inside):
    events = EventAccumulator("logs/tiny/version_0").Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["loss", "validation", "speed"]
    content = events.PluginTagToContent("hparams")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    names = {info.name for info in experiment.hparam_infos}
    assert {"model.weighting", "model.optimizer.lr", "data.source", "trainer.max_steps"} <= names
    assert {info.name.tag for info in experiment.metric_infos} >= {"val/nll", "val/accuracy"}
    assert {"val/nll", "val/accuracy"} <= set(events.Tags()["scalars"]) and "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.parametrize("name", [LAST, "logs/tiny/checkpoints", "logs/tiny", "logs/tiny/version_0"])
def test_a_run_is_found_by_any_of_its_folders(inside, name):
    assert find_model(name).path.resolve() == Path(LAST).resolve()
    found = trained(name)
    assert (found.sampling["max_new_tokens"], found.style, found.several_turns) == (30, "plain", False)


def test_what_is_not_one_thing_is_refused_by_name(inside, tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(Path(LAST).read_bytes())
    with pytest.raises(UserError, match=rf"is ambiguous \(checkpoint {tmp_path}/a.ckpt, checkpoint .*b.ckpt\)"):
        find_model(tmp_path)
    (tmp_path / "b.ckpt").rename(tmp_path / "last.ckpt")
    assert find_model(tmp_path).path.name == "last.ckpt"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is ambiguous \(a model folder, checkpoint .*last.ckpt\)"):
        find_model(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no checkpoint, no adapters and no model"):
        find_model(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist: name a run"):
        find_model("./absent")
    assert find_model("Dream-org/Dream-v0-Base-7B").kind == "hub"


def test_a_checkpoint_alone_makes_the_module(inside):
    module = DreamModule.load_from_checkpoint(LAST)
    assert (module.weighting, module.sampling.steps, module.tokenizer_name) == ("none", 15, "bytes")
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    changed = DreamModule.load_from_checkpoint(LAST, sampling={"steps": 3}, weighting="linear")
    assert (changed.weighting, changed.sampling.steps) == ("linear", 3)


def test_predict_needs_no_config_and_makes_no_run(inside, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dream-lightning"])
    cli.run(["predict", "--ckpt_path=logs/tiny", "--data.predict_source=rows.jsonl"])
    assert "20 questions" in capsys.readouterr().out
    lines = Path("logs/tiny/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 20 and '"target": "0"' in lines[0]
    assert [path.name for path in Path("logs/tiny").glob("version_*")] == ["version_0"]


def test_a_model_folder_or_adapters_replace_the_model_of_a_config(inside, tmp_path):
    export_checkpoint("logs/tiny", tmp_path / "model")
    assert trained(tmp_path / "model") == replace(trained("logs/tiny"), tokenizer=None)
    assert trained(export_checkpoint(tmp_path / "model", tmp_path / "again")).style == "plain"
    (tmp_path / "again" / TRAINED).write_text('{"stile": "plain"}')
    with pytest.raises(UserError, match=rf"again/{TRAINED}.*stile"):
        trained(tmp_path / "again")
    rest = ["--data.predict_source", "q.jsonl"]
    words = with_checkpoint("predict", [f"--ckpt_path={tmp_path / 'model'}", *rest], gpu=False)
    assert f"--model.pretrained={tmp_path / 'model'}" in words and "--data.source=q.jsonl" in words
    assert {"--model.sampling.steps=15", "--data.style=plain"} <= set(words)
    cli.check_words("fit", words)  # they parse
    given = with_checkpoint("predict", ["--ckpt_path", str(tmp_path / "model"), "--data.style=chat"], gpu=False)
    assert given.index("--data.style=plain") < given.index("--data.style=chat")
    assert not any("ckpt_path" in word for word in words)
    kept = ["--config=tiny", "--ckpt_path=last"]
    assert with_checkpoint("validate", kept, gpu=False) == kept
    assert with_checkpoint("fit", ["--config=tiny", "--ckpt_path", "logs/tiny"], gpu=False)[1] == f"--ckpt_path={LAST}"


def test_chat_needs_no_options_and_asks_every_question_alone(inside, monkeypatch, capsys):
    for options, notes in (([], 1), (["--history=false"], 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("1+1?\n2+2?\n3+3?\n"))
        cli.run(["chat", "--model=logs/tiny", *options])
        printed = capsys.readouterr().out
        contexts = {line.split("conversation ")[1] for line in printed.splitlines() if "conversation" in line}
        assert printed.count("max_new_tokens=30") + printed.count("tok/s") >= 3
        assert printed.count("trained on single questions") == notes and len(contexts) <= 3


def test_evaluate_asks_as_in_training(inside, capsys):
    cli.run(["evaluate", "--model=logs/tiny", "--tasks=rows.jsonl", "--show_prompts=1"])
    assert "Let's think step by step." in capsys.readouterr().out  # the style plain


def test_several_turns_are_known_and_a_logger_of_a_script_names_the_run(tmp_path):
    chats = [{"messages": [{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant") * 2]} for n in range(8)]
    source = write_jsonl(tmp_path / "chats.jsonl", chats)
    trainer = quiet_trainer(RunSummary(), max_steps=1, logger=TensorBoardLogger(tmp_path), limit_val_batches=0)
    with redirect_stderr(io.StringIO()):
        trainer.fit(tiny_module(), tiny_data(source, tmp_path, validation_questions=0))
    trainer.save_checkpoint(Path(trainer.log_dir) / "checkpoints" / "step=1.ckpt")
    assert trained(trainer.log_dir).several_turns is True


def test_summary_without_a_logger(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr("dream_lightning.training.summary.rank_zero_info", printed.append)
    trainer = quiet_trainer(RunSummary(), ModelCheckpoint(tmp_path, save_last=True), max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(), tiny_data(write_jsonl(tmp_path / "sums.jsonl", addition_rows(8)), tmp_path))
    assert "dream-lightning chat --model" in printed[-1] and "tensorboard" not in printed[-1]
