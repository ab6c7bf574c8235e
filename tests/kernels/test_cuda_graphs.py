"""Fixed shapes and buffers, as CUDA graphs need them, run eagerly; on a GPU the graphs themselves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from dream_lightning.adapters import LoraParams, add_lora, merge_lora
from dream_lightning.kernels.cuda_graphs import compiled
from dream_lightning.sampling import CompiledDenoiser, SamplingParams, denoising_steps
from dream_lightning.sampling.canvas import prepare

WAYS = [
    {"steps": 12},
    {"steps": 12, "temperature": 1.0},
    {"threshold": 0.4},
    {"block_length": 8, "cache": "prefix", "steps": 12},
    {"block_length": 8, "cache": "dual", "threshold": 0.4},
    {"stop_at_eos": True, "block_length": 8, "cache": "dual"},
    {"required_tokens": [4], "min_new_tokens": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_fixed_shapes_give_the_same_answers(deep, prompts, run, way):
    fast = CompiledDenoiser(deep, capture=False)
    for rows in (1, 3, 5):
        ids = prompts(rows)
        plain, quick = run(deep, ids, **way), run(fast, ids, **way)
        assert torch.equal(plain.history, quick.history)
        assert torch.equal(plain.filled_at, quick.filled_at)
        torch.testing.assert_close(plain.confidence, quick.confidence)


def test_hidden_states_of_the_prompt_are_left_out_where_nobody_reads_them(deep, prompts, run, monkeypatch):
    """The last layer's MLP sees what predicts new tokens; or all where the prompt has masks."""
    fast, last, seen = CompiledDenoiser(deep, capture=False), deep.model.layers[-1].mlp, []
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


def test_fixed_shapes_know_where_the_new_tokens_begin(deep, prompts, run, monkeypatch):
    """With a token as eos that the model likes: it is kept from the same columns, and ends the same rows."""
    fast, ids = CompiledDenoiser(deep, capture=False), prompts(5)
    monkeypatch.setattr(deep.config, "eos_token_id", int(run(deep, ids).sequences[:, 7:].flatten().mode().values))
    late, stopped = {"min_new_tokens": 10}, {"stop_at_eos": True, "steps": 12}
    for way in (late, stopped):
        assert torch.equal(run(deep, ids, **way).history, run(fast, ids, **way).history)
    assert not torch.equal(run(deep, ids, **late).sequences, run(deep, ids).sequences)
    assert (run(deep, ids, **stopped).filled_at[:, 7:] == -1).any()


def test_blocks_of_one_width_have_the_cache_of_their_own_length(deep, prompts, run):
    """Rows that fill their columns need no mask, so the inputs of a block do not tell 64 columns from 128."""
    fast, blocks = CompiledDenoiser(deep, capture=False), {"block_length": 8, "cache": "dual"}
    for length in (64, 128):
        ids = prompts(2, length - 24)
        assert torch.equal(run(fast, ids, **blocks).history, run(deep, ids, **blocks).history)


def test_shapes_are_few(deep, prompts, run):
    fast = CompiledDenoiser(deep, capture=False)
    for rows, length in ((5, 7), (6, 9), (7, 30), (8, 40), (3, 12), (4, 12), (8, 20)):
        run(fast, prompts(rows, length), block_length=8, cache="dual", threshold=0.4, stop_at_eos=True)
    # rows 8, 4, 2, 1; at each all columns or a block, unless a batch began there
    assert len(fast.model._graphs) <= 8
    assert {key[0][1] for key in fast.model._graphs} == {64, 9}


@pytest.mark.parametrize(
    ("length", "columns"), [(2, 64), (64, 64), (65, 128), (1000, 1024), (1025, 1152), (3000, 3072)]
)
def test_columns_come_in_few_lengths(deep, length, columns):
    config = SimpleNamespace(mask_token_id=57, vocab_size=60, max_position_embeddings=4096)
    canvas = prepare(config, torch.zeros(3, length - 1, dtype=torch.int64), None, SamplingParams(max_new_tokens=1))
    assert CompiledDenoiser(deep, capture=False).into_bucket(canvas).x.shape == (4, columns)


def test_one_for_a_model_and_new_graphs_for_moved_weights(deep, prompts, run, monkeypatch):
    """Moved to another place, or read as another type in the same place."""
    fast = CompiledDenoiser(deep, capture=False)
    run(fast, prompts(2))
    graphs = dict(fast.model._graphs)
    run(fast, prompts(2))
    assert fast.model._graphs == graphs
    weight = deep.model.norm.weight
    moved, fine = weight.data.clone(), weight.data.bfloat16()  # the latter in half of the place
    monkeypatch.setattr(weight, "data", moved)
    assert compiled(fast) is fast and not fast.model._graphs
    fast.model._graphs = graphs
    weight.data = moved.view(torch.bfloat16)[: len(fine)]
    assert weight.data_ptr() == moved.data_ptr()
    assert not compiled(fast).model._graphs


def test_new_graphs_for_moved_buffers(prompts, run):
    """Those of quantised layers, such as scales, move apart from the weights."""
    model = tiny_model(1)
    model.model.layers[0].mlp.register_buffer("scales", torch.ones(4))
    fast = CompiledDenoiser(model, capture=False)
    run(fast, prompts(1), max_new_tokens=4, steps=1)
    assert compiled(fast).model._graphs
    model.model.layers[0].mlp.scales = model.model.layers[0].mlp.scales.clone()
    assert not compiled(fast).model._graphs


