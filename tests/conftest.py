"""Fixtures over what tests read."""

import pytest
import torch
from material import addition_rows, shared_path, write_jsonl

pytest_plugins = ["tiny_models"]
torch.set_num_threads(1)  # tiny models: more threads wait for each other


@pytest.fixture(scope="session")
def shared():
    """`shared("golden/tokenizer.json")` → its path, or skip with the reason."""
    return shared_path


@pytest.fixture
def sums(tmp_path):
    """A file of 40 s1K-shaped rows."""
    return write_jsonl(tmp_path / "sums.jsonl", addition_rows(40))
