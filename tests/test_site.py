"""The documentation builds as a site without warnings, its notebook runs, and its pictures say what they show."""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_warnings(tmp_path):
    for package in ("mkdocs-material", "mkdocstrings-python"):
        if not list(distributions(name=package)):
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    # A process of its own, without tests/ in its path: material.py there hides mkdocs-material.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0 and "WARNING -" not in built.stderr, built.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in (
        "DreamModule",
        "diffusion.corrupt",
        "SamplingParams.threshold",
        "answering.answer_texts",
        "tasks.Task",
    ):
        assert f'id="dream_lightning.{name}"' in api, name
    assert 'data-md-color-media="(prefers-color-scheme)"' in api, "what the first visit found would be kept"
    for page in ("index", "masked_diffusion/index", "tutorials/index", "notebooks/tour/index"):
        text = (tmp_path / f"{page}.html").read_text(encoding="utf-8")
        assert "](" not in text and 'src="http' not in text, page


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs/notebooks/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["trainer"].callback_metrics["val/accuracy"] > 0.8
    assert (tmp_path / "tour/denoising.html").exists() and "∎ in [4] forwards" in capsys.readouterr().out
