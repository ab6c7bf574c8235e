"""Training, validation and prediction through Lightning; that a step does not depend on its cut: test_invariance."""

import math
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from material import SIZES, Recorder, logged, short_trainer, tiny_data, tiny_module

from dream_lightning import DreamModule


def run(source, tmp_path, *, model=None, batch_size=4, accumulate=1, max_steps=6, **options):
    recorder = Recorder()
    fit = short_trainer(tmp_path, recorder, max_steps=max_steps, accumulate_grad_batches=accumulate)
    fit.fit(model or tiny_module(), tiny_data(source, tmp_path, batch_size=batch_size, **options))
    return recorder


def validate(source, tmp_path, model, **options):
    rows = tiny_data(source, tmp_path, **options)
    return short_trainer(tmp_path, limit_val_batches=1.0).validate(model, rows, verbose=False)[0]


# (options of the module, options of the data), first what others are compared with
BASELINES = [({}, {}), ({"weighting": "cart"}, {}), ({"focal_gamma": 2.0}, {}), ({}, {"eos_fill_to": 60})]
CHANGES = [
    *BASELINES[1:], ({"weighting": "linear"}, {}), ({"weighting": "cart", "cart_p": 0.8}, {}),
    ({"weighting": "none"}, {}), ({"normalizer": "masked"}, {}), ({"focal_gamma": 2.0, "focal_alpha": 1.0}, {}),
    ({"stratified_t": False}, {}), ({"complementary_masks": True}, {}), ({"seed": 1}, {}),
    ({"treat_eos_as_one": True}, {"eos_fill_to": 60}), ({}, {"batch_cutoff": True}),
    ({}, {"extra_weight": {"carry": 3.0}}), ({}, {"seed": 1}), ({}, {"thinking": False}), ({}, {"style": "plain"}),
    ({}, {"system_prompt": "Add."}),
]  # fmt: skip


def test_every_option_changes_the_loss(sums, tmp_path):
    cases = [BASELINES[0], *CHANGES]
    losses = {str(c): run(sums, tmp_path, model=tiny_module(**c[0]), max_steps=1, **c[1]).losses[0] for c in cases}
    assert len(set(losses.values())) == len(cases), losses


def test_the_authors_normalizer_depends_on_the_micro_batches(sums, tmp_path):
    one, cut = (
        run(sums, tmp_path, model=tiny_module(normalizer="micro_batch"), batch_size=n, accumulate=8 // n, max_steps=1)
        for n in (8, 1)
    )
    assert abs(one.losses[0] - cut.losses[0]) > 1e-3


@pytest.mark.parametrize(("workers", "end"), [(0, {"max_steps": 20}), (2, {"max_steps": 20}), (0, {"max_epochs": 2})])
def test_resuming_in_the_middle_of_an_epoch_gives_the_same_losses(sums, tmp_path, workers, end):
    """9 steps an epoch: stopped inside the first, at its end, inside the second."""

    def losses(*callbacks, **resume):
        recorder, trainer = Recorder(), {"max_steps": -1} | end
        data = tiny_data(sums, tmp_path, num_workers=workers)
        short_trainer(tmp_path, recorder, *callbacks, **trainer).fit(tiny_module(), data, **resume)
        return recorder.losses

    whole = losses(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    for step in (5, 9, 13):
        assert losses(ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True) == whole[step:]


def test_validation_of_what_has_learned_is_the_same_every_time_and_for_any_batch_size(sums, tmp_path):
    model = tiny_module()
    losses = run(sums, tmp_path, model=model, max_steps=60, batch_size=8).losses
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])  # an untrained model answers by rounding errors
    first = validate(sums, tmp_path, model)
    assert validate(sums, tmp_path, model) == first
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"packing": True, "max_length": 256}):
        other = validate(sums, tmp_path, model, **options)
        assert other["val/accuracy"] == first["val/accuracy"]
        assert other["val/nll"] == pytest.approx(first["val/nll"], rel=1e-5)


def test_validation_noise_does_not_depend_on_the_objective(sums, tmp_path):
    """So that the bounds of two runs compare."""
    options = {"validation_questions": 0, "eos_fill_to": 60}
    others = {"treat_eos_as_one": True, "stratified_t": False, "complementary_masks": True, "weighting": "cart"}
    ours, theirs = (validate(sums, tmp_path, tiny_module(**kind), **options)["val/nll"] for kind in ({}, others))
    assert ours == theirs


