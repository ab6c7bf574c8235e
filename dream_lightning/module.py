"""The LightningModule: composes the parts and logs; contains no mathematics."""

from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import get_scheduler

from dream_lightning.adapters import (
    LoraParams,
    Quantize,
    check_adapters,
    train_in_float8,
    trainable_summary,
)
from dream_lightning.answering import answer_questions
from dream_lightning.batch import Answers, Batch, DocumentBounds, LossTerms, NoisedBatch, PromptBatch
from dream_lightning.diffusion import (
    corrupt,
    independent_t,
    reduce_nll,
    stratified_t,
    token_nll,
    token_weights,
    with_complements,
)
from dream_lightning.diffusion.denoiser import features
from dream_lightning.diffusion.head import chunk_of
from dream_lightning.diffusion.noise import uniform
from dream_lightning.diffusion.objective import Normalizer
from dream_lightning.diffusion.weighting import Weighting, check_cart_p
from dream_lightning.errors import UserError
from dream_lightning.model import DreamModel, load_tokenizer
from dream_lightning.model.flops import matmul_ceiling, training_cost
from dream_lightning.model_factory import (
    accumulate_in_place,
    adapt,
    check_kind,
    check_network,
    check_tokenizer,
    checkpoint_layers,
    compile_layers,
    empty_model,
    fill,
    install_kernels,
    quantized_model,
    random_model,
    start_compilers,
)
from dream_lightning.sampling import SamplingParams, release
from dream_lightning.tasks import AnswerAccuracy, MeanLoss, TokensPerForward
from dream_lightning.training.checkpointing import refuse_diverged
from dream_lightning.training.fsdp import (
    FSDP2Strategy,
    ignore_frozen_in_ddp,
    refuse_untested,
    rescale_progress,
    sum_over_processes,
)
from dream_lightning.training.optimizer import AdamW8bit, adamw, decay_groups, zero_gradients
from dream_lightning.training.sharding import agree, local, shard, whole
from dream_lightning.training.step_accumulator import StepAccumulator

# Gradients are summed over an optimiser step and divided by its token count once, at its end. Until then they carry
# this factor, a power of two (so exact), which keeps them near one.
_GRADIENT_SCALE = 2.0**-10


