"""Fixtures that read material, and tests that need a GPU."""

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from material import addition_rows, shared_path, write_jsonl

from dream_lightning.cli import DreamCLI
from dream_lightning.data import additions

pytest_plugins = ["tiny_models"]
torch.set_num_threads(1)  # tiny models: more threads are slower


@pytest.fixture(scope="session")
def shared():
    """`shared("golden/tokenizer.json")` → its path; skips where it is absent."""
    return shared_path


@pytest.fixture
def sums(tmp_path):
    """A file of 40 s1K-shaped rows."""
    return write_jsonl(tmp_path / "sums.jsonl", addition_rows(40))


@pytest.fixture
def few_bundled(monkeypatch):
    """400 bundled rows instead of 20,000, which take seconds to read."""
    monkeypatch.setattr(additions, "TRAIN_ROWS", 400)


@pytest.fixture(scope="module")
def cached_parsers():
    """Building a parser for the Trainer takes five times as long as parsing with it."""
    kept = {}

    def setup_parser(cli, *arguments):
        if cli.command not in kept:
            LightningCLI.setup_parser(cli, *arguments)
            kept[cli.command] = dict(vars(cli))
        vars(cli).update(kept[cli.command])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamCLI, "setup_parser", setup_parser, raising=False)
        yield


def pytest_collection_modifyitems(items):
    """Skip tests that are marked `gpu` if there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
