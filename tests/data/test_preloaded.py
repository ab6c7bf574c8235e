"""Batches made on the device are those that collation makes on the host."""

from dataclasses import fields

import pytest
import torch
from material import addition_rows, tiny_data, tiny_module, write_jsonl

from dream_lightning.errors import UserError
from dream_lightning.training.compiled_step import CompiledStep


def batches(folder, preload: bool, start_row: int = 0, **options):
    """Two epochs, resumed at a row of the first."""
    rows = write_jsonl(folder / "rows.jsonl", addition_rows(23))
    data = tiny_data(
        rows, folder, validation_source=str(rows), preload=preload, **{"eos_fill_to": 96, "max_length": 96, **options}
    )
    data.setup("fit")
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "rows": start_row, "rows_per_epoch": 23, "seed": 0})
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("start_row, options", [(0, {}), (8, {}), (0, {"extra_weight": {"</think>": 2.0}, "seed": 3})])
def test_batches_are_those_of_collation(start_row, options, tmp_path):
    pairs = list(zip(*(batches(tmp_path, preload, start_row, **options) for preload in (True, False)), strict=True))
    assert len(pairs) == 12 - start_row // 4
    for fast, slow in pairs:
        for field in fields(slow):
            a, b = getattr(fast, field.name), getattr(slow, field.name)
            assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else a == b, field.name


def test_what_it_excludes(tmp_path):
    with pytest.raises(UserError, match=r"data.preload needs documents of one length.*eos_fill_to"):
        list(batches(tmp_path, True, eos_fill_to=None))
    for name, value in {"packing": True, "batch_cutoff": True, "num_workers": 1, "streaming": True}.items():
        with pytest.raises(UserError, match=f"(preload and {name}|{name} and preload) exclude each other"):
            next(batches(tmp_path, True, **{name: value}))


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "linear", "focal_gamma": 1.0, "normalizer": "masked"},
        {"weighting": "cart", "treat_eos_as_one": True, "complementary_masks": True},
        {"causal": True, "normalizer": "micro_batch"},
    ],
    ids=str,
)
def test_a_step_traced_as_a_whole_is_the_ordinary_one(options, tmp_path):
    """In one graph, with the head at all positions."""
    module = tiny_module(**options)
    module.configure_model()
    batch = next(iter(batches(tmp_path, True)))
    module.compiled_step = CompiledStep(module, backend="eager", fullgraph=True)
    results = []
    for step in (module.noised_loss, module.compiled_step):
        _, noised, nll, terms = step(batch)
        gradients = torch.autograd.grad(terms.mean, list(module.model.parameters()))
        results.append([noised.x_t, nll, terms.sum, terms.count, *gradients])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
