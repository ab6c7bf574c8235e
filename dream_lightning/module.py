"""The LightningModule: composes the parts and logs."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from dream_lightning import diffusion, model_factory
from dream_lightning.adapters import LoraParams, Quantize
from dream_lightning.answering import answer_questions
from dream_lightning.batch import Answers, Batch, LossTerms, NoisedBatch, PromptBatch
from dream_lightning.diffusion.denoiser import align, annealed_mask, features
from dream_lightning.diffusion.head import chunk_of
from dream_lightning.diffusion.noise import uniform
from dream_lightning.diffusion.objective import Normalizer
from dream_lightning.diffusion.weighting import Weighting
from dream_lightning.errors import GuessKeywords, UserError
from dream_lightning.model import DreamModel, load_tokenizer
from dream_lightning.model.flops import matmul_ceiling, training_cost
from dream_lightning.sampling import SamplingParams, release_compiled
from dream_lightning.tasks import AnswerScores, MeanLoss, grading_clock
from dream_lightning.training import Autosave, checkpointing, fsdp
from dream_lightning.training import optimizer as optim
from dream_lightning.training.compiled_step import CompiledStep
from dream_lightning.training.step_accumulator import StepAccumulator, ends_step, logged_step

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
        optimizer: OptimizerCallable = optim.adamw,
        lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_fraction: float = 0.1,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer", logger=False)  # those of a checkpoint make `load_from_checkpoint`
        lora = LoraParams(**lora) if isinstance(lora, Mapping) else lora
        sampling = SamplingParams(**sampling) if isinstance(sampling, Mapping) else sampling
        model_factory.check_options(locals())
        self.pretrained, self.new_model, self.from_autoregressive = pretrained, new_model, from_autoregressive
        self.causal, self.anneal_causal_steps = causal, anneal_causal_steps
        self.tokenizer_name, self.tokenizer = tokenizer or pretrained, load_tokenizer(tokenizer or pretrained)
        # Numbers, because torch's compiler cannot look into a tokenizer.
        self.mask_token_id, self.eos_token_id = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        self.lora, self.quantize, self.sampling, self.strict_loading = lora, quantize, sampling, lora is None
        self.weights_dtype, self.float8_products = getattr(torch, dtype), float8_products
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile_layers
        self.weighting, self.cart_p, self.normalizer = weighting, cart_p, normalizer
        self.focal_alpha, self.focal_gamma, self.treat_eos_as_one = focal_alpha, focal_gamma, treat_eos_as_one
        self.certainty_weight, self.certainty_temperature = certainty_weight, certainty_temperature
        self.stratified_t, self.complementary_masks, self.seed = stratified_t, complementary_masks, seed
        self.optimizer, self.lr_schedule, self.warmup_fraction = optimizer, lr_schedule, warmup_fraction
        self.model: DreamModel | None = None  # built in configure_model
        self.base: dict[str, str] | None = None  # with adapters: the fingerprint of their base
        self._resumed: dict[str, Any] = {}  # of the checkpoint that training resumes from
        self._saved_step: int | None = None  # at which the weights were logged, outside of training
        self._accumulates_in_place = False
        self.compiled_step = CompiledStep(self)
        self.totals: StepAccumulator | None = None  # of the last training
        self.val_nll, self.val_answers = MeanLoss(), AnswerScores()

    def noised_loss(self, batch: Batch) -> tuple[Batch, NoisedBatch, Tensor, LossTerms]:
        """The objective, from clean rows x_0 to the sum of w(t) · −log p(x_0 | x_t) over masked tokens, and its count.

        Returns the rows to train on, their noise, the losses of their tokens [B, L] without weights, sum and count.
        """
        batch, noised = self.training_noise(batch)  # t, x_t
        if self.certainty_weight:
            with_doubt = partial(diffusion.token_nll_and_doubt, temperature=self.certainty_temperature)
            nll, doubt = self.of_masked(with_doubt, batch, noised).unbind(-1)
            losses = nll + self.certainty_weight * doubt
        else:
            nll = losses = self.masked_nll(batch, noised)  # −log p(x_0 | x_t)
        return batch, noised, nll, self.loss(batch, noised, losses)  # w(t), sum, count

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

    def noise(self, batch: Batch, *, stratified=True, t_max: float = 1.0, eos_as_one: bool = False) -> NoisedBatch:
        """x_0 → x_t, with the noise of each document's (seed, epoch, sample); none for a causal model."""
        if self.causal:
            return diffusion.next_tokens(batch)
        draw, ids = diffusion.independent_t, batch.sample_ids
        if stratified:
            draw, ids = diffusion.stratified_t, batch.document_ids
        u = batch.trajectory  # of a teacher
        return diffusion.corrupt(
            batch.input_ids,
            batch.maskable,
            mask_token_id=self.mask_token_id,
            t=draw(self.seed, batch.epochs, ids, t_min=T_MIN, t_max=t_max),  # [B, L]
            u=uniform(self.seed, batch.epochs, batch.sample_ids, batch.position_ids) if u is None else u,
            eos_as_one=self.eos_token_id if eos_as_one else None,
            document_ids=batch.document_ids,
        )

    def masked_nll(self, batch: Batch, noised: NoisedBatch) -> Tensor:
        """−log p(x_0 | x_t) of the masked tokens, [B, L] float32, 0 elsewhere."""
        return self.of_masked(diffusion.token_nll, batch, noised)

    def loss(self, batch: Batch, noised: NoisedBatch, nll: Tensor) -> LossTerms:
        """The token losses, weighted by w(t), as a sum and a count. Override it for another objective.

        Args:
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

    def of_masked(self, function: Callable, batch: Batch, noised: NoisedBatch) -> Tensor:
        """What a function as `token_nll` gives for each masked token, [B, L, …]; 0 elsewhere."""
        if torch.compiler.is_compiling():  # the whole step: at all positions, as the number of masked ones varies
            h = align(self.model.model(noised.x_t, rotation=self.compiled_step.rotation)).flatten(0, 1)  # [B·L, D]
            out = function(h, self.model.lm_head, batch.input_ids.flatten(), chunk=len(h))
            is_masked = noised.is_masked.view(-1, *[1] * (out.dim() - 1))
            return torch.where(is_masked, out, 0.0).view(*noised.x_t.shape, *out.shape[1:])
        step = self.trainer.global_step if self.training and self._trainer is not None else self.anneal_causal_steps
        if step < self.anneal_causal_steps:
            mask = annealed_mask(batch, visible=step / self.anneal_causal_steps, seed=self.seed)
        else:
            mask = batch.attention_mask
        h = features(self.model, noised.x_t, noised.where, mask, batch.position_ids)  # [M, D]
        options = {"chunk": chunk_of(self.model.config.vocab_size), "compiled": self.compile_layers}
        out = function(h, self.model.lm_head, batch.input_ids[noised.where], **options)
        return out.new_zeros(*noised.x_t.shape, *out.shape[1:]).index_put(noised.where, out)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's mean loss. In a Trainer of its own, its gradients become those of the whole step's mean."""
        if self.model is None:
            raise UserError("the model is not built yet: call DreamModule.configure_model() first")
        step = self.compiled_step if self.compiled_step.takes(batch) else self.noised_loss
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
            self.totals.log_step(self)
        return loss

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
        return self.sampling.longest_prompt(config.max_position_embeddings)

    def answer_length(self, prompt_length: int) -> int | None:
        """Masks after such a prompt; None for a causal model, which does not see how many there are."""
        return None if self.causal else self.sampling.room(prompt_length)

    def configure_model(self) -> None:
        """Build or load the network; Lightning calls this on every rank, once the strategy is known."""
        if self.model is None:
            model_factory.build(self, self._trainer and self.trainer)

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
            optim.zero_gradients(optim.parameters(optimizer))
        else:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Divide the gradients by the count of the whole step, over micro-batches and ranks, before any hook."""
        super().backward(loss, *args, **kwargs)
        if self.totals is not None:
            self.totals.divide_gradients(loss, self.trainer.optimizers[0], self.trainer.world_size)

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
        trained = optim.parameters(optimizer)
        norm = fsdp.whole(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)
        self.log("train/gradient_norm", norm)

    def configure_optimizers(self) -> dict[str, Any]:
        """Raises UserError for an optimizer that loses updates of bfloat16 weights, or a schedule without an end."""
        optimizer = self.optimizer(optim.decay_groups(p for p in self.parameters() if p.requires_grad))
        optim.check_optimizer(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(f"the schedule {self.lr_schedule} needs an end: set trainer.max_steps or max_epochs")
        shape = {"shape": self.lr_schedule, "warmup": round(steps * self.warmup_fraction), "steps": steps}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(optim.lr_factor, **shape))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        # `trainer.validate` makes their tensors in inference mode, where `fit` cannot add to them.
        self.val_nll.reset()
        self.val_answers.reset()
        grading_clock.restart_clock()

    def validation_step(self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Likelihood of a Batch, or scored answers to a PromptBatch."""
        if isinstance(batch, Batch):
            # Always stratified, eos by eos and with the ELBO's weight, so that runs with different objectives compare.
            noised = self.noise(batch.on_host).to(batch.input_ids.device)
            nll = self.masked_nll(batch, noised)
            self.val_nll.update(diffusion.reduce_nll(nll, 1 / noised.t, maskable_count=batch.maskable.sum()))
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
