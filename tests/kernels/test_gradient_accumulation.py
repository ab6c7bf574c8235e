"""Gradients of bfloat16 weights, summed where they are made."""

import copy

import lightning as L
import pytest
import torch
from material import quiet_trainer

from dream_lightning import DreamConfig, DreamModel, DreamModule, S1KDataModule
from dream_lightning.adapters import accumulate_by_autograd, accumulate_in_products, train_in_float8, zero_gradients
from dream_lightning.training.optimizer import PagedAdamW8bit


def model(dtype=torch.bfloat16, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    ids = {"mask_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 0}
    return DreamModel(DreamConfig(vocab_size=64, num_key_value_heads=2, **sizes, **ids)).to(dtype).train()


def micro_batches(number=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (2, 9 + i), generator=generator) for i in range(number)]


def summed(dream, batches):
    for ids in batches:
        dream(ids).logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in dream.named_parameters() if p.grad is not None}


def distance(some, exact):
    return {n: float((some[n].float() - exact[n].float()).norm() / exact[n].float().norm()) for n in exact}


def exact_sums(dream, batches):
    """Of every linear weight: Σ gᵀ x in float64, from what the layers saw."""
    sums = {}

    def listen(name, linear):
        def heard(module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).double()

            def add(g):
                sums[name] = sums.get(name, 0) + g.flatten(0, -2).double().t() @ x

            output.register_hook(add)

        return linear.register_forward_hook(heard)

    hooks = [listen(f"{n}.weight", m) for n, m in dream.model.named_modules(prefix="model") if n.endswith("proj")]
    summed(dream, batches)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("way", ["plain", "compiled", "checkpointed", "float8"])
def test_sums_are_those_of_autograd_and_nearer_to_the_exact_ones(way):
    plain = model()
    if way == "float8":
        train_in_float8(plain, torch.device("cpu"))
    ours = copy.deepcopy(plain) if way != "float8" else model()
    if way == "float8":
        train_in_float8(ours, torch.device("cpu"))
    accumulate_in_products(ours)
    if way == "compiled":
        for layer in ours.model.layers:
            layer.compile(backend="aot_eager")
    if way == "checkpointed":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    batches = micro_batches(6)
    by_autograd, by_products = summed(plain, batches), summed(ours, batches)
    assert by_products.keys() == by_autograd.keys()
    exact = exact_sums(plain, batches)
    theirs, mine = distance(by_autograd, exact), distance(by_products, exact)
    assert len(exact) == 14 and max(mine.values()) < 2**-8
    assert all(mine[name] < theirs[name] for name in exact)
    others = {name: g for name, g in by_autograd.items() if name not in exact}
    assert max(distance(by_products, others).values()) < 0.02
    torch._dynamo.reset()


def test_a_sum_begins_at_zero_also_between_forward_and_backward():
    """Lightning zeroes there."""
    dream, (ids, *_) = model(), micro_batches(1)
    accumulate_in_products(dream)
    first = summed(dream, [ids])
    loss = dream(ids).logits.float().square().mean()
    zero_gradients(dream.parameters())
    loss.backward()
    assert all(torch.equal(p.grad, first[n]) for n, p in dream.named_parameters() if p.grad is not None)


def test_evaluation_and_files_know_nothing_of_it():
    plain, ours, (ids, *_) = model(), model(), micro_batches(1)
    accumulate_in_products(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(plain.eval()(ids).logits, ours.eval()(ids).logits)
    with torch.no_grad():
        assert torch.equal(plain.train()(ids).logits, ours.train()(ids).logits)


def test_afterwards_it_trains_in_any_loop():
    dream, (ids, *_) = model(), micro_batches(1)
    expected = summed(copy.deepcopy(dream), [ids])
    accumulate_in_products(dream)
    summed(dream, [ids])
    accumulate_by_autograd(dream)
    assert not any("forward" in vars(m) or "gradient_sum" in m._buffers for m in dream.modules())
    dream.zero_grad()
    assert all(torch.equal(g, expected[n]) for n, g in summed(dream, [ids]).items())


class Seen(L.Callback):
    """The gradients of every step, and whether a layer made its sum itself."""

    def __init__(self):
        self.gradients, self.in_products = [], set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.in_products.add(hasattr(pl_module.model.model.layers[0].mlp.up_proj, "gradient_sum"))


@pytest.fixture
def fit(sums, tmp_path):
    pytest.importorskip("bitsandbytes")

    def run(accumulate, batch_size, dtype="bfloat16"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        module = DreamModule(
            new_model=sizes, tokenizer="bytes", dtype=dtype, optimizer=lambda groups: PagedAdamW8bit(groups, lr=1e-3)
        )
        rows = S1KDataModule(
            str(sums), tokenizer=module.tokenizer, batch_size=batch_size, cache_dir=str(tmp_path / "cache")
        )
        seen = Seen()
        trainer = quiet_trainer(
            default_root_dir=tmp_path,
            callbacks=[seen],
            max_steps=3,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
        )
        trainer.fit(module, rows)
        return seen, module

    return run


def test_in_a_fit_four_micro_batches_are_one_batch(fit):
    (four, module), (one, _) = fit(4, 2), fit(1, 8)
    assert four.in_products == {True} and one.in_products == {False}
    for ours, theirs in zip(four.gradients, one.gradients, strict=True):
        assert max(distance(ours, theirs).values()) < 0.02
    assert not hasattr(module.model.model.layers[0].mlp.up_proj, "gradient_sum")


def test_float32_weights_are_left_to_autograd(fit):
    seen, _ = fit(2, 2, dtype="float32")
    assert seen.in_products == {False}


@pytest.mark.parametrize(("strategy", "in_products"), [("auto", True), ("ddp", False), ("fsdp2", False)])
def test_weights_with_hooks_are_left_to_autograd(strategy, in_products):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = DreamModule(new_model=sizes, tokenizer="bytes", dtype="bfloat16")
    module.model = model()
    module.trainer = quiet_trainer(strategy=strategy, devices=1, accumulate_grad_batches=2)
    module._set_accumulation()
    assert hasattr(module.model.model.layers[0].mlp.up_proj, "gradient_sum") == in_products
