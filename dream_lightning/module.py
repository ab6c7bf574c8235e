"""The LightningModule: composes the parts and logs."""

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dream_lightning import diffusion, model_factory
from dream_lightning.adapters import LoraParams, Quantize, train_in_float8, trainable_summary
from dream_lightning.answering import answer_questions
from dream_lightning.batch import Answers, Batch, DocumentBounds, LossTerms, NoisedBatch, PromptBatch
from dream_lightning.diffusion.denoiser import align, features
from dream_lightning.diffusion.head import chunk_of
from dream_lightning.diffusion.noise import uniform
from dream_lightning.diffusion.objective import Normalizer, check_focal
from dream_lightning.diffusion.weighting import Weighting, check_cart_p
from dream_lightning.errors import GuessKeywords, UserError, check_range
from dream_lightning.model import DreamModel, check_tokenizer, load_tokenizer
from dream_lightning.model.autoregressive import from_qwen2
from dream_lightning.model.flops import matmul_ceiling, training_cost
from dream_lightning.sampling import SamplingParams, release_compiled
from dream_lightning.tasks import AnswerScores, MeanLoss, grading_clock
from dream_lightning.training import Autosave, checkpointing, fsdp
from dream_lightning.training.optimizer import (
    AdamW8bit,
    adamw,
    check_optimizer,
    decay_groups,
    lr_factor,
    zero_gradients,
)
from dream_lightning.training.step_accumulator import StepAccumulator, ends_step, logged_step, parameters

T_MIN = 1e-3  # smallest masking probability


