"""Fixtures: a script as a module, and a tiny model folder."""

import importlib
import sys
from pathlib import Path

import pytest
from material import save_tiny_folder

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """`script("curve")` → the module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) & {file.stem for file in SCRIPTS.glob("*.py")} - before:
        del sys.modules[name]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny"), positions=1200)