def test_new_graphs_for_merged_adapters(prompts, run):
    """Graphs hold the adapters' products, which would be added all the same."""
    model = tiny_model(1)
    add_lora(model, LoraParams(rank=2, targets=["q_proj"]), generator=torch.Generator().manual_seed(0))
    fast = CompiledDenoiser(model, capture=False)
    run(fast, prompts(1), max_new_tokens=4, steps=1)
    assert compiled(fast).model._graphs
    merge_lora(model)
    assert not compiled(fast).model._graphs


def test_buffers_serve_inside_and_outside_of_inference_mode(deep, prompts, run):
    """Lightning validates in inference mode; a script after it need not."""
    fast, way = CompiledDenoiser(deep, capture=False), {"block_length": 8, "cache": "dual"}
    with torch.inference_mode():
        inside = run(fast, prompts(2), **way).sequences
    assert torch.equal(run(fast, prompts(2), **way).sequences, inside)


def test_two_generations_at_a_time_do_not_share_a_cache_unnoticed(deep, prompts):
    fast, blocks = CompiledDenoiser(deep, capture=False), {"block_length": 8, "cache": "dual"}

    def by_turns(model, **options):
        params = SamplingParams(max_new_tokens=16, steps=16, forbid_mask=True, **options)
        runs = [denoising_steps(model, prompts(2, seed=seed), params=params) for seed in (0, 1)]
        return [torch.cat(states) for states in zip(*runs, strict=True)][-1]

    assert torch.equal(by_turns(fast), by_turns(deep))
    by_turns(deep, **blocks)  # every generation has a cache of its own
    with pytest.raises(ValueError, match="another generation by this compiled model has begun"):
        by_turns(fast, **blocks)


def test_caches_of_other_shapes_go_in_time(deep, prompts, run):
    """A stream of prompts of many lengths would fill a GPU, where one cache at a time is at work."""
    fast, blocks = CompiledDenoiser(deep, capture=False), {"block_length": 8, "cache": "dual"}
    for rows, length in ((8, 20), (4, 40), (2, 60), (8, 80), (1, 100), (8, 20)):
        ids = prompts(rows, length)
        assert torch.equal(run(fast, ids, **blocks).sequences, run(deep, ids, **blocks).sequences)
        sizes = [rows * columns for rows, columns in fast.model._caches]
        assert sum(sizes) <= 2 * max(sizes)
        assert {id(g.cache) for g in fast.model._graphs.values()} == {id(c) for c in fast.model._caches.values()}
    fast.model._forget()
    shapes = [(8, 64), (4, 64), (2, 64), (1, 64)]
    caches = [fast.model.new_cache(*shape) for shape in shapes]  # of a batch that is let go row by row
    assert all(fast.model.new_cache(*shape) is cache for shape, cache in zip(shapes, caches, strict=True))
    assert fast.model.new_cache(4, 128) not in caches and (8, 64) not in fast.model._caches


def test_it_may_take_the_models_place(prompts, run):
    model = CompiledDenoiser(tiny_model(1), capture=False)
    assert torch.equal(run(model, prompts(2)).sequences, run(tiny_model(1), prompts(2)).sequences)


def test_a_new_head_is_seen(prompts, run):
    model = tiny_model(1)
    fast = CompiledDenoiser(model, capture=False)
    before = run(fast, prompts(2)).sequences
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    assert torch.equal(run(fast, prompts(2)).sequences, run(model, prompts(2)).sequences)
    assert not torch.equal(run(fast, prompts(2)).sequences, before)


def test_hooks_do_not_see_what_pads_the_batch(deep, prompts, run):
    for name in ("logits_hook", "tokens_hook"):
        for model, options in ((CompiledDenoiser(deep, capture=False), {}), (deep, {"compile": True})):
            with pytest.raises(ValueError, match="leave out compile, and pass the model itself"):
                run(model, prompts(3), **options, **{name: lambda *a: a[-1]})


def test_a_cpu_is_refused(deep, prompts, run, monkeypatch):
    """Later, too: a graph captured of a model that has left the GPU would be empty, and its result an old one."""
    with pytest.raises(ValueError, match="the model is on cpu, CUDA graphs need one GPU"):
        run(deep, prompts(1), compile=True)
    fast, weight = CompiledDenoiser(deep, capture=False), deep.model.norm.weight
    fast.model._capture = True
    monkeypatch.setattr(weight, "data", weight.data.clone())
    for _ in range(2):
        with pytest.raises(ValueError, match="the model is on cpu"):
            run(fast, prompts(1))


def test_several_devices_are_refused():
    model = tiny_model(1)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match="the model is on cpu, meta, CUDA graphs need one GPU: set compile to False"):
        CompiledDenoiser(model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_model_on_another_gpu(prompts, run):
    for device in ("cuda:0", "cuda:1"):
        model, ids = tiny_model(1).to(device), prompts(2).to(device)
        assert torch.equal(run(model, ids).sequences, run(model, ids, compile=True).sequences)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
        deep.to("cpu")


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_many_tokens_in_half_precision():
    """On Hopper gate and up are one kernel then."""
    model = tiny_model(3).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 50, (32, 64), device="cuda")
    exact = copy.deepcopy(model).double().model(ids)
    errors = [(hidden - exact).abs().max() for hidden in (CompiledDenoiser(model).model(ids), model.model(ids))]
    assert errors[0] <= 1.5 * errors[1], errors