class DreamModule(L.LightningModule, metaclass=GuessKeywords):
    """Fine-tune, validate and question a Dream.

    The loss of an optimizer step is a sum over its tokens divided once by their count: micro-batch size, accumulation
    and number of ranks do not change it. The noise of a sample is a function of (seed, epoch, sample). Override `loss`
    to change the objective.

    `DreamModule.load_from_checkpoint(file)` needs no options, but does not know the optimizer: pass yours to train on.

    Args:
        pretrained: an official folder or hub id to start from, such as Dream-org/Dream-v0-Instruct-7B.
        from_autoregressive: a folder or hub id of a Qwen2 or Qwen2.5 to start from instead; needs `tokenizer`.
        new_model: sizes of a Dream to train from scratch instead, as in `DreamConfig` but without the vocabulary's.
        tokenizer: a folder or hub id, or `bytes` for the package's own; by default that of `pretrained`.
        dtype: type of the weights. To train all, float32 with `trainer.precision=bf16-mixed`, or bfloat16 with
            AdamW8bit.
        lora: train low-rank adapters on frozen weights, and save only the adapters in checkpoints. In Python also a
            mapping, such as {"rank": 8}; so is `sampling`.
        quantize: store the frozen weights of the layers in 4 bits (`nf4`: smallest), the same with 8-bit floating-point
            products (`nf4_float8`), or in 8 bits (`float8`); needs `lora`. The latter two are fast on Hopper and later
            GPUs with `compile_layers`.
        float8_products: multiply trained weights in 8-bit floating point, fast on Hopper and later GPUs with
            `compile_layers`; weights, their gradients and evaluation keep their dtype.
        gradient_checkpointing: recompute all layers in the backward pass, or the first n; saves memory, costs time.
        compile_layers: compile each decoder layer and the loss; slow to start, faster on a GPU.
        causal: train an autoregressive baseline: causal attention, and every response token predicted from the clean
            tokens before it. It answers with `sampling.block_length` 1.
        anneal_causal_steps: steps in which attention goes from causal to bidirectional: a token after the query is
            visible with probability step / n, drawn for each pair. For models that were autoregressive.
        weighting: loss weight of a masked token: `original` (1/t, the ELBO), `linear` (1 − t), `cart`, `none`.
        cart_p: p of the geometric distribution for `cart`.
        normalizer: what the summed loss is divided by: `maskable`, `masked`, or `micro_batch` (the authors').
        focal_alpha: factor of the focal reweighting; used with `focal_gamma` above 0.
        focal_gamma: exponent of the focal reweighting (1 − p)^gamma; 0 switches it off.
        certainty_weight: factor of the entropy of the masked tokens that the model predicts rightly, which is added to
            their loss: certainty-forcing distillation, for more tokens a forward. 0 switches it off.
        certainty_temperature: by which logits are divided for that entropy.
        treat_eos_as_one: mask or keep the final run of eos as one unit.
        stratified_t: spread t evenly over consecutive samples instead of drawing it independently; lower variance.
        complementary_masks: train every row twice in its step, with its mask and with the complement of it.
        optimizer: any torch optimizer; parameters with one dimension get no weight decay.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_fraction: part of all optimizer steps in which the learning rate rises linearly.
        sampling: how questions are answered in validate, test and predict.
        seed: seed of the noise in training and validation.

    Raises:
        UserError: none or several of `pretrained`, `from_autoregressive` and `new_model`; an option out of its range.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        from_autoregressive: str | None = None,
        new_model: dict[str, int | float] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: LoraParams | None = None,
        quantize: Quantize | None = None,
        float8_products: bool = False,
        gradient_checkpointing: bool | int = False,
        compile_layers: bool = False,
        causal: bool = False,
        anneal_causal_steps: int = 0,
        weighting: Weighting = "original",
        cart_p: float = 0.1,
        normalizer: Normalizer = "maskable",
        focal_alpha: float = 0.25,
        focal_gamma: float = 0.0,
        certainty_weight: float = 0.0,
        certainty_temperature: float = 0.5,
        treat_eos_as_one: bool = False,
        stratified_t: bool = True,
        complementary_masks: bool = False,
        optimizer: OptimizerCallable = adamw,
        lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_fraction: float = 0.1,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer", logger=False)  # those of a checkpoint make `load_from_checkpoint`
        lora = LoraParams(**lora) if isinstance(lora, Mapping) else lora
        sampling = SamplingParams(**sampling) if isinstance(sampling, Mapping) else sampling
        _check_options(locals())
        self.pretrained, self.new_model = pretrained, new_model
        self.from_autoregressive = from_autoregressive
        self.causal, self.anneal_causal_steps = causal, anneal_causal_steps
        self.tokenizer_name, self.tokenizer = tokenizer or pretrained, load_tokenizer(tokenizer or pretrained)
        # Numbers, because torch's compiler cannot look into a tokenizer.
        self.mask_token_id, self.eos_token_id = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        self.lora, self.quantize, self.strict_loading = lora, quantize, lora is None
        self.weights_dtype, self.float8_products = getattr(torch, dtype), float8_products
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile_layers
        self.weighting, self.cart_p, self.normalizer = weighting, cart_p, normalizer
        self.focal_alpha, self.focal_gamma, self.treat_eos_as_one = focal_alpha, focal_gamma, treat_eos_as_one
        self.certainty_weight, self.certainty_temperature = certainty_weight, certainty_temperature
        self.stratified_t, self.complementary_masks, self.seed = stratified_t, complementary_masks, seed
        self.optimizer, self.lr_schedule, self.warmup_fraction = optimizer, lr_schedule, warmup_fraction
        self.sampling = sampling
        self.model: DreamModel | None = None  # built in configure_model
        self.base: dict[str, str] | None = None  # with adapters: the fingerprint of their base
        self._resumed: dict[str, Any] = {}  # of the checkpoint that training resumes from
        self._saved_step: int | None = None  # at which the weights were logged, outside of training
        self._accumulates_in_place = False
        self.totals: StepAccumulator | None = None  # of the last training
        self.val_nll, self.val_answers = MeanLoss(), AnswerScores()

    def setup(self, stage: str) -> None:
        kind = {"adapted": bool(self.lora), "quantized": bool(self.quantize), "compiled_answers": self.sampling.compile}
        fsdp.refuse_untested(self.trainer, **kind)
        fsdp.check_trainer(self.trainer)
        if self.sharded:  # weights gathered in inference mode could not be trained afterwards
            for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
                loop.inference_mode = False

    @property
    def sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, fsdp.FSDP2Strategy)

    @property
    def max_prompt_length(self) -> int:
        """Tokens of a question that leave room for its answer; reads config.json only."""
        config = model_factory.config_of(self.pretrained, self.new_model, self.tokenizer, self.from_autoregressive)
        return config.max_position_embeddings - self.sampling.max_new_tokens

    def configure_model(self) -> None:
        """Build or load the network; Lightning calls this on every rank, once the strategy is known."""
        if self.model is not None:
            return
        device = torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device
        if self.compile_layers:
            model_factory.start_compilers(device)
        if self.from_autoregressive is not None:
            self.model = from_qwen2(self.from_autoregressive, self.tokenizer, dtype=self.weights_dtype)
        elif self.pretrained is None:
            self.model = model_factory.random_model(self.new_model, self.tokenizer).to(self.weights_dtype)
        elif self.quantize is not None:
            self.model = model_factory.quantized_model(self.pretrained, self.quantize, device)
        elif self.sharded:
            self.model = model_factory.empty_model(self.pretrained).to(self.weights_dtype)
        else:
            self.model = DreamModel.from_pretrained(self.pretrained, dtype=self.weights_dtype)
        check_tokenizer(self.tokenizer, self.model.config)
        if self.model.config.causal and not self.causal:
            raise UserError("the model's config.json is causal, an autoregressive baseline: set model.causal to true")
        self.model.config.causal = self.causal
        if self.lora is not None:
            options = {"pretrained": self.pretrained, "seed": self.seed, "device": device if self.sharded else None}
            self.base = model_factory.adapt(self.model, self.lora, **options) | {"quantize": self.quantize or "none"}
            if not self.sharded:
                fsdp.ignore_frozen_in_ddp(self)
        if self.float8_products:
            train_in_float8(self.model, device)
        trains = self._trainer is not None and self.trainer.training
        one_length = trains and getattr(self.trainer.datamodule, "preload", False)
        model_factory.install_kernels(self.model, training=trains, one_length=one_length)
        if self.compile_layers:
            model_factory.compile_layers(self.model)
        if self.gradient_checkpointing:
            model_factory.checkpoint_layers(self.model, self.gradient_checkpointing)
        if self.sharded:
            compute_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            steps = ("training_step", "validation_step", "test_step", "predict_step")
            if self.pretrained is None:
                fsdp.broadcast_parameters(self.model.to(device))
            mesh = self.device_mesh["data_parallel"]
            fsdp.shard(self.model, self, mesh=mesh, compute_dtype=compute_dtype, steps=steps)
            if self.pretrained is not None:
                model_factory.fill(self.model, self.pretrained, device)
        self.model.train()
        rank_zero_info(trainable_summary(self.model))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for a diverged run; add what a resumed run is checked against."""
        checkpointing.refuse_diverged(self.trainer.callback_metrics, self.global_step)
        for callback in self.trainer.checkpoint_callbacks:  # theirs is not called where only weights are saved
            if isinstance(callback, Autosave):
                callback.move_other_runs(self.trainer)
        checkpointing.describe_run(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpointing.check_checkpoint(checkpoint, self)
        self._saved_step = checkpoint["logged_step"]
        # Other commands read the weights only; load_from_checkpoint has no Trainer.
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._resumed = {name: checkpoint[name] for name in ("optimizer", "settings")}
            checkpointing.rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)

    @property
    def logged_step(self) -> int:
        """The step at which scores of the weights are logged: outside of `fit` the same as in it."""
        return logged_step(self.trainer) if self._saved_step is None else self._saved_step

    def loss(self, batch: Batch, noised: NoisedBatch, nll: Tensor) -> LossTerms:
        """The objective: the token losses weighted and reduced to a sum and a count.

        Args:
            batch: the clean rows.
            noised: the same rows with masks.
            nll: [B, L] float32, −log p(x_0 | x_t) of the masked tokens, 0 elsewhere.
        """
        weight = diffusion.token_weights(
            noised.is_masked,
            noised.t,
            weighting=self.weighting,
            cart_p=self.cart_p,
            context=~noised.is_masked & (batch.document_ids >= 0),
            document_ids=batch.document_ids,
        )
        return diffusion.reduce_nll(
            nll,
            weight * batch.extra_weight,
            masked_count=noised.is_masked.sum(),
            maskable_count=batch.maskable.sum(),
            normalizer=self.normalizer,
            focal_alpha=self.focal_alpha,
            focal_gamma=self.focal_gamma,
        )

    def noise(self, batch: Batch, *, stratified=True, t_max: float = 1.0, eos_as_one: bool = False) -> NoisedBatch:
        """x_0 → x_t, with the noise of each document's (seed, epoch, sample); none for a causal model."""
        if self.causal and batch.trajectory is not None:
            raise UserError("model.causal has no masks, data.trajectories says which to use: set one of them to false")
        if self.causal:  # the first token of a document has nothing before it
            is_predicted = batch.maskable & (batch.position_ids > 0)
            return NoisedBatch(batch.input_ids, is_predicted, torch.ones_like(is_predicted, dtype=torch.float32))
        if stratified:
            t = diffusion.stratified_t(self.seed, batch.epochs, batch.document_ids, t_min=T_MIN, t_max=t_max)  # [B, L]
        else:
            t = diffusion.independent_t(self.seed, batch.epochs, batch.sample_ids, t_min=T_MIN, t_max=t_max)
        return diffusion.corrupt(
            batch.input_ids,
            batch.maskable,
            mask_token_id=self.mask_token_id,
            t=t,
            u=uniform(self.seed, batch.epochs, batch.sample_ids, batch.position_ids)
            if batch.trajectory is None
            else batch.trajectory,
            eos_as_one=self.eos_token_id if eos_as_one else None,
            document_ids=batch.document_ids,
        )

    def training_noise(self, batch: Batch) -> tuple[Batch, NoisedBatch]:
        """The rows to train on, with `complementary_masks` twice, and their noise.

        It is made on the host: shapes depend on the number of masked tokens, and to read it from a GPU synchronizes.
        """
        rows, options = batch.on_host, {"stratified": self.stratified_t, "eos_as_one": self.treat_eos_as_one}
        if self.complementary_masks:
            noised = self.noise(rows, t_max=1 - T_MIN, **options)
            noised = diffusion.with_complements(rows, noised, mask_token_id=self.mask_token_id)
            batch = batch.twice()
        else:
            noised = self.noise(rows, **options)
        return batch, noised.to(batch.input_ids.device)

    def masked_nll(self, batch: Batch, noised: NoisedBatch) -> Tensor:
        """−log p(x_0 | x_t) of the masked tokens, [B, L] float32, 0 elsewhere."""
        return self._of_masked(diffusion.token_nll, batch, noised)

    def _of_masked(self, function: Callable, batch: Batch, noised: NoisedBatch) -> Tensor:
        """What a function as `token_nll` gives for each masked token, [B, L, …]; 0 elsewhere."""
        head = self.model.lm_head
        if torch.compiler.is_compiling():  # a whole step, where the number of masked tokens would not be constant
            h = align(self.model.model(noised.x_t, rotation=self._rotation)).flatten(0, 1)
            out = function(h, head, batch.input_ids.flatten(), chunk=len(h))
            is_masked = noised.is_masked.view(-1, *[1] * (out.dim() - 1))
            return torch.where(is_masked, out, 0.0).view(*noised.x_t.shape, *out.shape[1:])
        step = self.trainer.global_step if self.training and self._trainer is not None else self.anneal_causal_steps
        if step < self.anneal_causal_steps:
            mask = annealed_mask(batch, visible=step / self.anneal_causal_steps, seed=self.seed)
        else:
            mask = attention_mask(batch)
        h = features(self.model, noised.x_t, noised.where, mask, batch.position_ids)
        options = {"chunk": chunk_of(self.model.config.vocab_size), "compiled": self.compile_layers}
        out = function(h, head, batch.input_ids[noised.where], **options)
        return out.new_zeros(*noised.x_t.shape, *out.shape[1:]).index_put(noised.where, out)

    def on_train_start(self) -> None:
        checkpointing.resume(self, self._resumed)
        self._resumed, self._saved_step = {}, None
        self.totals = StepAccumulator(self.device)
        self._set_accumulation()

    def _set_accumulation(self) -> None:
        """Accumulate the gradients of bfloat16 weights in place, unless DDP or FSDP need autograd's hooks."""
        one_device = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        all_in_bfloat16 = self.lora is None and self.weights_dtype == torch.bfloat16
        ours = type(self).optimizer_zero_grad is DreamModule.optimizer_zero_grad  # the sums need it
        enable = ours and one_device and all_in_bfloat16 and self.trainer.accumulate_grad_batches > 1
        self._accumulates_in_place = model_factory.accumulate_in_place(self.model, enable)

    def on_train_end(self) -> None:
        self._saved_step = logged_step(self.trainer)
        model_factory.accumulate_in_place(self.model, False)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self._accumulates_in_place:
            zero_gradients(parameters(optimizer))
        else:
            optimizer.zero_grad()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's mean loss. In a Trainer of its own, its gradients become those of the whole step's mean."""
        if self.model is None:
            raise UserError("the model is not built yet: call DreamModule.configure_model() first")
        step = self.compiled_step if self.compiles_step(batch) else self.noised_loss
        batch, noised, nll, terms = step(batch)
        if self._trainer is None or self.trainer.lightning_module is not self:
            warnings.warn(
                "DreamModule.training_step runs outside of its own Trainer: each micro-batch is divided by its own "
                "count of tokens, so accumulation and the number of processes change the gradients",
                stacklevel=2,
            )
            return terms.mean
        if self.totals is None:
            raise UserError(f"{type(self).__name__}.on_train_start must call super().on_train_start()")
        loss = self.totals.add(batch, noised, nll, terms, self.trainer.accumulate_grad_batches)
        if ends_step(self.trainer):
            self._log_step()
        return loss

    def noised_loss(self, batch: Batch) -> tuple[Batch, NoisedBatch, Tensor, LossTerms]:
        """A micro-batch from clean rows to its loss: the rows to train on, their noise, token losses and terms."""
        batch, noised = self.training_noise(batch)
        if not self.certainty_weight:
            nll = losses = self.masked_nll(batch, noised)
        else:
            with_doubt = partial(diffusion.token_nll_and_doubt, temperature=self.certainty_temperature)
            nll, doubt = self._of_masked(with_doubt, batch, noised).unbind(-1)
            losses = nll + self.certainty_weight * doubt
        return batch, noised, nll, self.loss(batch, noised, losses)

    def compiles_step(self, batch: Batch) -> bool:
        """Whether `noised_loss` is compiled as a whole: for `data.preload` on a GPU, if all logits fit at once.

        The head then works at all positions: to count the masked ones would synchronize with the GPU.
        """
        if not self.compile_layers or self.gradient_checkpointing or self.anneal_causal_steps:
            return False
        made_on_gpu = batch.input_ids.is_cuda and batch.host is None
        return made_on_gpu and batch.input_ids.numel() <= chunk_of(self.model.config.vocab_size)

    def compiled_step(self, batch: Batch) -> tuple[Batch, NoisedBatch, Tensor, LossTerms]:
        """`noised_loss` of rows of one document each, without padding."""
        # Compiled code would compute the rotation again in every layer and row.
        position_ids = torch.arange(batch.input_ids.shape[1], device=self.device)[None]
        self._rotation = self.model.model.rotary(position_ids, self.weights_dtype)
        return self._compiled_loss(batch)

    @cached_property
    def _compiled_loss(self) -> Callable:
        return torch.compile(self.noised_loss, dynamic=False)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Divide the gradients by the count of the whole step, over micro-batches and ranks, before any hook."""
        super().backward(loss, *args, **kwargs)
        if self.totals is not None:
            self.totals.divide_gradients(loss, self.trainer.optimizers[0], self.trainer.world_size)

    def _log_step(self) -> None:
        loss_sum, count, masked, maskable = self.totals.take_step(self.trainer.world_size)
        loss = loss_sum / count.clamp(min=1)
        bar = self.trainer.progress_bar_callback
        # Lightning reads what another bar shows after every micro-batch: on the host it synchronizes once a step only.
        shown = bar is not None and not getattr(bar, "fetches_loss", False)
        self.log("train/loss", loss.cpu() if shown else loss, prog_bar=shown)
        self.log("train/masked_fraction", masked / maskable.clamp(min=1))
        # A tensor on the host: Lightning would copy a number to the GPU, which synchronizes.
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/lr", torch.as_tensor(lr, dtype=torch.float32))
        every = self.trainer.log_every_n_steps
        if every and (self.trainer.global_step + 1) % every == 0:
            for number, mean in enumerate(self.totals.take_quartiles(self.trainer.world_size), start=1):
                self.log(f"train/nll_t_quartile_{number}", mean)

    def training_flops(self) -> int:
        """Useful FLOPs of this rank since training started, see `model.flops`; synchronizes with the GPU."""
        return training_cost(self.model).of(*self.totals.work())

    def matmul_ceiling(self) -> float:
        """FLOP/s of a large matrix product on this rank's GPU, in the dtype that the layers compute in; 0 on a CPU."""
        if self.device.type == "cpu":  # shared with other programs, and never near its peak
            return 0.0
        computes_in = {"bf16": torch.bfloat16, "16": torch.float16}.get(self.trainer.precision.split("-")[0])
        return matmul_ceiling(self.device, computes_in or self.weights_dtype)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        trained = parameters(optimizer)
        norm = fsdp.whole(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)
        self.log("train/gradient_norm", norm)

    def configure_optimizers(self) -> dict[str, Any]:
        """Raises UserError for an optimizer that loses updates of bfloat16 weights, or a schedule without an end."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer(decay_groups(trainable))
        check_optimizer(optimizer)
        if any(p.dtype == torch.bfloat16 for p in trainable) and not isinstance(optimizer, AdamW8bit):
            raise UserError(
                f"model.optimizer {type(optimizer).__name__} loses small updates of bfloat16 weights: set it to "
                "dream_lightning.training.optimizer.AdamW8bit, or model.dtype to float32"
            )
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(f"the schedule {self.lr_schedule} needs an end: set trainer.max_steps or max_epochs")
        factor = lr_factor(self.lr_schedule, warmup=round(steps * self.warmup_fraction), steps=steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        # `trainer.validate` makes their tensors in inference mode, where `fit` cannot add to them.
        self.val_nll.reset()
        self.val_answers.reset()
        grading_clock.restart_clock()

    def validation_step(self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Likelihood of a Batch, or scored answers to a PromptBatch."""
        if isinstance(batch, Batch):
            # Always stratified and eos by eos, so that runs with different objectives compare.
            noised = self.noise(batch.on_host).to(batch.input_ids.device)
            nll = self.masked_nll(batch, noised)
            weight = 1 / noised.t  # the ELBO
            self.val_nll.update(diffusion.reduce_nll(nll, weight, maskable_count=batch.maskable.sum()))
            return None
        answers = self.answer(batch, with_history=batch_idx == 0)
        self.val_answers.update(answers)
        return answers

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            release_compiled(self.model)

    def on_validation_epoch_end(self) -> None:
        """Log `val/nll` (upper bound of −log p in nats a token) and the scores of `AnswerScores`."""
        stage = "test" if self.trainer.testing else "val"
        grading_clock.warn_skipped()
        if self.val_nll.update_called:
            self.log(f"{stage}/nll", self.val_nll.compute(), prog_bar=True)
        if self.val_answers.update_called:
            for name, score in self.val_answers.compute().items():
                self.log(f"{stage}/{name}", score, prog_bar=name == "accuracy")
        if self.trainer.state.fn != "fit":  # loggers take it as the step of the others
            self.log("step", float(self.logged_step))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Answers:
        return self.answer(batch)

    def answer(self, batch: PromptBatch, *, with_history: bool = False) -> Answers:
        """Graded answers by `sampling`; with sharded weights all processes make the same number of forwards."""
        options = {"with_history": with_history, "run_every_step": self.sharded}
        return answer_questions(self.model, self.tokenizer, batch, self.sampling, **options)


