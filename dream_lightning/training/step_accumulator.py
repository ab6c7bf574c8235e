"""Running totals of training on the device, so that the process synchronizes with the GPU only where it logs."""

import lightning as L
import torch
from torch import Tensor

from dream_lightning.batch import Batch, LossTerms, NoisedBatch
from dream_lightning.errors import UserError
from dream_lightning.training.fsdp import local, sum_over_processes
from dream_lightning.training.optimizer import parameters

QUARTILES = 4
# Gradients are divided by the step's token count at its end. Until then this power of two keeps them near one, exactly.
GRADIENT_SCALE = 2.0**-10


class StepAccumulator:
    """Totals of one process: of an optimizer step, of the token losses by t, and of the work done.

    For every micro-batch call `add`, return its loss to Lightning, and call `divide_gradients` after its backward pass.
    """

    _node: object = None  # of the graph, of the last loss that `add` returned
    _undivided: Tensor | None = None  # count of a step whose gradients are to be divided
    parts: list[tuple[Batch, NoisedBatch, Tensor]] | None = None  # micro-batches of the step, kept in a list only

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros(4, device=device)
        self._quartiles = torch.zeros(2, QUARTILES, device=device)
        self._work = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, batch: Batch, noised: NoisedBatch, nll: Tensor, terms: LossTerms, accumulate: int) -> Tensor:
        """Add one micro-batch, its token losses [B, L] and its terms of the objective.

        Returns the micro-batch's mean loss, which callbacks see. Its gradients are those of the sum of the loss, times
        GRADIENT_SCALE and the number of micro-batches, by which Lightning divides.
        """
        if self._undivided is not None:
            raise UserError("the gradients of a step were not divided: `backward` must call super().backward(…)")
        self._count(batch, noised, nll.detach(), terms)
        if self.parts is not None:
            self.parts.append((batch, noised, nll.detach()))
        loss = _ShownAs.apply(terms.sum * (GRADIENT_SCALE * accumulate), terms.mean)
        self._node = loss.grad_fn
        return loss

    @torch.no_grad()
    def _count(self, batch: Batch, noised: NoisedBatch, nll: Tensor, terms: LossTerms) -> None:
        masked = noised.is_masked.sum()
        self._step += torch.stack([terms.sum, terms.count, masked, batch.maskable.sum()])
        quartile = (noised.t * QUARTILES).long().clamp(max=QUARTILES - 1)  # [B, L]
        is_in = noised.is_masked & (quartile == torch.arange(QUARTILES, device=nll.device)[:, None, None])  # [4, B, L]
        self._quartiles += torch.stack([torch.where(is_in, nll, 0.0).sum((1, 2)), is_in.sum((1, 2))])
        real = batch.document_ids >= 0
        # A document of n tokens has positions 0 … n − 1 and n² pairs: the sum of 2p + 1.
        self._work[:2] += torch.stack([real.sum(), ((2 * batch.position_ids + 1) * real).sum()])
        self._work[2] += masked

    def take_step(self, world_size: int) -> Tensor:
        """[4]: loss sum, loss count, masked and maskable tokens of all processes since the last call."""
        taken, self._step = self._step, torch.zeros_like(self._step)
        self._undivided = sum_over_processes(taken, world_size)[1]
        return taken

    def take_quartiles(self, world_size: int) -> Tensor:
        """[4] mean nll by quarter of t since the last call, over all processes; NaN without tokens."""
        taken, self._quartiles = self._quartiles, torch.zeros_like(self._quartiles)
        nll, tokens = sum_over_processes(taken, world_size)
        return nll / tokens

    def log_step(self, module: L.LightningModule) -> None:
        """Log the loss of the step that the last micro-batch ends, and what loggers write every `log_every_n_steps`."""
        trainer = module.trainer
        loss_sum, count, masked, maskable = self.take_step(trainer.world_size)
        loss, bar = loss_sum / count.clamp(min=1), trainer.progress_bar_callback
        # Lightning reads what another bar shows after every micro-batch: on the host it synchronizes once a step only.
        shown = bar is not None and not getattr(bar, "fetches_loss", False)
        module.log("train/loss", loss.cpu() if shown else loss, prog_bar=shown)
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:  # two calls of `log` take the host a tenth of a small step
            module.log("train/masked_fraction", masked / maskable.clamp(min=1))
            # A tensor on the host: Lightning would copy a number to the GPU, which synchronizes.
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            module.log("train/lr", torch.as_tensor(lr, dtype=torch.float32))
            for number, mean in enumerate(self.take_quartiles(trainer.world_size), start=1):
                module.log(f"train/nll_t_quartile_{number}", mean)

    def work(self) -> tuple[int, int, int]:
        """Tokens, attending pairs of positions and predictions since training started; synchronizes with the GPU."""
        return tuple(self._work.tolist())

    def divide_gradients(self, loss: Tensor, optimizer: torch.optim.Optimizer, world_size: int) -> None:
        """After the last micro-batch of a step, divide the gradients by the step's count, in place.

        Args:
            loss: that the backward pass started from.

        Raises:
            UserError: it is not the loss that `add` returned, divided by Lightning.
        """
        node, self._node = self._node, None
        if node is None:  # `training_step` is overridden, and its loss is an ordinary one
            return
        if loss.grad_fn is not node and node not in [before for before, _ in loss.grad_fn.next_functions]:
            raise UserError(
                "training_step changes the loss of DreamModule.training_step, whose gradients are not divided yet: "
                "override `loss` instead"
            )
        if self._undivided is not None:
            count, self._undivided = self._undivided, None
            factor = world_size / (GRADIENT_SCALE * count.clamp(min=1))  # strategies average over processes
            for parameter in parameters(optimizer):
                if parameter.grad is not None:
                    local(parameter.grad).mul_(factor)


class _ShownAs(torch.autograd.Function):
    """The value of `shown` with the gradient of `total`, both []."""

    @staticmethod
    def forward(ctx, total: Tensor, shown: Tensor) -> Tensor:
        return shown.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def ends_step(trainer: L.Trainer) -> bool:
    """Whether the micro-batch that is being processed is the last of its optimizer step."""
    done = trainer.fit_loop.epoch_loop.batch_progress
    is_last = done.is_last_batch or done.current.ready == trainer.num_training_batches  # the step may be a short one
    return is_last or done.current.ready % trainer.accumulate_grad_batches == 0


def logged_step(trainer: L.Trainer) -> int:
    """The step at which Lightning logs the scores of the weights in `fit`: the index of the last optimizer step.

    In the middle of a step, it is that of the step.
    """
    return max(trainer.global_step - ends_step(trainer), 0)
