"""Fixed shapes and buffers, as CUDA graphs need them, run eagerly; on a GPU the graphs themselves."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from dream_lightning.adapters import LoraParams, add_lora, merge_lora
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser
from dream_lightning.sampling import SamplingParams, denoising_steps, release_compiled
from dream_lightning.sampling.canvas import prepare
from dream_lightning.sampling.unmasking import Threshold

DUAL = {"block_length": 8, "cache": "dual"}
WAYS = [
    {"steps": 12}, {"steps": 12, "temperature": 1.0}, {"steps": 12, "alg": "origin"}, {"threshold": 0.4},
    {"block_length": 8, "cache": "prefix", "steps": 12}, {**DUAL, "threshold": 0.4}, {**DUAL, "stop_at_eos": True},
    {"min_new_tokens": 10, "steps": 12}, {"stop_at_eos": True, "steps": 12}, {"unmasking": Threshold(0.4)},
]  # fmt: skip


def denoiser(model):
    return CompiledDenoiser(model, capture=False)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_fixed_shapes_give_the_same_answers(talker, prompts, run, way):
    fast = denoiser(talker)
    for rows in (1, 3, 5):
        ids = prompts(rows)
        plain, quick = run(talker, ids, **way), run(fast, ids, **way)
        assert torch.equal(plain.history, quick.history)
        assert torch.equal(plain.filled_at, quick.filled_at)
        torch.testing.assert_close(plain.confidence, quick.confidence)


def test_the_last_layer_computes_only_the_columns_that_are_read(deep, prompts, run, monkeypatch):
    """The last layer's MLP sees what predicts new tokens; or all where the prompt has masks."""
    fast, last, seen = denoiser(deep), deep.model.layers[-1].mlp, []
    forward = last.forward
    monkeypatch.setattr(last, "forward", lambda x: (seen.append(x.shape[1]), forward(x))[1])

    gaps = prompts(2)
    gaps[:, [2, 6]] = 57
    for ids, infill, columns in ((prompts(2), False, 24), (gaps, True, 64)):
        expected = run(deep, ids, infill=infill)
        seen.clear()
        assert torch.equal(run(fast, ids, infill=infill).history, expected.history)
        assert set(seen) == {columns}
    assert (expected.filled_at[:, [2, 6]] >= 0).all()


def test_shapes_are_few(deep, prompts, run):
    fast = denoiser(deep)
    for rows, length in ((5, 7), (6, 9), (7, 30), (8, 40), (3, 12), (4, 12), (8, 20)):
        run(fast, prompts(rows, length), block_length=8, cache="dual", threshold=0.4, stop_at_eos=True)
    # rows 8, 4, 2, 1; at each all columns or a block, unless a batch began there
    assert len(fast.model._graphs) <= 8
    assert {key[0][1] for key in fast.model._graphs} == {64, 9}


def test_columns_come_in_few_lengths(deep):
    config = SimpleNamespace(mask_token_id=57, vocab_size=60, max_position_embeddings=4096, eos_token_id=None)
    for length, columns in {2: 64, 64: 64, 65: 128, 1000: 1024, 1025: 1152, 3000: 3072}.items():
        canvas = prepare(config, torch.zeros(3, length - 1, dtype=torch.int64), None, SamplingParams(max_new_tokens=1))
        assert denoiser(deep).into_bucket(canvas).x.shape == (4, columns)


def move_norm(model):
    model.model.norm.weight.data = model.model.norm.weight.data.clone()


def read_norm_as_bfloat16(model):
    """At the same address."""
    weight = model.model.norm.weight
    weight.data = weight.data.view(torch.bfloat16)[: len(weight)]


def move_scales(model):
    model.model.layers[0].mlp.scales = model.model.layers[0].mlp.scales.clone()


@pytest.mark.parametrize("change", [move_norm, read_norm_as_bfloat16, merge_lora, move_scales])
def test_new_graphs_for_what_moved(prompts, run, change):
    """Graphs contain the products of adapters, and the addresses of buffers such as the scales of quantized layers."""
    model = tiny_model(1)
    model.model.layers[0].mlp.register_buffer("scales", torch.ones(4))
    add_lora(model, LoraParams(rank=2, targets=["q_proj"]), generator=torch.Generator().manual_seed(0))
    fast, seen = denoiser(model), []
    for _ in range(2):
        run(fast, prompts(1), max_new_tokens=4, steps=1)
        seen.append(dict(fast.model._graphs))
    assert seen[0] and seen[0] == seen[1]
    change(model)
    fast.refresh()
    assert not fast.model._graphs