def test_more_validation_draws_change_the_estimate(sums, tmp_path):
    one, many = (
        validate(sums, tmp_path, tiny_module(), validation_draws=n, validation_questions=0)["val/nll"] for n in (1, 8)
    )
    assert one != many
    assert one == pytest.approx(many, rel=0.5)  # both estimate the same bound, about ln 263 at initialization


def test_a_bound_that_is_not_finite_is_not_left_out(sums, tmp_path):
    class HalfBroken(DreamModule):
        def masked_nll(self, batch, noised):
            nll = super().masked_nll(batch, noised)
            return nll * float("nan") if int(batch.sample_ids.max()) < 4 else nll  # the first batch only

    assert math.isnan(validate(sums, tmp_path, tiny_module(HalfBroken), validation_questions=0)["val/nll"])


def test_one_data_module_serves_one_stage_after_the_other(sums, tmp_path):
    model, source = tiny_module(), tiny_data(sums, tmp_path)
    validated = short_trainer(tmp_path, limit_val_batches=1.0).validate(model, source, verbose=False)
    short_trainer(tmp_path, max_steps=2, limit_val_batches=1.0, val_check_interval=2).fit(model, source)
    tested = short_trainer(tmp_path).test(model, source, verbose=False)
    answers = short_trainer(tmp_path).predict(model, source)
    assert tested[0]["test/nll"] < validated[0]["val/nll"]
    assert sum(len(batch.predictions) for batch in answers) == 4


