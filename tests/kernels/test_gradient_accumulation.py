"""Gradients of bfloat16 weights accumulated in place."""

import copy

import lightning as L
import pytest
import torch
from material import fit_on, quiet_trainer, random_dream, tiny_module

from dream_lightning.adapters import train_in_float8
from dream_lightning.kernels.gradient_accumulation import (
    AccumulatingLinear,
    accumulate_by_autograd,
    accumulate_in_place,
)
from dream_lightning.training.optimizer import AdamW8bit, zero_gradients

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def model(*, float8=False):
    dream = random_dream().bfloat16().train()
    if float8:
        train_in_float8(dream, torch.device("cpu"))
    return dream


def accumulates(dream) -> bool:
    return any(isinstance(module, AccumulatingLinear) for module in dream.modules())


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
    """Of every linear weight: Σ gᵀ x in float64, from the inputs and output gradients of the layers."""
    sums = {}

    def listen(name, linear):
        def record(module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).double()
            output.register_hook(lambda g: sums.update({name: sums.get(name, 0) + g.flatten(0, -2).double().t() @ x}))

        linear.register_forward_hook(record)

    dream = copy.deepcopy(dream)
    for name, linear in dream.model.named_modules(prefix="model"):
        if name.endswith("proj"):
            listen(f"{name}.weight", linear)
    summed(dream, batches)
    return sums


@pytest.mark.parametrize("way", ["plain", "compiled", "checkpointed", "float8"])
def test_sums_are_those_of_autograd_and_nearer_to_the_exact_ones(way):
    plain, ours = model(float8=way == "float8"), model(float8=way == "float8")
    accumulate_in_place(ours)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    if way == "compiled":
        for layer in ours.model.layers:
            layer.compile(backend=counter, fullgraph=True)
    if way == "checkpointed":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    batches = micro_batches(6)
    exact, by_autograd, in_place = exact_sums(plain, batches), summed(plain, batches), summed(ours, batches)
    assert counter.frame_count == (2 if way == "compiled" else 0)  # of all layers: for one length, and for all lengths
    assert in_place.keys() == by_autograd.keys()
    theirs, mine = distance(by_autograd, exact), distance(in_place, exact)
    assert len(exact) == 14 and max(mine.values()) < 2**-8
    assert all(mine[name] < theirs[name] for name in exact)
    others = {name: g for name, g in by_autograd.items() if name not in exact}
    assert max(distance(in_place, others).values()) < 0.02


def test_a_sum_begins_at_zero_also_between_forward_and_backward():
    """Lightning calls zero_grad there."""
    dream, (ids, *_) = model(), micro_batches(1)
    accumulate_in_place(dream)
    first = summed(dream, [ids])
    loss = dream(ids).logits.float().square().mean()
    zero_gradients(dream.parameters())
    loss.backward()
    assert all(torch.equal(p.grad, first[n]) for n, p in dream.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("float8", [False, True])
def test_parameters_evaluation_and_files_stay_and_afterwards_it_trains_in_any_loop(float8):
    plain, ours, (ids, *_) = model(float8=float8), model(float8=float8), micro_batches(1)
    parameters, kinds = {name: id(p) for name, p in ours.named_parameters()}, [type(m) for m in ours.modules()]
    accumulate_in_place(ours)
    assert {name: id(p) for name, p in ours.named_parameters()} == parameters
    assert type(ours.lm_head) is torch.nn.Linear
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(plain.eval()(ids).logits, ours.eval()(ids).logits)
    with torch.no_grad():
        assert torch.equal(plain.train()(ids).logits, ours.train()(ids).logits)
    summed(ours, [ids])
    accumulate_by_autograd(ours)
    assert [type(m) for m in ours.modules()] == kinds
    ours.zero_grad()
    expected = summed(plain, [ids])
    assert all(torch.equal(g, expected[n]) for n, g in summed(ours, [ids]).items())


class Seen(L.Callback):
    """The gradients of every step, and whether layers accumulated them in place."""

    def __init__(self):
        self.gradients, self.in_place = [], set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.in_place.add(accumulates(pl_module.model))


def new_module(dtype="bfloat16"):
    return tiny_module(dtype=dtype, optimizer=lambda groups: AdamW8bit(groups, lr=1e-3))


def fit(rows, module, accumulate, batch_size):
    seen, options = Seen(), {"accumulate_grad_batches": accumulate, "batch_size": batch_size}
    fit_on(rows, module, precision="32-true", max_steps=3, callbacks=[seen], **options)
    return seen


def test_in_a_fit_four_micro_batches_are_one_batch_and_float32_is_left_to_autograd(sums):
    module = new_module()
    four, one = fit(sums, module, 4, 2), fit(sums, new_module(), 1, 8)
    assert four.in_place == {True} and one.in_place == {False}
    for ours, theirs in zip(four.gradients, one.gradients, strict=True):
        assert max(distance(ours, theirs).values()) < 0.02
    assert not accumulates(module.model)
    assert fit(sums, new_module("float32"), 2, 2).in_place == {False}


@pytest.mark.parametrize(("strategy", "in_place"), [("auto", True), ("ddp", False), ("fsdp2", False)])
def test_weights_with_hooks_are_left_to_autograd(strategy, in_place):
    module = new_module()
    module.model = model()
    module.trainer = quiet_trainer(strategy=strategy, devices=1, accumulate_grad_batches=2)
    module._set_accumulation()
    assert accumulates(module.model) == in_place
