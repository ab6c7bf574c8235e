"""Training, validation and prediction through Lightning; that a step does not depend on its cut: test_invariance."""

import json
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from material import SIZES
from torch.utils._python_dispatch import TorchDispatchMode

from dream_lightning import DreamModule, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.batch import Batch
from dream_lightning.predict import PredictionWriter


class Recorder(L.Callback):
    """Keeps what is logged and the gradients of every optimiser step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten().clone() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.gradients.append(torch.cat(gradients))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def module(kind=DreamModule, **options):
    torch.manual_seed(0)
    options = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=3e-3)} | options
    sampling = SamplingParams(max_new_tokens=24, steps=8, forbid_mask=True)
    return kind(new_model=SIZES, tokenizer="bytes", sampling=sampling, **options)


def data(source, tmp_path, **options):
    options = {"validation_questions": 3, "cache_dir": str(tmp_path / "cache"), "batch_size": 4} | options
    return S1KDataModule(str(source), tokenizer=load_tokenizer("bytes"), **options)


def trainer(tmp_path, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_steps": 6,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | options))


def run(source, tmp_path, *, model=None, batch_size=4, accumulate=1, max_steps=6, **options):
    recorder = Recorder()
    L.seed_everything(0, verbose=False)
    fit = trainer(tmp_path, recorder, max_steps=max_steps, accumulate_grad_batches=accumulate)
    fit.fit(model or module(), data(source, tmp_path, batch_size=batch_size, **options))
    return recorder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A file of sums and a folder, for the whole module."""
    from material import addition_rows, write_jsonl

    folder = tmp_path_factory.mktemp("reference")
    source = write_jsonl(folder / "sums.jsonl", addition_rows(40))
    return source, folder


@pytest.mark.parametrize(
    ("model_options", "data_options"),
    [
        ({"weighting": "linear"}, {}),
        ({"weighting": "cart"}, {}),
        ({"weighting": "cart", "cart_p": 0.8}, {}),
        ({"weighting": "none"}, {}),
        ({"normalizer": "masked"}, {}),
        ({"focal_gamma": 2.0}, {}),
        ({"focal_gamma": 2.0, "focal_alpha": 1.0}, {}),
        ({"stratified_t": False}, {}),
        ({"complementary_masks": True}, {}),
        ({"t_min": 0.5}, {}),
        ({"seed": 1}, {}),
        ({"treat_eos_as_one": True}, {"eos_fill_to": 60}),
        ({}, {"eos_fill_to": 60}),
        ({}, {"batch_cutoff": True}),
        ({}, {"extra_weight": {"carry": 3.0}}),
        ({}, {"seed": 1}),
        ({}, {"thinking": False}),
        ({}, {"style": "plain"}),
        ({}, {"system_prompt": "Add."}),
    ],
)
def test_every_option_changes_the_loss(reference, model_options, data_options):
    source, folder = reference
    cases = [({}, {}), ({"weighting": "cart"}, {}), ({"focal_gamma": 2.0}, {}), ({}, {"eos_fill_to": 60})]
    losses = {str(case): run(source, folder, model=module(**case[0]), max_steps=1, **case[1]).losses for case in cases}
    losses.pop(str((model_options, data_options)), None)
    ours = run(source, folder, model=module(**model_options), max_steps=1, **data_options).losses
    assert ours not in losses.values()


def test_the_authors_normaliser_does_depend_on_it(reference):
    source, folder = reference
    one = run(source, folder, model=module(normalizer="micro_batch"), batch_size=8, max_steps=1)
    cut = run(source, folder, model=module(normalizer="micro_batch"), batch_size=1, accumulate=8, max_steps=1)
    assert abs(one.losses[0] - cut.losses[0]) > 1e-3


