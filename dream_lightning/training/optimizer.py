"""AdamW for all weights of a 7B model on one 80 GB card: bfloat16 weights, 8-bit moments, no update lost."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dream_lightning.errors import UserError

BLOCK = 256  # elements of a moment that share a scale
SMALL = 4096  # smaller parameters (biases, norms), and those that do not fill their blocks, keep float32 moments
_NO_LOW_BITS = -(2**15)  # the low-order bits of a float32 number that is a bfloat16 number

Levels = tuple[Tensor, Tensor]  # what 8-bit codes stand for, [256] rising, and the middles between neighbors [255]


def in_8_bits(p: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    return p.numel() >= SMALL and p.numel() % BLOCK == 0


def decay_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: those with one dimension (norms, biases) get no weight decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Set gradients to zero in place, also between a forward and its backward pass."""
    for p in parameters:
        if p.grad is not None:
            # `data` has its own version counter: autograd does not see a change of what it saved for the backward pass.
            p.grad.data.zero_()


def adamw(params: Iterable[Any]) -> torch.optim.AdamW:
    """The default optimizer; a named function, because a saved config.yaml cannot hold a lambda."""
    return torch.optim.AdamW(params, lr=2e-6, betas=(0.9, 0.95), weight_decay=0.01)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 8-bit moments (arXiv:2110.02861) over exact float32 master weights.

    At lr 2e-6 an update is a fiftieth of the distance between two bfloat16 numbers near 0.02, so bfloat16 weights
    alone never move. A bfloat16 weight is the upper half of a float32 number; the low-order 16 bits are kept here.
    Together they are the float32 master weight, and the model computes with its nearest bfloat16 number, as it would
    under `bf16-mixed`. A resumed run is the same to the bit. Stochastic rounding would save the 2 bytes, but at this lr
    its noise on a weight grows as large as what the weight learns. Float32 parameters need no low-order bits.

    Bytes per parameter: weight 2, gradient 2, moments 2.03, low-order bits 2; for Dream 7B 57 GiB, so that 80 GB leave
    20 GiB for activations (float32 weights, gradients and AdamW take 114 GiB). On a GPU a parameter's update is
    compiled into one kernel, which reads and writes every number once and takes no memory.

    Args:
        params: parameters or groups, in bfloat16 or float32.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step multiplies the weights by 1 − lr · weight_decay.

    Raises:
        UserError: a parameter of another dtype, or sharded; at the first step, less free memory on the GPU than the
            optimizer's state needs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise UserError(
                f"lr is {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: wanted lr and weight_decay of at "
                "least 0, eps above 0, and betas from 0 to below 1"
            )
        self._levels: dict[torch.device, tuple[Levels, Levels]] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for p in self._parameters():
            if isinstance(p, DTensor):
                raise UserError(
                    "the weights are sharded, and a shard does not fill whole blocks of moments: set model.optimizer "
                    "to torch.optim.AdamW, as in configs/fsdp_full.yaml"
                )
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise UserError(f"a parameter is {p.dtype}, wanted bfloat16 or float32: set model.dtype to bfloat16")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state:
            self._check_memory()
        for group in self.param_groups:
            numbers: dict[tuple, Tensor] = {}  # one copy to the device for all parameters with the same step
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(self._new_state(p))
                state["step"] += 1
                key = (state["step"], p.device)
                if key not in numbers:
                    numbers[key] = _numbers(group, state["step"]).to(p.device, non_blocking=True)
                self._update(p, state, numbers[key])
        return loss

    def _update(self, p: Tensor, state: dict[str, Any], numbers: Tensor) -> None:
        update = _compiled_update if p.is_cuda else adamw_update
        shape = state["moment1"].shape
        update(
            p.view(shape),
            p.grad.reshape(shape),
            state.get("low_bits"),
            *(state["moment1"], state.get("scale1"), state["moment2"], state.get("scale2")),
            *(*self._levels_on(p.device), numbers),
        )

    def _levels_on(self, device: torch.device) -> tuple[Levels, Levels]:
        """Of the first and of the second moment."""
        if device not in self._levels:
            both = (dynamic_levels(signed=signed).to(device) for signed in (True, False))
            self._levels[device] = tuple((levels, (levels[1:] + levels[:-1]) / 2) for levels in both)
        return self._levels[device]

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        shape = (p.numel() // BLOCK, BLOCK) if in_8_bits(p) else (p.numel(),)
        if p.dtype == torch.bfloat16:
            state["low_bits"] = torch.full(shape, _NO_LOW_BITS, dtype=torch.int16, device=p.device)
        for i, (levels, _) in enumerate(self._levels_on(p.device), 1):
            if in_8_bits(p):
                zero = int(levels.abs().argmin())
                state[f"moment{i}"] = torch.full(shape, zero, dtype=torch.uint8, device=p.device)
                state[f"scale{i}"] = torch.zeros(shape[0], 1, device=p.device)
            else:
                state[f"moment{i}"] = torch.zeros(shape, device=p.device)
        return state

    def _check_memory(self) -> None:
        """Say what the state needs before the GPU runs out of memory in the middle of the first step."""
        for device in {p.device for p in self._parameters() if p.is_cuda}:
            here = [p for p in self._parameters() if p.device == device and p.requires_grad]
            needed = sum(p.numel() * (2 + 8 / BLOCK + 2 * (p.dtype == torch.bfloat16)) for p in here)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            if needed > free:
                raise UserError(
                    f"the optimizer's state needs {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are "
                    "free next to weights and gradients: train adapters (model.lora), or shard over several GPUs"
                )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but keeps the dtype of every state, which torch would cast to that of the parameter.

        Raises:
            UserError: the states are of parameters of another size or dtype.
        """
        super().load_state_dict({**state_dict, "state": {}})
        self._check_memory()
        parameters = self._parameters()
        for i, saved in state_dict["state"].items():
            state = self.state[parameters[i]] = self._new_state(parameters[i])
            if _shapes(saved) != _shapes(state):
                raise UserError(
                    f"the saved states of parameter {i} are {_shapes(saved)}, here {_shapes(state)}: resume with the "
                    "model.dtype of the run that saved them, low_bits is half of a bfloat16 weight"
                )
            for name, value in saved.items():
                state[name] = state[name].copy_(value) if isinstance(value, Tensor) else value


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(state.items()) if isinstance(value, Tensor)}


def _numbers(group: dict[str, Any], step: int) -> Tensor:
    """The scalars of a step in one tensor: they change from step to step, and compiled code stays."""
    beta1, beta2 = group["betas"]
    return torch.tensor(
        [group["lr"], group["weight_decay"], group["eps"], beta1, beta2, 1 - beta1**step, 1 - beta2**step]
    )


def dynamic_levels(*, signed: bool) -> Tensor:
    """The numbers that 8-bit codes stand for, [256] float32 rising, dense near zero (arXiv:2110.02861, section 1.3).

    Seven decades below 1, each with twice as many linearly spaced levels as the one below it, 0 and 1. Equal to
    bitsandbytes' `create_dynamic_map`.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32)
        decade = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [decade, -decade] if signed else [decade]
    return torch.cat(levels).sort().values


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    low_bits: Tensor | None,
    moment1: Tensor,
    scale1: Tensor | None,
    moment2: Tensor,
    scale2: Tensor | None,
    signed: Levels,
    unsigned: Levels,
    numbers: Tensor,
) -> None:
    """One AdamW step of one parameter, in place: C blocks with 8-bit moments, or without scales any shape.

    Args:
        weight, gradient: [C, BLOCK] bfloat16 or float32.
        low_bits: [C, BLOCK] int16, of bfloat16 weights.
        moment1, moment2: [C, BLOCK] uint8 codes, or float32 where there are no scales.
        scale1, scale2: [C, 1] float32.
        signed, unsigned: what the codes of moment1 and moment2 stand for.
        numbers: [7] float32 of `_numbers`.
    """
    if scale1 is not None:
        # Makes constants of them in compiled code. It is one kernel only with rows of a constant length that come in
        # as rows: with views of [N] in here it is nine, which take up to 16 bytes an element for a moment.
        assert weight.shape[1] == BLOCK and len(signed[1]) == len(unsigned[1]) == BLOCK - 1
    lr, weight_decay, eps, beta1, beta2, correction1, correction2 = numbers.unbind()
    master = weight if low_bits is None else join(weight, low_bits)
    g = gradient.float()
    first = beta1 * decode(moment1, scale1, signed) + (1 - beta1) * g
    second = beta2 * decode(moment2, scale2, unsigned) + (1 - beta2) * g * g
    change = (first / correction1) / ((second / correction2).sqrt() + eps) + weight_decay * master
    master = master - lr * change
    encode(first, moment1, scale1, signed)
    encode(second, moment2, scale2, unsigned)
    if low_bits is None:
        weight.copy_(master)
    else:
        split(master, weight, low_bits)


