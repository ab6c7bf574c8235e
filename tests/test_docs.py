"""What README and docs/ say is true: their Python runs, their links, commands, configs and options exist."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from material import short_trainer, tiny_data, tiny_module, write_jsonl

from dream_lightning import DreamModule
from dream_lightning.batch import Example
from dream_lightning.cli import run, shipped_configs
from dream_lightning.commands import SUMMARIES
from dream_lightning.data.schemas import SCHEMAS, read_examples
from dream_lightning.tasks import grade_response

pytestmark = pytest.mark.usefixtures("few_bundled")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "history")]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
# A block of Python begins with a comment, its title.
BLOCKS = {block.splitlines()[0]: block for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)}


def run_block(title, folder):
    file = folder / "block.py"
    file.write_text(BLOCKS[title])
    return runpy.run_path(str(file))


@pytest.mark.parametrize("title", BLOCKS)
def test_every_python_block_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    names = run_block(title, tmp_path)
    if title == "# a training script":
        assert names["trainer"].global_step == 3
        assert {"val/nll", "val/accuracy", "val/unparsed"} <= names["trainer"].callback_metrics.keys()


def test_the_objective_in_readme_trains(tmp_path):
    losses = []
    for kind in (DreamModule, run_block("# an objective", tmp_path)["Softer"]):
        fit = short_trainer(tmp_path, max_steps=1)
        fit.fit(tiny_module(kind), tiny_data("bundled", tmp_path, first_n=8, validation_source="bundled"))
        losses.append(float(fit.callback_metrics["train/loss"]))
    assert losses[0] != losses[1]


def test_a_loss_that_leaks_falls_to_0_and_answers_nothing(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = tiny_module(
        run_block("# a leak", tmp_path)["Leaky"],
        new_model=sizes | {"initializer_range": 0.1, "rope_theta": 100.0},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    rows = [{"question": f"{n} + 3 = ?", "response": str(n + 3), "answer": str(n + 3)} for n in range(40)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = tiny_data(source, tmp_path, response_column="response", batch_size=32)
    fit = short_trainer(tmp_path, max_steps=100, limit_val_batches=None, check_val_every_n_epoch=50)
    fit.fit(module, data)
    scores = fit.callback_metrics
    assert scores["train/loss"] < 0.1 and scores["val/nll"] > 1
    assert (scores["val/scored"], scores["val/accuracy"]) == (3, 0)


def test_the_rule_the_task_and_the_schema_in_docs_work(tmp_path, monkeypatch):
    names = run_block("# a rule", tmp_path)
    assert (names["output"].sequences != names["tokenizer"].mask_token_id).all()
    assert names["output"].filled_at.max() == 15  # one or more at each step

    run_block("# my_tasks.py", tmp_path)
    asked = Example("q", ({"role": "user", "content": "3?"},), None, "", None, "row 1", "parity", {"number": 3})
    assert [grade_response(text, asked).correct for text in ("It is odd.", "Even", "")] == [True, False, False]

    monkeypatch.setitem(SCHEMAS, "quiz", None)  # removed at the end
    run_block("# my_schemas.py", tmp_path)
    rows = write_jsonl(tmp_path / "quiz.jsonl", [{"stem": "1+1?", "choices": ["A 1", "B 2"], "why": "add", "key": "B"}])
    (read,) = read_examples(rows, reference_column="key")
    assert (read.prompt[0]["content"], read.thinking, read.reference) == ("1+1?\nA 1\nB 2", "add", "B")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`?((?:scripts|tests|configs|dream_lightning)/[\w/]+\.\w+)", text):
        assert (ROOT / file).exists(), file


def test_commands_configs_and_options_exist(monkeypatch, capsys):
    for name in re.findall(r"dream-lightning ([a-z][\w-]+)", TEXT):
        assert name in SUMMARIES, name
    for name in re.findall(r"--config (?!configs/)([a-z]\S+)", TEXT):
        assert name.removesuffix(".yaml") in shipped_configs(), name
    monkeypatch.setattr(sys, "argv", ["dream-lightning", "fit", "--help"])
    with pytest.raises(SystemExit):
        run(["fit", "--help"])
    known = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    for option in re.findall(r"(?:--|`)((?:data|model|trainer|autosave|checkpoint)\.[a-z0-9_]+)", TEXT):
        assert option in known, option