def annealed_mask(batch: Batch, *, visible: float, seed: int) -> Tensor:
    """Bool [B, 1, L, L]: each document's positions up to the query, and each later one with probability `visible`.

    As DiffuLLaMA anneals (Gong et al. 2025, arXiv 2410.17891), but each sample has a mask of its own, a function of
    (seed, epoch, sample).
    """
    query, key = batch.position_ids[:, :, None], batch.position_ids[:, None, :]
    u = uniform(seed, batch.epochs[:, :, None], batch.sample_ids[:, :, None], query, key)  # [B, L, L]
    same = batch.document_ids[:, :, None] == batch.document_ids[:, None, :]
    return (same & ((key <= query) | (u < visible)))[:, None]


def _check_options(o: dict[str, Any]) -> None:
    """Raise UserError for options of `DreamModule` that are out of range, or exclude each other."""
    model_factory.check_start(o["pretrained"], o["from_autoregressive"], o["new_model"])
    if o["tokenizer"] is None and o["pretrained"] is None:
        raise UserError("a new model needs a tokenizer: name a folder or hub id, or `bytes`")
    model_factory.check_kind(o["pretrained"], **{name: o[name] for name in ("lora", "quantize", "float8_products")})
    check_range("warmup_fraction", o["warmup_fraction"], least=0, most=1)
    if not isinstance(o["gradient_checkpointing"], bool):
        check_range("gradient_checkpointing", o["gradient_checkpointing"], least=0, whole=True)
    check_range("seed", o["seed"], least=0, most=2**32 - 1, whole=True)
    steps = {"least": 0, "most": 0 if o["causal"] else 2**31, "whole": True}
    check_range("anneal_causal_steps (0 with causal)", o["anneal_causal_steps"], **steps)
    masks = o["complementary_masks"], o["treat_eos_as_one"]
    if o["causal"] and (o["weighting"] not in ("original", "none") or any(masks)):
        raise UserError(
            f"causal has no masks: weighting is {o['weighting']}, wanted original or none, which are the same, with "
            f"complementary_masks ({masks[0]}) and treat_eos_as_one ({masks[1]}) false"
        )
    check_cart_p(o["cart_p"])
    check_focal(o["focal_alpha"], o["focal_gamma"])
    check_range("certainty_weight", o["certainty_weight"], least=0)
    check_range("certainty_temperature", o["certainty_temperature"], least=1e-3)
    if o["certainty_weight"] and o["focal_gamma"]:
        raise UserError("certainty_weight sharpens what focal_gamma does not train on: set one of them to 0")


def attention_mask(batch: Batch) -> Tensor | DocumentBounds | None:
    """Who may attend to whom: everyone, all but the padding [B, L], or each document to itself."""
    if batch.document_bounds is not None:
        return DocumentBounds(batch.document_bounds)
    return batch.document_ids >= 0 if batch.padded else None
