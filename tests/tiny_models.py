"""Fixtures of the sampler's tests: tiny random models whose predictions differ by position."""

import dataclasses

import pytest
import torch
from material import random_dream

from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, diffusion_generate

MASK, PAD = 57, 59


def tiny_model(layers: int, **sizes) -> DreamModel:
    """60 tokens; its predictions differ by position."""
    ids = {"vocab_size": 60, "mask_token_id": MASK, "pad_token_id": PAD, "bos_token_id": 58, "eos_token_id": PAD}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.4}
    return random_dream(**{**ids, **tiny, "num_hidden_layers": layers, **sizes}).eval()


@pytest.fixture(scope="session")
def shallow():
    """One layer: its keys and values depend on a position's own token only."""
    return tiny_model(1)


@pytest.fixture(scope="session")
def deep():
    """Three layers."""
    return tiny_model(3)


@pytest.fixture(scope="session")
def prompts():
    """`prompts(rows, length=7, seed=0)` → ids [rows, length]."""

    def make(rows, length=7, seed=0):
        return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def ragged(prompts):
    """Three left-padded prompts: ids [3, 12], their mask, and the padding of each row."""
    padding = torch.tensor([0, 2, 5])
    ids, mask = torch.full((3, 12), PAD), torch.arange(12) >= padding[:, None]
    for b in range(3):
        ids[b, padding[b] :] = prompts(1, 12 - int(padding[b]), seed=b)
    return ids, mask, padding


@pytest.fixture(scope="session")
def run():
    """`run(model, ids, attention_mask=None, infill=…, **fields of SamplingParams)` → GenerationOutput with history."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}

    def generate(model, input_ids, attention_mask=None, **options):
        keywords = {name: options.pop(name) for name in options.keys() - fields}
        params = SamplingParams(**{"max_new_tokens": 24, "steps": 24, "forbid_mask": True, **options})
        return diffusion_generate(model, input_ids, attention_mask, params=params, return_history=True, **keywords)

    return generate


@pytest.fixture
def talker(deep, prompts, run, monkeypatch):
    """A model whose eos is the token that it predicts most."""
    common = run(deep, prompts(16)).sequences[:, 7:].flatten().mode().values
    monkeypatch.setattr(deep.config, "eos_token_id", int(common))
    return deep


@pytest.fixture
def calls(monkeypatch):
    """`calls(model)` → a list that grows by [rows, columns] at every forward of the trunk."""

    def watch(model):
        seen, forward = [], model.model.forward
        monkeypatch.setattr(
            model.model, "forward", lambda *a, **k: (seen.append(list(a[0].shape)), forward(*a, **k))[1]
        )
        return seen

    return watch


@pytest.fixture
def fresh_compiler():
    """Resets torch's compiler before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
