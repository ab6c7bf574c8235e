"""Sweeps of a tiny Dream and their report. The commands of the runs are called in this process."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
from matplotlib import image, rcParams

from dream_lightning import cli
from dream_lightning.errors import UserError
from dream_lightning.evaluation.pages import new_figure, page, svg
from dream_lightning.experiments import report
from dream_lightning.experiments import sweep as train_variants
from dream_lightning.experiments.pruning import open_study
from dream_lightning.experiments.runs import find_runs
from dream_lightning.experiments.sweep import Space, Variant

module = sys.modules["dream_lightning.experiments.sweep"]  # the package has a function of this name
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = {
    "model.new_model": SIZES | {"max_position_embeddings": 256},
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.callbacks": ["dream_lightning.training.Throughput"],
    "model.sampling.max_new_tokens": 8,
    "model.sampling.steps": 2,
    "autosave.every_n_train_steps": 1,
    "trainer.enable_progress_bar": False,
    "data.validation_questions": 2,
    "data.batch_size": 4,
}


@pytest.fixture
def started(monkeypatch):
    """The commands that were run; `died` is the number of one that a kill ends."""
    commands, died = [], []

    def start(arguments, output, lock_file):
        commands.append(arguments)
        if len(commands) in died:
            arguments = [*arguments, "--trainer.max_steps=2"]
        cli.run(list(arguments))
        if len(commands) in died:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr("sys.argv", ["dream-lightning"])
    return commands, died


@pytest.fixture
def tiny(tmp_path, sums):
    source = {"data.source": str(sums), "data.validation_source": str(sums), "data.cache_dir": str(tmp_path / "cache")}
    return partial(train_variants, "tiny", out=str(tmp_path / "sweep"), options=OPTIONS | source)


def test_a_search_killed_in_a_trial_resumes_it_and_asks_the_same(started, tiny, tmp_path):
    pytest.importorskip("optuna")
    commands, died = started
    search = {"model.optimizer.lr": Space(1e-4, 1e-1, log=True), "model.weighting": Space(choices=["none", "linear"])}
    style = rcParams["axes.facecolor"]
    died.append(2)
    with pytest.raises(KeyboardInterrupt):
        tiny(search=search, trials=2)
    runs = tiny(search=search, trials=2)
    assert len(commands) == 3 and "--ckpt_path=last" in commands[2]
    learning_rates = [next(w for w in words if "optimizer.lr" in w) for words in commands]
    assert learning_rates[1] == learning_rates[2] != learning_rates[0]
    assert [run.record["state"] for run in runs] == ["complete", "complete"]
    assert all(sorted(run.curves["val/nll"]) == [1, 3] for run in runs)
    page, text = ((tmp_path / "sweep" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "ckpt_path" not in text and "| tokens | minutes | device hours |" in text
    assert rcParams["axes.facecolor"] == style  # Optuna's plots set another
    assert "model.optimizer.init_args.lr" in text and "Search" in page and page.count("<svg") >= 6
    assert "src=" not in page
    tiny(search=search, trials=2)
    assert len(commands) == 3  # nothing is left to do


def test_a_trial_worse_than_the_median_is_pruned_and_saves_its_budget(started, tiny, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(module, "report", lambda *arguments, **options: None)
    monkeypatch.setattr(Space, "suggest", lambda space, trial, name: (1e-1, 1e-7)[trial.number])
    runs = tiny(search={"model.optimizer.lr": Space(1e-7, 1e-1)}, trials=2, startup_trials=1)
    trials = open_study(str(tmp_path / "sweep/study.log"))[0].trials
    assert [run.record["state"] for run in runs] == ["complete", "pruned"]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"]
    assert [sorted(run.curves["val/nll"]) for run in runs] == [[1, 3], [1]]  # of four steps
    assert runs[0].curves["val/nll"][1] < runs[1].curves["val/nll"][1]
    assert [max(run.curves["train/loss"]) for run in runs] == [3, 1]


def test_variants_are_checked_before_the_first_is_trained_and_seeds_get_an_interval(started, tiny, tmp_path, capsys):
    commands, _ = started
    variants = {"a": Variant(["objective/focal"], {"trainer.max_steps": 2})}
    with pytest.raises(SystemExit):
        tiny(variants=variants | {"b": Variant(options={"data.max_lenght": 8})}, check=cli.check_words)
    assert "did you mean --data.max_length" in capsys.readouterr().err and not commands
    runs = tiny(variants=variants, seeds=[0, 1])
    assert [run.record["name"] for run in runs] == ["a,seed=0", "a,seed=1"]
    text = (tmp_path / "sweep" / "report.md").read_text()
    assert "runs/a | 2 | " in text and "model.seed" in text
    assert "range of seeds" in (tmp_path / "sweep" / "report.html").read_text()
    with pytest.raises(UserError, match=r"options was .* and is"):
        tiny(variants={"a": Variant(options={"model.weighting": "linear"})}, seeds=[0, 1])
    record = json.loads((tmp_path / "sweep/runs/a,seed=0/run.json").read_text())
    assert record["state"] == "complete" and record["command"][0] == "fit"
    report([tmp_path / "sweep/runs/a,seed=0"], out=tmp_path / "one")
    assert "val/nll" in (tmp_path / "one/report.md").read_text()
    assert "step; bars: 95 % interval<" in (tmp_path / "one/report.html").read_text()  # of the accuracy


def test_pages_and_their_figures_are_dark_where_the_reader_wants_it(tmp_path):
    if not (browser := shutil.which("chromium")):
        pytest.skip("needs chromium to look at a page")
    figure, axes = new_figure(3)
    axes.plot([0, 1])
    (tmp_path / "page.html").write_text(page("Title", [svg(figure)]))
    flags = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,400", tmp_path / "page.html"]
    shares = []  # of bright pixels
    for mode in ([], ["--force-dark-mode"]):
        subprocess.run([*flags, *mode, f"--screenshot={tmp_path / 'page.png'}"], capture_output=True, check=True)
        shares.append((image.imread(tmp_path / "page.png")[..., :3].mean(-1) > 0.5).mean())
    assert shares[0] > 0.9 and 0.001 < shares[1] < 0.1


def test_what_is_no_run_or_no_space_is_named(tmp_path, tiny):
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path)
    for wrong in ({}, {"low": 1}, {"low": 1, "high": 2, "choices": [1]}):
        with pytest.raises(UserError, match="wanted low and high, or choices"):
            Space(**wrong)
    with pytest.raises(UserError, match="search is set, and so are"):
        tiny(search={"x": Space(1, 2)}, seeds=[1, 2])


@pytest.mark.parametrize("name", [name for name in cli.shipped_configs() if name.startswith("experiments/")])
def test_every_shipped_sweep_parses_and_so_do_its_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    check, checked = cli.check_words, []
    monkeypatch.setattr(cli, "check_words", lambda *words: (check(*words), checked.append(str(words))))
    monkeypatch.setattr(module, "_search", lambda *arguments: None)
    monkeypatch.setattr(module._Runner, "run", lambda *arguments: "complete")
    monkeypatch.setattr(module, "report", lambda *arguments, **options: [])
    monkeypatch.setattr(module, "find_runs", lambda *arguments: [])
    monkeypatch.setattr("sys.argv", ["dream-lightning"])
    cli.run(["sweep", "--config", name, f"--out={tmp_path}"])
    assert len(set(checked)) == len(checked) >= 2