class DreamModule(L.LightningModule):
    """Fine-tune, validate and question a Dream.

    The loss of an optimiser step is a sum over all its tokens divided once by their count, so it does not depend on
    micro-batch size, accumulation or number of ranks. The noise of a sample is a function of (seed, epoch, sample).

    Args:
        pretrained: an official folder or hub id to start from, such as Dream-org/Dream-v0-Instruct-7B.
        new_model: sizes of a Dream to train from scratch instead, as in `DreamConfig`; the vocabulary follows the
            tokenizer.
        tokenizer: a folder or hub id, or `bytes` for the package's own; by default that of `pretrained`.
        dtype: element type of the weights. All weights trained: float32, computing in bfloat16 with
            `trainer.precision=bf16-mixed`, or bfloat16 with `dream_lightning.training.optimizer.AdamW8bit`.
        lora: train low-rank adapters beside frozen weights, and keep only them in checkpoints.
        quantize: hold the frozen weights of the layers in 4 bits (`nf4`, with double quantisation: smallest), the same
            with products in 8-bit floats (`nf4_float8`: faster on Hopper and later GPUs, with `compile_layers`), or in
            8 bits (`float8`: as large as bfloat16, fastest there); needs `lora`.
        float8_products: multiply trained weights in 8-bit floats, fast on Hopper and later GPUs with `compile_layers`;
            weights, their gradients and evaluation stay as they are.
        gradient_checkpointing: recompute layers in the backward pass, all or so many of the first; saves memory, costs
            up to a third in time.
        compile_layers: compile each decoder layer and the loss; slow to start, faster on a GPU.
        weighting: loss weight of a masked token: `original` (1/t, the ELBO), `linear` (1 − t), `cart`, `none`.
        cart_p: the geometric distribution's p for `cart`.
        normalizer: what the summed loss is divided by: `maskable`, `masked`, or `micro_batch` (the authors').
        focal_alpha: factor of the focal reweighting; used with `focal_gamma` above 0.
        focal_gamma: exponent of the focal reweighting (1 − p)^gamma; 0 switches it off.
        treat_eos_as_one: mask or keep the final run of eos as one unit.
        stratified_t: spread t evenly over consecutive samples instead of drawing it independently; lower variance.
        complementary_masks: train every row twice in its step, with its mask and with the complement of it (twice the
            work and memory of a row; t then keeps t_min from 1 too).
        t_min: smallest masking probability.
        optimizer: any torch optimiser; parameters with one dimension get no weight decay.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_fraction: part of all optimiser steps in which the learning rate rises linearly.
        lr_scheduler: a torch scheduler, stepped every optimiser step, in place of `lr_schedule`.
        sampling: how questions are answered in validate, test and predict.
        seed: of the noise in training and validation.

    Raises:
        UserError: both or neither of `pretrained` and `new_model`; a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        new_model: dict[str, int | float] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: LoraParams | None = None,
        quantize: Quantize | None = None,
        float8_products: bool = False,
        gradient_checkpointing: bool | int = False,
        compile_layers: bool = False,
        weighting: Weighting = "original",
        cart_p: float = 0.1,
        normalizer: Normalizer = "maskable",
        focal_alpha: float = 0.25,
        focal_gamma: float = 0.0,
        treat_eos_as_one: bool = False,
        stratified_t: bool = True,
        complementary_masks: bool = False,
        t_min: float = 1e-3,
        optimizer: OptimizerCallable = adamw,
        lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_fraction: float = 0.1,
        lr_scheduler: LRSchedulerCallable | None = None,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (new_model is None):
            raise UserError(
                f"pretrained is {pretrained!r} and new_model is {new_model!r}: wanted exactly one of them, the "
                "checkpoint to start from or the sizes of a new model; --model.new_model=null or "
                "--model.pretrained=null takes away what a config names"
            )
        if tokenizer is None and pretrained is None:
            raise UserError("a new model needs a tokenizer: name a folder or hub id, or `bytes`")
        check_kind(pretrained, lora=lora, quantize=quantize, float8_products=float8_products)
        if not 0 < t_min < 1:
            raise UserError(f"t_min is {t_min}, wanted a probability between 0 and 1, such as 0.001")
        check_cart_p(cart_p)
        if complementary_masks and t_min >= 0.5:
            raise UserError(f"t_min is {t_min}, wanted less than 0.5: with complementary_masks t keeps it from 1 too")
        for name, value, possible in (
            ("focal_alpha", focal_alpha, focal_alpha > 0),
            ("focal_gamma", focal_gamma, focal_gamma >= 0),
            ("warmup_fraction", warmup_fraction, 0 <= warmup_fraction <= 1),
            ("gradient_checkpointing", gradient_checkpointing, gradient_checkpointing >= 0),
        ):
            if not possible:
                raise UserError(f"{name} is {value}, which is out of its range: see the options of DreamModule")
        self.pretrained, self.new_model = pretrained, new_model
        self.tokenizer = load_tokenizer(tokenizer or pretrained)
        self.lora, self.quantize, self.strict_loading = lora, quantize, lora is None
        self.weights_dtype, self.gradient_checkpointing = getattr(torch, dtype), gradient_checkpointing
        self.compile_layers = compile_layers
        self.float8_products = float8_products
        self.weighting, self.cart_p, self.normalizer = weighting, cart_p, normalizer
        self.focal_alpha, self.focal_gamma, self.treat_eos_as_one = focal_alpha, focal_gamma, treat_eos_as_one
        self.stratified_t, self.t_min, self.seed = stratified_t, t_min, seed
        self.complementary_masks = complementary_masks
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.lr_schedule, self.warmup_fraction = lr_schedule, warmup_fraction
        self.sampling = sampling
        self.model: DreamModel | None = None  # built in configure_model
        self.base: dict[str, str] | None = None  # under adapters: name, content hash and kind of what they belong to
        self._saved_optimizer: str | None = None  # of the checkpoint that training goes on from
        self._saved_step: int | None = None  # of the checkpoint that is scored outside of training
        self._in_place = False  # see _set_accumulation
        self.val_nll, self.val_answers = MeanLoss(), AnswerAccuracy()
        self.val_speed = TokensPerForward()

    def setup(self, stage: str) -> None:
        """Refuse what is not tested together, before anything is loaded."""
        refuse_untested(
            self.trainer,
            adapted=self.lora is not None,
            quantized=self.quantize is not None,
            compiled_answers=self.sampling.compile,
        )
        if self.sharded:  # what is gathered in inference mode could not be trained on afterwards
            for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
                loop.inference_mode = False

    @property
    def sharded(self) -> bool:
        """Whether the weights are divided over processes."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy)

    def configure_model(self) -> None:
        """Build or load the network; Lightning calls this on every rank, once the strategy is known."""
        if self.model is not None:
            return
        device = torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device
        if self.compile_layers:
            start_compilers(device)
        if self.pretrained is None:
            self.model = random_model(self.new_model, self.tokenizer).to(self.weights_dtype)
        elif self.quantize is not None:
            self.model = quantized_model(self.pretrained, self.quantize, device)
        elif self.sharded:
            self.model = empty_model(self.pretrained).to(self.weights_dtype)
        else:
            self.model = DreamModel.from_pretrained(self.pretrained, dtype=self.weights_dtype)
        check_tokenizer(self.tokenizer, self.model.config)
        if self.lora is not None:
            place = device if self.sharded else None
            self.base = adapt(self.model, self.lora, pretrained=self.pretrained, seed=self.seed, device=place)
            self.base["quantize"] = self.quantize or "none"
            if not self.sharded:
                ignore_frozen_in_ddp(self)
        if self.float8_products:
            train_in_float8(self.model, device)
        install_kernels(self.model, training=self._trainer is not None and self.trainer.training)
        if self.compile_layers:
            compile_layers(self.model)
        if self.gradient_checkpointing:
            checkpoint_layers(self.model, self.gradient_checkpointing)
        if self.sharded:
            self._shard(device)
        self.model.train()
        rank_zero_info(trainable_summary(self.model))

    def _shard(self, device: torch.device) -> None:
        if self.pretrained is None:
            agree(self.model.to(device))
        shard(
            self.model,
            self,
            mesh=self.device_mesh["data_parallel"],
            compute_dtype=torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None,
            steps=("training_step", "validation_step", "test_step", "predict_step"),
        )
        if self.pretrained is not None:
            fill(self.model, self.pretrained, device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's sizes, for export; of an adapted model only the adapters and what they belong to.

        Raises:
            UserError: the run has diverged, which would replace its last good checkpoint.
        """
        refuse_diverged(self.trainer.callback_metrics, self.global_step)
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["optimizer"] = next((type(o).__name__ for o in self.trainer.optimizers), None)
        checkpoint["dream_config"] = self.model.config.to_dict()
        if self.lora is not None:
            kept = self._adapter_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
            checkpoint["lora"], checkpoint["base"] = asdict(self.lora), self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not belong to this model; go on also where a step is cut otherwise."""
        self.check_checkpoint(checkpoint)
        self._saved_step = checkpoint["global_step"]
        # What else loads a checkpoint takes the weights only; load_from_checkpoint has no Trainer.
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._saved_optimizer = checkpoint.get("optimizer")
            rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)

    @property
    def trained_steps(self) -> int:
        """Optimiser steps behind the weights, where scores belong in the logs; Lightning says 0 outside of `fit`."""
        return self.global_step if self._saved_step is None else self._saved_step

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, with other adapters, or of another base; looks at no tensor.

        Raises:
            UserError: no checkpoint of a DreamModule; a network of other sizes, constants or token ids; with adapters
                where the model has none, or the other way round, or other ones; the contents of the bases differ.
        """
        if "dream_config" not in checkpoint:
            raise UserError("the checkpoint was not saved by a DreamModule: name one of a run of this package")
        check_network(checkpoint["dream_config"], self.model.config)
        check_adapters(checkpoint, self.lora, self.base)

    def _adapter_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    # ── the objective ────────────────────────────────────────────────────────────────────────────────────────────

    def noise(
        self, batch: Batch, *, stratified: bool = True, t_max: float = 1.0, eos_as_one: bool = False
    ) -> NoisedBatch:
        """x_0 → x_t, with the noise that belongs to each document's draw."""
        bounds = {"t_min": self.t_min, "t_max": t_max}
        if stratified:
            t = stratified_t(self.seed, batch.epochs, batch.document_ids, **bounds)  # [B, L]
        else:
            t = independent_t(self.seed, batch.epochs, batch.sample_ids, **bounds)
        return corrupt(
            batch.input_ids,
            batch.maskable,
            mask_token_id=self.tokenizer.mask_token_id,
            t=t,
            u=uniform(self.seed, batch.epochs, batch.sample_ids, batch.position_ids),
            eos_as_one=self.tokenizer.eos_token_id if eos_as_one else None,
            document_ids=batch.document_ids,
        )

    def training_noise(self, batch: Batch) -> tuple[Batch, NoisedBatch]:
        """The rows to train on and their noise: the batch's own, or these and their complements.

        Made on the host if the batch came from there: what is masked decides shapes, and to ask a GPU for it would
        make the process wait, and then the GPU.
        """
        rows, options = batch.on_host, {"stratified": self.stratified_t, "eos_as_one": self.treat_eos_as_one}
        if self.complementary_masks:
            noised = self.noise(rows, t_max=1 - self.t_min, **options)
            noised = with_complements(rows, noised, mask_token_id=self.tokenizer.mask_token_id)
            batch = batch.twice()
        else:
            noised = self.noise(rows, **options)
        return batch, noised.to(batch.input_ids.device)

    def masked_nll(self, batch: Batch, noised: NoisedBatch) -> Tensor:
        """−log p(x_0 | x_t) of the M masked tokens, [M] float32."""
        h = features(self.model, noised.x_t, noised.where, attention_mask(batch), batch.position_ids)
        targets, chunk = batch.input_ids[noised.where], chunk_of(self.model.config.vocab_size)
        return token_nll(h, self.model.lm_head, targets, chunk=chunk, compiled=self.compile_layers)

    def loss(self, batch: Batch, noised: NoisedBatch, nll: Tensor) -> LossTerms:
        """The objective, weighted and reduced to a sum and a count."""
        weight = token_weights(
            noised.is_masked,
            noised.t,
            weighting=self.weighting,
            cart_p=self.cart_p,
            context=~noised.is_masked & (batch.document_ids >= 0),
            document_ids=batch.document_ids,
        )
        return reduce_nll(
            nll,
            (weight * batch.extra_weight)[noised.where],
            maskable_count=batch.maskable.sum(),
            normalizer=self.normalizer,
            focal_alpha=self.focal_alpha,
            focal_gamma=self.focal_gamma,
        )

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_start(self) -> None:
        """Start the running sums; go on at the checkpoint's row.

        Raises:
            UserError: the checkpoint holds the states of another optimiser.
        """
        ours, saved = type(self.trainer.optimizers[0]).__name__, self._saved_optimizer
        if saved not in (None, ours):
            raise UserError(
                f"the checkpoint holds the states of {saved} and model.optimizer is {ours}: go on with the optimiser "
                "of the run that saved it, or export it and start anew with the folder as model.pretrained"
            )
        self._saved_optimizer = self._saved_step = None
        # Where the schedule needs the length of an epoch, Lightning made the loader before it read the checkpoint, and
        # would begin the epoch again.
        self.trainer.fit_loop._load_combined_loader_states()
        self.sums = StepAccumulator(self.device)
        self._set_accumulation()

    def _set_accumulation(self) -> None:
        """Accumulate the gradients of bfloat16 weights in place, unless DDP or FSDP need autograd's hooks."""
        full = self.lora is None and self.weights_dtype == torch.bfloat16
        alone = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        enable = full and alone and self.trainer.accumulate_grad_batches > 1
        self._in_place = accumulate_in_place(self.model, enable)

    def on_train_end(self) -> None:
        """Leave a model that trains in any loop."""
        accumulate_in_place(self.model, False)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Begin a step's sum of gradients."""
        if self._in_place:
            zero_gradients(_parameters(optimizer))
        else:
            optimizer.zero_grad()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: its share of the optimiser step's loss sum."""
        batch, noised = self.training_noise(batch)
        nll = self.masked_nll(batch, noised)
        terms = self.loss(batch, noised, nll)
        self.sums.add(batch, noised, nll.detach(), terms)
        # Lightning divides by the number of micro-batches, which one division per step must not.
        return terms.sum * (_GRADIENT_SCALE * self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the summed gradients by the count of the whole step, over micro-batches and ranks."""
        loss_sum, count, masked, maskable = sum_over_processes(self.sums.take_step(), self.trainer.world_size)
        # The strategies average gradients over ranks; the objective wants their sum.
        factor = self.trainer.world_size / (_GRADIENT_SCALE * count.clamp(min=1))
        torch._foreach_mul_([local(p.grad) for p in _parameters(optimizer) if p.grad is not None], factor)
        self._log_loss(loss_sum / count.clamp(min=1))
        self.log("train/masked_fraction", masked / maskable.clamp(min=1))
        # A tensor of the host: Lightning would copy a number to the GPU and wait for that.
        self.log("train/lr", torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32))
        every = self.trainer.log_every_n_steps
        if every and (self.trainer.global_step + 1) % every == 0:
            self._log_quartiles()

    def _log_loss(self, loss: Tensor) -> None:
        """Log the step's loss, for the bar too.

        What was logged for a bar Lightning reads after every micro-batch. For a bar that does not fetch the loss itself
        it is therefore brought to the host first: one wait a step, not one a micro-batch.
        """
        bar = self.trainer.progress_bar_callback
        shown = bar is not None and not getattr(bar, "fetches_loss", False)
        self.log("train/loss", loss.cpu() if shown else loss, prog_bar=shown)

    def training_flops(self) -> int:
        """Useful FLOPs of this rank since training started, see `model.flops`; makes the device wait."""
        return training_cost(self.model).of(*self.sums.work())

    def matmul_ceiling(self) -> float:
        """FLOP/s of a large matrix product on this rank's device, in the type that the layers compute in."""
        computes_in = {"bf16": torch.bfloat16, "16": torch.float16}.get(self.trainer.precision.split("-")[0])
        return matmul_ceiling(self.device, computes_in or self.weights_dtype)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, which is logged as it was before."""
        parameters = _parameters(optimizer)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.log("train/gradient_norm", norm)

    def _log_quartiles(self) -> None:
        nll, tokens = sum_over_processes(self.sums.take_quartiles(), self.trainer.world_size)
        for number, mean in enumerate(nll / tokens, start=1):  # NaN without tokens: Lightning would log the last again
            self.log(f"train/nll_t_quartile_{number}", mean)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over all trainable parameters, and its schedule, stepped every optimiser step."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer(decay_groups(trainable))
        if any(p.dtype == torch.bfloat16 for p in trainable) and not isinstance(optimizer, AdamW8bit):
            raise UserError(
                f"model.optimizer is {type(optimizer).__name__} and bfloat16 weights train, which loses small "
                "updates: set model.optimizer to dream_lightning.training.optimizer.AdamW8bit, or model.dtype to "
                "float32"
            )
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        else:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UserError(f"the schedule {self.lr_schedule} needs an end: set trainer.max_steps or max_epochs")
            scheduler = get_scheduler(self.lr_schedule, optimizer, round(steps * self.warmup_fraction), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ── validation, test and prediction ──────────────────────────────────────────────────────────────────────────

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew: those of a `trainer.validate` were made in inference mode, where fit may not add."""
        for metric in (self.val_nll, self.val_answers, self.val_speed):
            metric.reset()

    def validation_step(self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Likelihood of a Batch, or scored answers to a PromptBatch."""
        if isinstance(batch, Batch):
            self._score_likelihood(batch)
            return None
        answers = self.answer(batch, with_history=batch_idx == 0)
        self.val_answers.update(answers.predictions, answers.counted)
        self.val_speed.update(
            [p.filled for p in answers.predictions], [p.forwards for p in answers.predictions], answers.counted
        )
        return answers

    def _score_likelihood(self, batch: Batch) -> None:
        # stratified, eos by eos, whatever training does, so that runs compare
        noised = self.noise(batch.on_host).to(batch.input_ids.device)
        nll = self.masked_nll(batch, noised)
        self.val_nll.update(reduce_nll(nll, 1 / noised.t[noised.where], maskable_count=batch.maskable.sum()))

    def on_validation_epoch_end(self) -> None:
        """Log `val/nll` (upper bound of −log p in nats a token), `val/accuracy`, `val/unparsed`, and the speed at
        which these were had, `val/tokens_per_forward`.
        """
        self._log_scores("val")

    def on_validation_end(self) -> None:
        """Give what compiled answers hold on the device back to training."""
        if self.trainer.state.fn == "fit":
            release(self.model)

    def _log_scores(self, stage: str) -> None:
        if self.val_nll.update_called:
            self.log(f"{stage}/nll", self.val_nll.compute(), prog_bar=True)
        if self.val_answers.update_called:
            scores = self.val_answers.compute()
            self.log(f"{stage}/accuracy", scores["accuracy"], prog_bar=True)
            self.log(f"{stage}/unparsed", scores["unparsed"])
            self.log(f"{stage}/tokens_per_forward", self.val_speed.compute())
        if self._saved_step is not None:  # loggers take it as the step of the others
            self.log("step", float(self._saved_step))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        """The same as validation, named `test/…`."""
        self._log_scores("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Answers:
        """Answers to a batch of questions."""
        return self.answer(batch)

    def answer(self, batch: PromptBatch, *, with_history: bool = False) -> Answers:
        """Answers by `sampling`, graded; over divided weights all processes make the same number of forwards."""
        return answer_questions(
            self.model,
            self.tokenizer,
            batch,
            self.sampling,
            with_history=with_history,
            run_every_step=self.sharded,
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def attention_mask(batch: Batch) -> Tensor | DocumentBounds | None:
    """Who may attend to whom: everyone, all but the padding [B, L], or each document to itself."""
    if batch.document_bounds is not None:
        return DocumentBounds(batch.document_bounds)
    return batch.document_ids >= 0 if batch.padded else None