def test_two_generations_at_a_time_do_not_share_a_cache_unnoticed(deep, prompts):
    fast = denoiser(deep)

    def interleaved(model, **options):
        params = SamplingParams(max_new_tokens=16, steps=16, forbid_mask=True, **options)
        runs = [denoising_steps(model, prompts(2, seed=seed), params=params) for seed in (0, 1)]
        return [torch.cat([state.x for state in states]) for states in zip(*runs, strict=True)][-1]

    assert torch.equal(interleaved(fast), interleaved(deep))
    with pytest.raises(ValueError, match="another generation by this compiled model"):
        interleaved(fast, **DUAL)


def test_caches_of_other_shapes_are_dropped(deep, prompts, run):
    """A stream of prompts of many lengths would fill a GPU, although one cache at a time is in use.

    Rows that fill their columns (40 or 104 tokens and 24 new ones) need no mask, so that their blocks have the same
    inputs for each length of the cache. Lightning validates in inference mode; a script after it need not.
    """
    fast = denoiser(deep)
    for i, shape in enumerate([(2, 40), (2, 40), (2, 104), (8, 20), (4, 40), (2, 60), (8, 80), (1, 100), (8, 20)]):
        ids = prompts(*shape)
        with torch.inference_mode(i == 0):
            assert torch.equal(run(fast, ids, **DUAL).history, run(deep, ids, **DUAL).history)
        sizes = [rows * columns for rows, columns in fast.model._caches]
        assert sum(sizes) <= 2 * max(sizes)
        assert {id(cache) for _, cache in fast.model._graphs.values()} == {id(c) for c in fast.model._caches.values()}
    fast.model._reset()
    caches = {rows: fast.model.new_cache(rows, 64) for rows in (8, 4, 2, 1)}  # of a batch that shrinks by halves
    assert all(fast.model.new_cache(rows, 64) is cache for rows, cache in caches.items())


def test_a_new_head_is_seen(prompts, run):
    model = tiny_model(1)
    fast = denoiser(model)
    before = run(fast, prompts(2)).sequences
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    assert torch.equal(run(fast, prompts(2)).sequences, run(model, prompts(2)).sequences)
    assert not torch.equal(run(fast, prompts(2)).sequences, before)


@pytest.mark.parametrize("hook", ["logits_hook", "tokens_hook"])
def test_hooks_do_not_see_padding(deep, prompts, run, hook):
    with pytest.raises(ValueError, match="pass the model without compile"):
        run(denoiser(deep), prompts(3), **{hook: lambda *a: a[-1]})


def test_a_cpu_is_refused(deep, prompts, run, monkeypatch):
    """Later, too: a graph captured of a model that has left the GPU would be empty, and its result an old one."""
    with pytest.raises(ValueError, match="the model is on cpu, CUDA graphs need one GPU"):
        run(deep, prompts(1), compile=True)
    fast, weight = denoiser(deep), deep.model.norm.weight
    fast.model._capture = True
    monkeypatch.setattr(weight, "data", weight.data.clone())
    with pytest.raises(ValueError, match="the model is on cpu"):
        run(fast, prompts(1))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_model_on_another_gpu(prompts, run):
    for device in ("cuda:0", "cuda:1"):
        model, ids = tiny_model(1).to(device), prompts(2).to(device)
        assert torch.equal(run(model, ids).sequences, run(model, ids, compile=True).sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_graphs_give_the_same_answers(deep, prompts, run, way):
    device = f"cuda:{torch.cuda.device_count() - 1}"  # where there are several, not the current one
    deep.to(device)
    try:
        for rows in (1, 3):
            ids = prompts(rows).to(device)
            for _ in range(2):
                assert torch.equal(run(deep, ids, **way).sequences, run(deep, ids, compile=True, **way).sequences)
    finally:
        release_compiled(deep)
        deep.to("cpu")