# torch 2.11's own choice for such a kernel, 32 elements a thread, runs out of registers on an H100: 255 and spills, 8
# of 64 warps at work. Tuning, at the first step, also tries 4 elements a thread: 62 registers.
_compiled_update = torch.compile(adamw_update, dynamic=True, options={"max_autotune_pointwise": True})


def decode(codes: Tensor, scales: Tensor | None, levels: Levels) -> Tensor:
    """8-bit codes [C, BLOCK] with scales [C, 1] → numbers [C, BLOCK]; without scales they are numbers already."""
    return codes if scales is None else levels[0][codes.int()] * scales


def encode(numbers: Tensor, codes: Tensor, scales: Tensor | None, levels: Levels) -> None:
    """Write numbers [C, BLOCK] as the codes of their nearest levels; the largest of a block is its scale."""
    if scales is None:
        codes.copy_(numbers)
        return
    largest = numbers.abs().amax(-1, keepdim=True)
    codes.copy_(torch.bucketize(numbers / largest.clamp(min=1e-38), levels[1], out_int32=True))
    scales.copy_(largest)


def split(master: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Write float32 numbers as their nearest bfloat16 numbers and 16 low-order bits, all of one shape.

    The upper 16 bits of a float32 number are a bfloat16 number. Half a unit of its last place is added first, so that
    cutting off the lower bits rounds to nearest, ties away from zero; the low-order bits are what is cut off.
    """
    bits = master.view(torch.int32) + 2**15
    weight.view(torch.int16).copy_(bits >> 16)
    low_bits.copy_(bits)


def join(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 numbers that `split` wrote, bit for bit."""
    upper, lower = weight.view(torch.int16).int() << 16, low_bits.int() & 0xFFFF
    return ((upper | lower) - 2**15).view(torch.float32)
