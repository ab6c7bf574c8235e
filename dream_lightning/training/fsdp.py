"""How a run is spread over processes: the sharded strategy, and what is refused because it is not tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from dream_lightning.errors import UserError
from dream_lightning.training.sharded_checkpoint import is_sharded, read_into, read_rest, write


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimiser states divided over all processes; `trainer.strategy=fsdp2`.

    A checkpoint is a folder (see `sharded`) that any number of processes goes on from. Frozen weights, an
    adapter's base, are not in it.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(1, 1, process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        """One axis over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Sum gradients over processes at a step's last micro-batch only, where adapters train.

        Until then they are kept whole; of all weights they would take too much (31 GB for a 7B in float32).
        """
        adapted = not all(parameter.requires_grad for parameter in self.model.parameters())
        self.model.set_requires_gradient_sync(not adapted)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Take the module's optimiser.

        Raises:
            UserError: one that was not tested on divided weights.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
                raise UserError(
                    f"model.optimizer is {type(optimizer).__name__}, which is not tested on divided weights "
                    "(trainer.strategy fsdp2): set it to torch.optim.AdamW, whose states are divided too"
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's parts of what trains."""
        return get_model_state_dict(self.model, options=StateDictOptions(cpu_offload=True, ignore_frozen_params=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the folder.

        Raises:
            UserError: it could not be written.
        """
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        state = {"state_dict": checkpoint["state_dict"]}
        state |= {f"optimizer_{i}": s for i, s in enumerate(checkpoint.get("optimizer_states", []))}
        path = Path(self.broadcast(str(filepath)))
        write(state, rest, path, is_first=self.is_global_zero, agree=self.broadcast)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Put the folder's weights and optimiser states into place; the rest is returned. Always `weights_only`.

        Raises:
            UserError: a single file, or another model's or optimiser's checkpoint.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not is_sharded(path):
            raise UserError(
                f"{path} is not a sharded checkpoint, and trainer.strategy is fsdp2: go on with the strategy that "
                "saved it (auto on one device, ddp on several), or export it and name the folder in model.pretrained"
            )
        rest = read_rest(path)
        self.lightning_module.check_checkpoint(rest)
        if self.optimizers and "lr_schedulers" not in rest:
            raise UserError(f"{path} holds weights only (save_weights_only): training cannot go on from it")
        weights = {"state_dict": get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=True))}
        read_into(weights, path)
        self.model.load_state_dict(weights["state_dict"], strict=False)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            read_into(state, path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        return rest


def rescale_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let a checkpoint's progress in its epoch count micro-batches of this run, which may cut a step otherwise.

    With another number of processes, a step of as many rows takes another number of micro-batches; Lightning counts
    these.

    Args:
        checkpoint: changed in place.
        accumulate: micro-batches of a step now.
    """
    before = checkpoint.get("accumulate_grad_batches", accumulate)
    if before == accumulate:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name, count in counts.items():
            counts[name] = -(-count // before) * accumulate  # the last step of an epoch may be a short one


def sum_over_processes(tensor: Tensor, world_size: int) -> Tensor:
    """The sum of all processes' tensors, in place. Lightning's own way has a barrier, where each waits for its GPU."""
    if world_size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def ignore_frozen_in_ddp(module: torch.nn.Module) -> None:
    """Keep DDP from sending frozen weights and buffers: every process has read them from the same files.

    It would send them all at the start, and buffers again at every step: the scales of 4-bit layers, and of 8-bit ones
    half the weights, in a type that process groups may not know.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen + buffers)


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2 over all processes", override=True)

_INSTEAD = {
    "ModelParallelStrategy": "set trainer.strategy=fsdp2, which is it over all processes with checkpoints that last",
    "FSDPStrategy": "set trainer.strategy=fsdp2, its successor",
    "DeepSpeedStrategy": "set trainer.strategy=fsdp2, which divides weights and optimiser as ZeRO 3 does",
}


def refuse_divided(*, quantized: bool, compiled_answers: bool) -> None:
    """Refuse what divided weights cannot do.

    Raises:
        UserError: what was got, and what to use instead.
    """
    if quantized:
        raise UserError("trainer.strategy is fsdp2, but quantised weights are not divided: set trainer.strategy=ddp")
    if compiled_answers:  # sampling refuses it too, once everything is loaded
        raise UserError("trainer.strategy is fsdp2, but graphs gather no weights: set model.sampling.compile=false")


def refuse_untested(trainer: L.Trainer, *, adapted: bool, quantized: bool, compiled_answers: bool = False) -> None:
    """Stop a run before anything is loaded whose strategy, precision and kind of training were not tested together.

    Raises:
        UserError: what was got, and what to use instead; a trainer's number that makes no sense and that Lightning
            lets through.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    name = type(strategy).__name__
    sharded = isinstance(strategy, FSDP2Strategy)
    if not sharded and type(strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeedStrategy is a DDPStrategy
        instead = _INSTEAD.get(name, "use one device, or set trainer.strategy to ddp or fsdp2 on several")
        raise UserError(f"trainer.strategy is {name}, which is not tested here: {instead}")
    if sharded:
        refuse_divided(quantized=quantized, compiled_answers=compiled_answers)
    if adapted and precision == "bf16-true":
        raise UserError("trainer.precision bf16-true would round the adapters: set it to bf16-mixed")
    tested = ("32-true", "bf16-mixed") if sharded else ("32-true", "bf16-mixed", "bf16-true")
    if precision not in tested:
        raise UserError(f"trainer.precision is {precision}, not tested with {name}: set it to {' or '.join(tested)}")
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    if algorithm not in (None, "norm"):
        raise UserError(f"trainer.gradient_clip_algorithm is {algorithm}, wanted norm, or none at all")
    if not (trainer.gradient_clip_val or 0) >= 0:  # it would turn the gradients round
        raise UserError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, wanted a norm above 0, such as 1.0, or null"
        )
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, wanted at least 1: the "
            "micro-batches of a step"
        )
