"""What tests read: paths to material that is not ours to ship, and rows made here."""

import json
import os
from pathlib import Path

import lightning as L
import pytest

SHARED = Path(os.environ.get("DREAM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not here: set DREAM_SHARED to the folder that holds golden/ and data/")
    return path


# Of a Dream that trains in milliseconds.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def quiet_trainer(**options) -> L.Trainer:
    """On the CPU, without bars and logs; without checkpoints, unless told otherwise."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(**{"accelerator": "cpu", **dict.fromkeys(quiet, False), **options})


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