@pytest.mark.parametrize("stop_after", [5, 9, 13])
@pytest.mark.parametrize(("workers", "end"), [(0, {"max_steps": 20}), (2, {"max_steps": 20}), (0, {"max_epochs": 2})])
def test_resuming_in_the_middle_of_an_epoch_gives_the_same_losses(sums, tmp_path, stop_after, workers, end):
    """9 steps an epoch: stopped inside the first, at its end, inside the second."""
    end = {"max_steps": -1} | end
    whole = Recorder()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
    trainer(tmp_path, whole, checkpoint, **end).fit(module(), data(sums, tmp_path, num_workers=workers))
    resumed = Recorder()
    trainer(tmp_path, resumed, **end).fit(
        module(),
        data(sums, tmp_path, num_workers=workers),
        ckpt_path=tmp_path / f"step={stop_after}.ckpt",
        weights_only=True,
    )
    assert resumed.losses == whole.losses[stop_after:]


@pytest.mark.parametrize("optimizers", [("AdamW", "SGD"), ("SGD", "AdamW"), ("Adam", "AdamW")])
def test_another_optimiser_than_the_checkpoints_is_refused(sums, tmp_path, optimizers):
    def using(name):
        return module(optimizer=lambda groups: getattr(torch.optim, name)(groups, lr=1e-3))

    first, second = optimizers
    trained = trainer(tmp_path, max_steps=1)
    trained.fit(using(first), data(sums, tmp_path))
    trained.save_checkpoint(tmp_path / "one.ckpt")
    resume = {"ckpt_path": tmp_path / "one.ckpt", "weights_only": True}
    with pytest.raises(ValueError, match=f"states of {first} and model.optimizer is {second}"):
        trainer(tmp_path, max_steps=2).fit(using(second), data(sums, tmp_path), **resume)
    validation, other = trainer(tmp_path, limit_val_batches=1), using(second)
    assert validation.validate(other, data(sums, tmp_path), verbose=False, **resume)
    trainer(tmp_path, max_steps=1).fit(other, data(sums, tmp_path))  # which begins anew, from the weights it has


def test_validation_is_the_same_every_time_and_for_any_batch_size(sums, tmp_path):
    model = module()
    run(sums, tmp_path, model=model, max_steps=60, batch_size=8)  # an untrained model answers by rounding errors

    def validate(**options):
        validation = trainer(tmp_path, limit_val_batches=1.0)
        return validation.validate(model, data(sums, tmp_path, **options), verbose=False)[0]

    first = validate()
    assert validate() == first
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"packing": True, "max_length": 256}):
        other = validate(**options)
        assert other["val/accuracy"] == first["val/accuracy"]
        assert other["val/nll"] == pytest.approx(first["val/nll"], rel=1e-5)


def test_validation_noise_does_not_follow_the_objective(sums, tmp_path):
    """So that the bounds of two runs compare."""

    def bound(**options):
        source = data(sums, tmp_path, validation_questions=0, eos_fill_to=60)
        return trainer(tmp_path, limit_val_batches=1.0).validate(module(**options), source, verbose=False)[0]["val/nll"]

    others = {"treat_eos_as_one": True, "stratified_t": False, "complementary_masks": True, "weighting": "cart"}
    assert bound() == bound(**others)


def test_a_bound_that_is_not_finite_is_not_left_out(sums, tmp_path):
    class HalfBroken(DreamModule):
        def masked_nll(self, batch, noised):
            nll = super().masked_nll(batch, noised)
            return nll * float("nan") if int(batch.sample_ids.max()) < 4 else nll  # the first batch only

    source = data(sums, tmp_path, validation_questions=0)
    scores = trainer(tmp_path, limit_val_batches=1.0).validate(module(HalfBroken), source, verbose=False)
    assert math.isnan(scores[0]["val/nll"])


def test_one_data_module_serves_one_stage_after_the_other(sums, tmp_path):
    model, source = module(), data(sums, tmp_path)
    validated = trainer(tmp_path, limit_val_batches=1.0).validate(model, source, verbose=False)
    trainer(tmp_path, max_steps=2, limit_val_batches=1.0, val_check_interval=2).fit(model, source)
    tested = trainer(tmp_path).test(model, source, verbose=False)
    answers = trainer(tmp_path).predict(model, source)
    assert tested[0]["test/nll"] < validated[0]["val/nll"]
    assert sum(len(batch.predictions) for batch in answers) == 4