def test_everything_is_logged(sums, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit = short_trainer(tmp_path, max_steps=12, limit_val_batches=1.0, log_every_n_steps=1, logger=logger)
    fit.fit(tiny_module(), tiny_data(sums, tmp_path))
    assert {name for name, _ in logged(tmp_path)} == {
        *("train/loss", "train/masked_fraction", "train/lr", "train/gradient_norm", "epoch"),
        *(f"train/nll_t_quartile_{n}" for n in (1, 2, 3, 4)),
        *("val/nll", "val/scored", "val/accuracy", "val/unparsed", "val/tokens_per_forward"),
    }


def test_a_quartile_without_tokens_does_not_repeat_its_last_value(sums, tmp_path):
    """One document a step has one t."""
    fit = short_trainer(tmp_path, max_steps=8, log_every_n_steps=1, logger=TensorBoardLogger(tmp_path))
    fit.fit(tiny_module(), tiny_data(sums, tmp_path, batch_size=1))
    found = logged(tmp_path)
    rows = [[found[f"train/nll_t_quartile_{n}", step] != {"nan"} for n in (1, 2, 3, 4)] for step in range(8)]
    assert all(sum(row) == 1 for row in rows) and len({row.index(True) for row in rows}) > 1


def test_a_step_with_nothing_masked_has_no_loss_and_no_gradient(sums, tmp_path):
    model = tiny_module()
    model.noise = lambda batch, **options: DreamModule.noise(
        model, replace(batch, maskable=torch.zeros_like(batch.maskable)), **options
    )
    recorder = run(sums, tmp_path, model=model, max_steps=2)
    assert recorder.losses == recorder.norms == [0, 0]


class OwnHooks(DreamModule):
    """Overrides what Lightning users override, as its documentation does, without super()."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen = outputs["loss"]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad()


class Norms(L.Callback):
    """The norm of the gradients in hooks of callbacks, and the losses that they get."""

    def __init__(self):
        self.seen, self.outputs = [], []

    def on_after_backward(self, trainer, pl_module):
        self.seen.append(float(grad_norm(pl_module, norm_type=2)["grad_2.0_norm_total"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(float(outputs["loss"]))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_see_the_loss_and_final_gradients_and_may_be_overridden(sums, tmp_path, accumulate):
    """With accumulation `outputs["loss"]` is divided by the number of micro-batches, as Lightning documents."""
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulate, "max_steps": 3}
    plain, norms, steps, own_steps = tiny_module(normalizer="micro_batch"), Norms(), Recorder(), Norms()
    short_trainer(tmp_path, norms, steps, **options).fit(plain, tiny_data(sums, tmp_path))
    last = norms.seen[accumulate - 1 :: accumulate + 1], norms.seen[accumulate :: accumulate + 1]
    assert last[0] == last[1] == pytest.approx(steps.norms, rel=1e-6) and max(steps.norms) > 0.5
    outputs = [sum(norms.outputs[i : i + accumulate]) for i in range(0, 3 * accumulate, accumulate)]
    assert outputs == pytest.approx(steps.losses, rel=1e-6)

    own = tiny_module(OwnHooks, normalizer="micro_batch")
    theirs = SpikeDetection(exclude_batches_path=tmp_path / "skip.json"), GradientAccumulationScheduler({0: accumulate})
    trainer = short_trainer(tmp_path, *theirs, own_steps, **options | {"accumulate_grad_batches": 1})
    trainer.fit(own, tiny_data(sums, tmp_path))
    assert own_steps.outputs == norms.outputs and own_steps.seen == norms.seen
    metrics = trainer.callback_metrics
    assert metrics["train/loss"] == steps.losses[-1] and metrics["grad_2.0_norm_total"] == norms.seen[-1]
    assert all(map(torch.equal, plain.parameters(), own.parameters()))


class AddsToTheLoss(DreamModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1


class NeverDivides(DreamModule):
    def backward(self, loss):
        loss.backward()


class NeverStarts(DreamModule):
    def on_train_start(self):
        pass


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (AddsToTheLoss, "training_step changes the loss .* override `loss` instead"),
        (NeverDivides, r"must call super\(\).backward"),
        (NeverStarts, r"NeverStarts.on_train_start must call super\(\)"),
    ],
)
def test_what_would_switch_off_the_division_is_refused(sums, tmp_path, kind, words):
    with pytest.raises(ValueError, match=words):
        short_trainer(tmp_path).fit(tiny_module(kind), tiny_data(sums, tmp_path))


class Mean(DreamModule):
    """An ordinary step, whose loss is a mean already."""

    def training_step(self, batch, batch_idx):
        batch, noised = self.training_noise(batch)
        return self.loss(batch, noised, self.masked_nll(batch, noised)).mean


class Outer(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = tiny_module()
        self.inner.configure_model()

    def training_step(self, batch, batch_idx):
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def test_a_step_outside_of_its_own_trainer_is_a_plain_mean(sums, tmp_path):
    """A training_step of its own, another LightningModule, and Fabric: the gradients of a step of one micro-batch."""
    seen = []
    for kind in (tiny_module, partial(tiny_module, Mean), Outer):
        seen.append(Norms())
        short_trainer(tmp_path, seen[-1], max_steps=1).fit(kind(), tiny_data(sums, tmp_path))
    data, fabric = tiny_data(sums, tmp_path), L.Fabric(accelerator="cpu", devices=1)
    data.setup("fit")
    batch, module = next(iter(data.train_dataloader())), tiny_module()
    with pytest.raises(ValueError, match=r"call DreamModule.configure_model\(\) first"):
        module.training_step(batch, 0)
    module.configure_model()
    module, _ = fabric.setup(module, torch.optim.SGD(module.parameters()))
    with pytest.warns(UserWarning, match="outside of its own Trainer"):
        loss = module.training_step(batch, 0)
    fabric.backward(loss)
    assert [*(s.outputs[0] for s in seen), loss.item()] == pytest.approx([seen[0].outputs[0]] * 4, rel=1e-6)
    norms = [*(s.seen[0] for s in seen), float(grad_norm(module, norm_type=2)["grad_2.0_norm_total"])]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)


NEW = {"new_model": {}, "tokenizer": "bytes"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of them"), ({"pretrained": "x", "new_model": {}}, "exactly one of them"),
        ({"new_model": {}}, "needs a tokenizer"), (NEW | {"cart_p": 2.0}, r"cart_p is 2\.0"),
        (NEW | {"focal_alpha": -1.0}, r"focal_alpha is -1\.0"), (NEW | {"focal_gamma": -1.0}, r"focal_gamma -1\.0"),
        (NEW | {"warmup_fraction": 2.0}, r"warmup_fraction is 2\.0"),
        (NEW | {"gradient_checkpointing": -1}, "gradient_checkpointing is -1"),
        (NEW | {"new_model": SIZES | {"hidden_dim": 3}}, "new_model has hidden_dim"),
        (NEW | {"new_model": SIZES | {"vocab_size": 262}}, r"263 tokens and mask token .* the model 262"),
        (NEW, "lacks hidden_size, intermediate_size"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DreamModule(**options).configure_model()
