"""Several processes: the FSDP2 strategy, sharding and reading shards, DDP, and what is refused as untested."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dream_lightning.errors import UserError, check_range
from dream_lightning.model import DreamModel
from dream_lightning.model.loading import check_finite
from dream_lightning.training.checkpointing import check_checkpoint, refuse_weights
from dream_lightning.training.sharded_checkpoint import read_into, read_rest, write


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer states sharded over all processes; `trainer.strategy=fsdp2`.

    A checkpoint is a folder without frozen weights (see `sharded_checkpoint`); any number of processes resumes from it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(1, 1, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Reduce the gradients of adapters once a step. Those of all weights would take 31 GB unreduced for a 7B."""
        adapted = not all(parameter.requires_grad for parameter in self.model.parameters())
        self.model.set_requires_gradient_sync(not adapted)
        yield
        self.model.set_requires_gradient_sync(True)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
                raise UserError(
                    f"model.optimizer is {type(optimizer).__name__}, not tested with trainer.strategy fsdp2: set it to "
                    "torch.optim.AdamW"
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's shards of what trains."""
        return get_model_state_dict(self.model, options=StateDictOptions(cpu_offload=True, ignore_frozen_params=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        state = {"state_dict": checkpoint["state_dict"]}
        state |= {f"optimizer_{i}": s for i, s in enumerate(checkpoint.get("optimizer_states", []))}
        path = Path(self.broadcast(str(filepath)))
        write(state, rest, path, self)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the folder's weights and optimizer states and return the rest. Always `weights_only`."""
        path = Path(self.broadcast(str(checkpoint_path)))
        refuse_weights(path)
        if path.is_file():
            raise UserError(
                f"{path} is not a sharded checkpoint, as trainer.strategy fsdp2 needs: use the strategy that saved it, "
                "or export it and name the folder in model.pretrained"
            )
        rest = read_rest(path)
        check_checkpoint(rest, self.lightning_module)
        if self.optimizers and "lr_schedulers" not in rest:
            raise UserError(f"{path} holds weights only (save_weights_only): training cannot resume from it")
        state = {"state_dict": get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=True))}
        state |= {f"optimizer_{i}": get_optimizer_state_dict(self.model, o) for i, o in enumerate(self.optimizers)}
        read_into(state, path)
        self.model.load_state_dict(state["state_dict"], strict=False)
        for i, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        return rest


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2 over all processes", override=True)


def refuse_sharded(*, quantized: bool, compiled_answers: bool) -> None:
    """Raise UserError for what sharded weights cannot do."""
    if quantized:
        raise UserError("trainer.strategy is fsdp2, but quantized weights are not sharded: set trainer.strategy=ddp")
    if compiled_answers:
        raise UserError("trainer.strategy is fsdp2, but graphs need whole weights: set model.sampling.compile=false")


def refuse_untested(trainer: L.Trainer, *, adapted: bool, quantized: bool, compiled_answers: bool = False) -> None:
    """Raise UserError for strategies, precisions and kinds of training that are not tested together."""
    strategy, name, precision = trainer.strategy, type(trainer.strategy).__name__, str(trainer.precision)
    sharded = isinstance(strategy, FSDP2Strategy)
    if sharded:
        refuse_sharded(quantized=quantized, compiled_answers=compiled_answers)
    tested = ("32-true", "bf16-mixed") if sharded else ("32-true", "bf16-mixed", "bf16-true")
    clip_by = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    refusals = [
        (
            not sharded and type(strategy) not in (SingleDeviceStrategy, DDPStrategy),  # DeepSpeedStrategy is a DDP one
            f"trainer.strategy is {name}, which is not tested: set it to fsdp2 or ddp on several devices, auto on one",
        ),
        (adapted and precision == "bf16-true", "trainer.precision bf16-true would round the adapters: set bf16-mixed"),
        (
            precision not in tested,
            f"trainer.precision is {precision}, not tested with {name}: set {' or '.join(tested)}",
        ),
        (clip_by not in (None, "norm"), f"trainer.gradient_clip_algorithm is {clip_by}, wanted norm, or none at all"),
    ]
    for refused, message in refusals:
        if refused:
            raise UserError(message)


def check_trainer(trainer: L.Trainer) -> None:
    """Raise UserError for options of a Trainer with which it would train nothing, or fail later."""
    check_range("trainer.gradient_clip_val", trainer.gradient_clip_val, least=0)
    check_range("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, least=1)
    check_range("trainer.log_every_n_steps", trainer.log_every_n_steps, least=0)
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, which replaces the order of the data and with it "
            "the noise: set data.first_n to a few rows instead"
        )
    limits = {name: getattr(trainer, name) for name in ("max_steps", "max_epochs", "limit_train_batches")}
    for name, limit in limits.items() if trainer.state.fn == "fit" else ():
        if limit == 0:
            raise UserError(f"trainer.{name} is 0: nothing would be trained; use validate to score a model")


def ignore_frozen_in_ddp(module: nn.Module) -> None:
    """Keep DDP from broadcasting frozen weights and buffers, whose dtypes process groups may not support."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen + buffers)


def sum_over_processes(tensor: Tensor, world_size: int) -> Tensor:
    """The sum of all processes' tensors, in place. Lightning's own has a barrier, which synchronizes with the GPU."""
    if world_size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def shard(
    model: DreamModel, root: nn.Module, *, mesh: DeviceMesh, compute_dtype: torch.dtype | None, steps: Iterable[str]
) -> None:
    """Shard every weight over the processes of a one-dimensional mesh, by rows.

    The embeddings, each decoder layer, and the rest (last norm and head) with `root` are gathered as units. A step of
    training or validation is one forward of `root`, so the head is gathered once however often it runs, and every
    process makes the same collectives as long as it calls `model.model` equally often. Frozen embeddings and head stay
    gathered, because no computation would hide their communication. Gradients are reduced in float32.

    Args:
        model: whole, or on the meta device (see `read_shards`); its layers may be compiled already.
        root: the module that holds `model` and calls it in its methods `steps`.
        compute_dtype: dtype of gathered weights, such as bfloat16 over float32 masters; None keeps the weights' own.
    """
    # Inputs are not cast: the token weights of a batch must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ends = (model.model.embed_tokens, model.model.norm, model.lm_head)
    kept = not any(parameter.requires_grad for end in ends for parameter in end.parameters())
    fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if layer._compiled_call_impl is not None:
            layer.register_forward_pre_hook(_same_input_when_recomputed)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for unit in (model.model.embed_tokens, root):
        unit.set_reshard_after_backward(not kept, recurse=False)
    for step in steps:
        register_fsdp_forward_method(root, step)


@torch.compiler.disable
def _same_input_when_recomputed(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # FSDP2 replaces an input by a view without the mark for a dynamic length, but not in recomputation.
    if not layer.training:
        return None
    x = inputs[0].view_as(inputs[0])
    torch._dynamo.maybe_mark_dynamic(x, 1)
    return (x, *inputs[1:])


def read_shards(model: DreamModel, files: dict[str, Path], device: torch.device) -> None:
    """Fill the weights of a sharded model that are on the meta device; each process reads only its own rows.

    Args:
        files: tensor name → safetensors file, as `loading.weight_files` finds them.
        device: where the weights go.
    """
    empty = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    # adapters rename the layers that they wrap
    state = {name: _own_rows(p, files, name.replace(".base_layer.", "."), device) for name, p in empty.items()}
    model.load_state_dict(state, strict=False, assign=True)


def _own_rows(parameter: DTensor, files: dict[str, Path], name: str, device: torch.device) -> DTensor:
    mesh, count = parameter.device_mesh, parameter.shape[0]
    share = -(-count // mesh.size())  # as FSDP2 shards: the last processes get fewer rows or none
    start, stop = (min(rank * share, count) for rank in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    rows = torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
    if stop > start:
        # Opened for each tensor, because pages of a mapped file count as this process's memory until it is closed.
        with safe_open(files[name], framework="pt") as file:
            rows = file.get_slice(name)[start:stop].to(device, parameter.dtype, copy=True)
            check_finite(name, rows, files[name])
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(rows, mesh, parameter.placements, run_check=False, **shape)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; a plain tensor unmodified."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call this; a plain tensor unmodified."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