def test_more_validation_draws_change_the_estimate(sums, tmp_path):
    model = module()
    one, many = (
        trainer(tmp_path, limit_val_batches=1.0).validate(
            model, data(sums, tmp_path, validation_draws=n, validation_questions=0), verbose=False
        )[0]["val/nll"]
        for n in (1, 8)
    )
    assert one != many
    assert one == pytest.approx(many, rel=0.5)  # both estimate the same bound, about ln 263 at initialisation


def test_everything_is_logged(sums, tmp_path):
    fit = trainer(tmp_path, max_steps=12, limit_val_batches=1.0, log_every_n_steps=1)
    fit.fit(module(), data(sums, tmp_path))
    logged = fit.logged_metrics.keys() | fit.callback_metrics.keys()
    assert {
        "train/loss",
        "train/masked_fraction",
        "train/lr",
        "train/gradient_norm",
        "train/nll_t_quartile_1",
        "train/nll_t_quartile_4",
        "val/nll",
        "val/accuracy",
        "val/unparsed",
        "val/tokens_per_forward",
    } <= logged


def test_a_quartile_without_tokens_does_not_repeat_its_last_value(sums, tmp_path):
    """One document a step has one t."""

    class Notes(DummyLogger):
        def log_metrics(self, metrics, step=None):
            seen.append({n: v for n, v in metrics.items() if n.startswith("train/nll_t")})

    seen = []
    fit = trainer(tmp_path, max_steps=8, log_every_n_steps=1, logger=Notes())
    fit.fit(module(), data(sums, tmp_path, batch_size=1))
    values = [[scalars[f"train/nll_t_quartile_{n}"] for n in (1, 2, 3, 4)] for scalars in seen]
    assert len(values) == 8 and all(sum(map(math.isfinite, row)) == 1 for row in values)
    assert len({row.index(min(row, key=math.isnan)) for row in values}) > 1


