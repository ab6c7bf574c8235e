"""Samplers on a model that was trained on a CPU (docs/from_scratch.md): 100 held-out 4 × 4 Sudokus."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dream_lightning import DreamModel, SamplingParams, diffusion_generate, load_tokenizer
from dream_lightning.locate import trained

FOLDER = Path(__file__).parents[1] / "models" / "sudoku4"
BLOCK = {"block_length": 17}
SAMPLERS = {  # options, fewest right answers, most forwards an answer; measured:
    "one token a step": ({"threshold": None}, 97, 16),  # 99, 16.0
    "a threshold": ({}, 97, 5.5),  # 99, 5.2
    "a low threshold": ({"threshold": 0.9}, 97, 2.5),  # 99, 2.1
    "a factor": ({"threshold": None, "factor": 0.1}, 97, 4.2),  # 99, 3.8
    "a cache, refreshed": ({**BLOCK, "cache": "dual", "refresh_every": 2}, 95, 6.5),  # 98, 6.1
    # 74, 9.5: here every cell is looked at from the prompt, so a cache of the prompt that gets old costs a quarter.
    "a cache": ({**BLOCK, "cache": "dual"}, 70, 10),
}


@pytest.fixture(scope="module")
def puzzles():
    model, tokenizer = DreamModel.from_pretrained(FOLDER).float().eval(), load_tokenizer(FOLDER)
    rows = [json.loads(line) for line in (FOLDER / "puzzles.jsonl").read_text().splitlines()]
    texts = {name: [row[name] for row in rows] for name in ("prompt", "response")}
    prompts = torch.tensor([tokenizer.encode(f"{text}\n") for text in texts["prompt"]])  # [100, 17]
    return model, tokenizer, prompts, texts["response"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trained_model_keeps_its_accuracy(name, puzzles):
    model, tokenizer, prompts, solutions = puzzles
    options, least, most = SAMPLERS[name]
    params = replace(SamplingParams(**trained(FOLDER).sampling), **options)
    out = diffusion_generate(model, prompts, params=params)
    texts = tokenizer.batch_decode(out.sequences[:, prompts.shape[1] :], skip_special_tokens=True)
    right = sum(text == solution for text, solution in zip(texts, solutions, strict=True))
    assert right >= least and out.forwards.float().mean() <= most
