"""A model divided over processes with FSDP2: what is gathered together, and how each process reads its own part."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dream_lightning.model.modeling import DreamModel


def shard(
    model: DreamModel, root: nn.Module, *, mesh: DeviceMesh, compute_dtype: torch.dtype | None, steps: Iterable[str]
) -> None:
    """Divide every weight over the processes of a one-dimensional mesh, by rows.

    Units of gathering are the embeddings, each decoder layer, and what is left (last norm and head) with `root`. A
    whole step of training or validation is one forward of `root`, so the head is gathered once a step, however often
    it runs in it: in chunks, at every step of denoising, or not at all where one process has nothing masked. That
    every process makes the same number of collectives then follows from the same number of `model.model` calls.
    Embeddings and head that do not train are gathered once and kept, as nothing is computed that would hide it.

    Args:
        model: whole, or on the meta device (see `read_shards`); its layers may be compiled already.
        root: the module that holds `model` and calls it, such as a LightningModule.
        mesh: of the data-parallel processes.
        compute_dtype: of gathered weights, such as bfloat16 over float32 masters; None leaves their own. Gradients
            are summed in float32.
        steps: names of the methods of `root` that call the model.
    """
    # No casting of inputs: token weights of a batch must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ends = (model.model.embed_tokens, model.model.norm, model.lm_head)
    kept = not any(parameter.requires_grad for end in ends for parameter in end.parameters())
    fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if layer._compiled_call_impl is not None:
            layer.register_forward_pre_hook(_one_kind_of_input)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for unit in (model.model.embed_tokens, root):
        unit.set_reshard_after_backward(not kept, recurse=False)
    for step in steps:
        register_fsdp_forward_method(root, step)


@torch._dynamo.disable
def _one_kind_of_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the compiler see the same in a forward and where it is recomputed, and that lengths vary.

    FSDP2 hands an input that needs a gradient on as a view without the model's mark, but not in recomputation. So each
    layer would be compiled twice, the first time for the length of the first row.
    """
    if not layer.training:
        return None
    x = inputs[0].view_as(inputs[0])
    torch._dynamo.maybe_mark_dynamic(x, 1)
    return (x, *inputs[1:])


def read_shards(
    model: DreamModel, files: dict[str, Path], *, device: torch.device, official_name: Callable[[str], str]
) -> None:
    """Fill the weights of a divided model that are still on the meta device, each process its own rows only.

    Beyond the result a process holds one part of one tensor (0.5 GiB for the head of the 7B on two processes).

    Args:
        files: tensor name → safetensors file, as `loading.weight_files` finds them.
        device: where the weights go.
        official_name: of a parameter, which adapters rename.
    """
    empty = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    state = {name: _own_rows(p, files, official_name(name), device) for name, p in empty.items()}
    model.load_state_dict(state, strict=False, assign=True)


def _own_rows(parameter: DTensor, files: dict[str, Path], name: str, device: torch.device) -> DTensor:
    mesh, count = parameter.device_mesh, parameter.shape[0]
    share = -(-count // mesh.size())  # as FSDP2 divides: the last processes get less, or nothing
    start = min(mesh.get_local_rank() * share, count)
    stop = min(start + share, count)
    rows = torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
    if stop > start:
        # Opened for each tensor, because pages of a mapped file count as this process's memory until it is closed.
        with safe_open(files[name], framework="pt") as file:
            rows = file.get_slice(name)[start:stop].to(device, parameter.dtype, copy=True)
    return DTensor.from_local(
        rows, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def agree(model: nn.Module) -> None:
    """Give every process the weights of the first, where they were drawn at random; before `shard`."""
    for parameter in model.parameters():
        torch.distributed.broadcast(parameter.detach(), src=0)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor gathered from all processes, which must all call this; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
