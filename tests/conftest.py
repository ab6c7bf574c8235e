"""Paths to material that is not ours to ship: golden numbers and real rows."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest_plugins = ["tiny_models"]
torch.set_num_threads(1)  # tiny models: more threads wait for each other
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


def addition_rows(count: int, *, start: int = 0) -> list[dict]:
    """s1K-shaped rows with traces of different lengths."""
    rows = []
    for i in range(start, start + count):
        a, b = 7 * i % 100, 13 * i % 100
        rows.append(
            {
                "question": f"{a} + {b} = ? ({i})",
                "solution": str(a + b),
                "cot_type": "math",
                "source_type": "sum",
                "thinking_trajectories": ["carry " * (i % 5 + 1) + str(a + b)],
                "attempt": rf"\boxed{{{a + b}}}",
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sums(tmp_path):
    """A file of 40 s1K-shaped rows."""
    return write_jsonl(tmp_path / "sums.jsonl", addition_rows(40))
