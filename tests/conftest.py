"""Fixtures that read material, tests that need a GPU, and how tests are spread over workers."""

from pathlib import Path

import pytest
import torch
from material import addition_rows, shared_path, write_jsonl

pytest_plugins = ["tiny_models"]
LAUNCHES = ("test_distributed", "test_invariance", "test_sharded_checkpoint")
torch.set_num_threads(1)  # tiny models: more threads are slower


@pytest.fixture(scope="session")
def shared():
    """`shared("golden/tokenizer.json")` → its path; skips where it is absent."""
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
    """Give tests that share a launch of processes to one worker, and the others to any free one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByLaunch(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0])
            return file.stem if file.stem in LAUNCHES else nodeid

    return ByLaunch(config, log)