@pytest.mark.parametrize(
    "options", [{}, {"complementary_masks": True}, {"weighting": "cart", "treat_eos_as_one": True}]
)
def test_a_training_step_counts_what_is_masked_once(sums, tmp_path, options):
    """On the host. Boolean indices would count again, and to copy Python's numbers to a GPU means to wait for it."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            if by_mask or name in ("nonzero", "_local_scalar_dense", "lift_fresh"):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    waits, model = [], module(**options)
    step = model.training_step

    def watched(*args):
        with Waits():
            return step(*args)

    model.training_step = watched
    trainer(tmp_path, max_steps=1).fit(model, data(sums, tmp_path, packing=True, max_length=200))
    assert waits == ["nonzero"]


def test_it_learns(sums, tmp_path):
    recorder = run(sums, tmp_path, max_steps=60, batch_size=8)
    assert sum(recorder.losses[-5:]) < 0.6 * sum(recorder.losses[:5])


def test_noise_is_addressed_by_sample_not_by_batch(sums, tmp_path):
    """The same draw gets the same mask in any company."""
    model, source = module(), data(sums, tmp_path, batch_size=6)
    source.setup("fit")
    batch: Batch = next(iter(source.train_dataloader()))
    noised = model.noise(batch)
    for b in range(6):
        length = int((batch.document_ids[b] >= 0).sum())
        alone = {
            k: getattr(batch, k)[b : b + 1, :length]
            for k in ("input_ids", "maskable", "position_ids", "document_ids", "sample_ids", "epochs", "extra_weight")
        }
        assert torch.equal(model.noise(Batch(**alone)).x_t[0], noised.x_t[b, :length])
    assert not noised.is_masked[~batch.maskable].any()


def test_nothing_masked_in_a_whole_step_trains_on(sums, tmp_path):
    """A row of t near 0 has no masks: loss 0, gradients 0, no NaN."""
    model = module()
    model.noise = lambda batch, **options: DreamModule.noise(
        model, replace(batch, maskable=torch.zeros_like(batch.maskable)), **options
    )
    recorder = run(sums, tmp_path, model=model, max_steps=2)
    assert recorder.losses == [0, 0]
    assert all((g == 0).all() for g in recorder.gradients)


class TestPredict:
    """predictions.jsonl."""

    def predict(self, source, tmp_path, model, path, **options):
        writer = PredictionWriter(str(path), **options)
        trainer(tmp_path, writer).predict(model, data(source, tmp_path, batch_size=2))
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_fields_and_resumption(self, sums, tmp_path):
        model, path = module(), tmp_path / "predictions.jsonl"
        lines = self.predict(sums, tmp_path, model, path)
        fields = [
            "number",
            "id",
            "prompt",
            "prediction",
            "thinking",
            "answer",
            "reference",
            "correct",
            "tokens",
            "seconds",
        ]
        fields += ["forwards", "filled"]
        assert len(lines) == 4 and list(lines[0]) == fields
        whole = path.read_text()
        torn = whole.splitlines(keepends=True)
        path.write_text("".join(torn[:2]) + torn[2][:20])  # killed while writing
        resumed = self.predict(sums, tmp_path, model, path)
        assert path.read_text().startswith("".join(torn[:2]))
        for line, again in zip(lines, resumed, strict=True):
            assert {**line, "seconds": 0} == {**again, "seconds": 0}
        assert self.predict(sums, tmp_path, model, path) == resumed

    def test_other_settings_are_refused(self, sums, tmp_path):
        path = tmp_path / "predictions.jsonl"
        self.predict(sums, tmp_path, module(), path)
        other = module()
        other.sampling = SamplingParams(max_new_tokens=24, steps=4)
        with pytest.raises(ValueError, match="written with other settings"):
            self.predict(sums, tmp_path, other, path)
        assert len(self.predict(sums, tmp_path, other, path, overwrite=True)) == 4


@pytest.mark.parametrize(
    ("change", "words"), [({"hidden_size": 64}, "hidden_size 32, here 64"), ({"rope_theta": 50.0}, "here 50.0")]
)
def test_a_checkpoint_of_another_network_is_refused(change, words):
    """By name of what differs, not by the shapes of its tensors, which may agree."""
    saved, other = module(), module()
    saved.configure_model()
    other.new_model = SIZES | change
    other.configure_model()
    checkpoint = {"dream_config": saved.model.config.to_dict()}
    saved.check_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=words):
        other.check_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="not saved by a DreamModule"):
        other.check_checkpoint({"state_dict": {}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of them"),
        ({"pretrained": "x", "new_model": {}}, "exactly one of them"),
        ({"new_model": {}}, "needs a tokenizer"),
        ({"new_model": {}, "tokenizer": "bytes", "t_min": 0.0}, "t_min is 0.0"),
        ({"new_model": {}, "tokenizer": "bytes", "cart_p": 2.0}, "cart_p is 2.0"),
        ({"new_model": {}, "tokenizer": "bytes", "t_min": 0.6, "complementary_masks": True}, "t_min is 0.6"),
        ({"new_model": {}, "tokenizer": "bytes", "focal_alpha": -1.0}, "focal_alpha is -1.0"),
        ({"new_model": {}, "tokenizer": "bytes", "focal_gamma": -1.0}, "focal_gamma is -1.0"),
        ({"new_model": {}, "tokenizer": "bytes", "warmup_fraction": 2.0}, "warmup_fraction is 2.0"),
        ({"new_model": {}, "tokenizer": "bytes", "gradient_checkpointing": -1}, "gradient_checkpointing is -1"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DreamModule(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0, wanted at least 1"),
        ({"eos_fill_to": -5}, "eos_fill_to is -5"),
        ({"num_workers": -1}, "num_workers is -1, wanted at least 0"),
        ({"extra_weight": {"</think>": -1.0}}, "extra_weight of '</think>' is -1.0"),
    ],
)
def test_impossible_options_of_the_data_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        S1KDataModule("bundled", tokenizer=load_tokenizer("bytes"), **options)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"hidden_dim": 3}, "new_model has hidden_dim"), ({"vocab_size": 262}, "263 tokens and the model 262")],
)
def test_impossible_models_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        DreamModule(new_model=SIZES | sizes, tokenizer="bytes").configure_model()


def test_a_new_model_names_its_sizes():
    with pytest.raises(ValueError, match="lacks hidden_size, intermediate_size"):
        DreamModule(new_model={"num_hidden_layers": 1, "num_attention_heads": 2}, tokenizer="bytes").configure_model()
