"""Paths to material that is not ours to ship: golden numbers and real rows."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("DREAM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not here: set DREAM_SHARED to the folder that holds golden/ and data/")
    return path


@pytest.fixture(scope="session")
def shared():
    """`shared("golden/tokenizer.json")` → its path, or skip with the reason."""
    return shared_path
