"""Fixtures over what tests read."""

from pathlib import Path

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


def pytest_collection_modifyitems(items):
    """Skip tests that are marked `gpu` if there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share a launch of processes go to one worker, which makes it; the others to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByLaunch(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).stem in ("test_distributed", "test_invariance", "test_sharded") else nodeid

    return ByLaunch(config, log)
