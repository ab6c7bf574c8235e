"""AdamW for all weights of a 7B model on one 80 GB card: bfloat16 weights, 8-bit moments, no update lost."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dream_lightning.errors import UserError, check_range

BLOCK = 256  # elements of a moment that share a scale
SMALL = 4096  # smaller parameters (biases, norms), and those that do not fill their blocks, keep float32 moments

Moment = tuple[Tensor, Tensor | None]  # codes [C, BLOCK] uint8 with scales [C, 1], or float32 numbers without
Levels = tuple[Tensor, Tensor]  # what 8-bit codes stand for, [256] rising, and the middles between neighbors [255]


def in_8_bits(p: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    return p.numel() >= SMALL and p.numel() % BLOCK == 0


def decay_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: those with one dimension (norms, biases) get no weight decay."""
    parameters = list(parameters)
    decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return [g for g in ({"params": decayed}, {"params": others, "weight_decay": 0.0}) if g["params"]]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for numbers out of range, a learning rate of 0, and bfloat16 weights that it does not train."""
    for name, value in optimizer.defaults.items():
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_range(f"model.optimizer.{name}", number, least=0)
    if not all(group["lr"] for group in optimizer.param_groups):
        raise UserError("model.optimizer.lr is 0: nothing would be learned; use validate to score a model")
    if not isinstance(optimizer, AdamW8bit) and any(p.dtype == torch.bfloat16 for p in parameters(optimizer)):
        raise UserError(
            f"model.optimizer {type(optimizer).__name__} loses small updates of bfloat16 weights: set it to "
            "dream_lightning.training.optimizer.AdamW8bit, or model.dtype to float32"
        )


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Set gradients to zero in place, also between a forward and its backward pass."""
    for p in parameters:
        if p.grad is not None:
            # `data` has its own version counter: autograd does not see a change of what it saved for the backward pass.
            p.grad.data.zero_()


def adamw(params: Iterable[Any]) -> torch.optim.AdamW:
    """The default optimizer; a named function, because a saved config.yaml cannot hold a lambda."""
    return torch.optim.AdamW(params, lr=2e-6, betas=(0.9, 0.95), weight_decay=0.01)


def lr_factor(step: int, *, shape: str, warmup: int, steps: int) -> float:
    """Factor of the learning rate, as that of `transformers.get_scheduler`, whose import takes 2 s."""
    if step < warmup:
        return step / warmup
    if shape == "constant_with_warmup":
        return 1.0
    if shape == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup))))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 8-bit moments (arXiv:2110.02861) over exact float32 master weights.

    At lr 2e-6 an update is a fiftieth of the distance between two bfloat16 numbers near 0.02, so bfloat16 weights alone
    never move. The optimizer keeps the low-order 16 bits: with them a bfloat16 weight is its float32 master weight, and
    the model computes with the nearest bfloat16 number, as under `bf16-mixed`. Stochastic rounding would save these 2
    bytes, but at this lr its noise on a weight grows as large as what the weight learns.

    Bytes per parameter: weight 2, gradient 2, moments 2.03, low-order bits 2; for Dream 7B 57 GiB (float32 weights,
    gradients and AdamW take 114 GiB). On a GPU a parameter's update is compiled into one kernel, which reads and writes
    every number once and takes no memory.

    Raises UserError for an option out of its range, and for parameters that are sharded or of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        check_optimizer(self)
        if eps == 0 or max(betas) >= 1:
            raise UserError(f"eps is {eps} and betas are {betas}, wanted eps above 0 and betas below 1")
        for p in parameters(self):
            if isinstance(p, DTensor):
                raise UserError("the weights are sharded, wanted whole ones: set model.optimizer to torch.optim.AdamW")
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise UserError(f"a parameter is {p.dtype}, wanted bfloat16 or float32: set model.dtype to bfloat16")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(_new_state(p))
        state["step"] += 1
        corrections = (1 - beta ** state["step"] for beta in group["betas"])
        scalars = [group["lr"], group["weight_decay"], group["eps"], *group["betas"], *corrections]
        scalars = torch.tensor(scalars).to(p.device, non_blocking=True)  # compiled code would hold Python numbers fixed
        moments = [(state[f"moment{i}"], state.get(f"scale{i}")) for i in (1, 2)]
        shape = state["moment1"].shape
        update = _compiled_update() if p.is_cuda else adamw_update
        update(p.view(shape), p.grad.reshape(shape), state.get("low_bits"), moments, levels_on(p.device), scalars)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast states to the parameter's dtype; UserError for those of another dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        for i, saved in state_dict["state"].items():
            p = parameters(self)[i]
            if (p.dtype == torch.bfloat16) != ("low_bits" in saved):
                raise UserError(f"parameter {i} is {p.dtype}, its state is not: use the model.dtype of the saved run")
            self.state[p] = {k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _new_state(p: Tensor) -> dict[str, Any]:
    shape = (p.numel() // BLOCK, BLOCK) if in_8_bits(p) else (p.numel(),)
    state: dict[str, Any] = {"step": 0}
    if p.dtype == torch.bfloat16:
        # `split` of a bfloat16 number
        state["low_bits"] = torch.full(shape, -(2**15), dtype=torch.int16, device=p.device)
    for i, (levels, _) in enumerate(levels_on(p.device), 1):
        state[f"moment{i}"] = torch.zeros(shape, device=p.device)
        if in_8_bits(p):
            state[f"moment{i}"] = torch.full(shape, int(levels.abs().argmin()), dtype=torch.uint8, device=p.device)
            state[f"scale{i}"] = torch.zeros(shape[0], 1, device=p.device)
    return state


@cache
def levels_on(device: torch.device) -> list[Levels]:
    both = (dynamic_levels(signed=signed).to(device) for signed in (True, False))
    return [(levels, (levels[1:] + levels[:-1]) / 2) for levels in both]


def dynamic_levels(*, signed: bool) -> Tensor:
    """The numbers that 8-bit codes stand for, [256] float32 rising, dense near zero (arXiv:2110.02861, section 1.3).

    Seven decades below 1, each with twice as many linearly spaced levels as the one below it, 0 and 1. Equal to
    bitsandbytes' `create_dynamic_map`.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        decade = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [decade, -decade] if signed else [decade]
    return torch.cat(levels).sort().values


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    low_bits: Tensor | None,
    moments: list[Moment],
    levels: list[Levels],
    scalars: Tensor,
) -> None:
    """One AdamW step of one parameter, in place.

    Args:
        weight, gradient: [C, BLOCK] bfloat16 or float32; any shape where moments have no scales.
        low_bits: [C, BLOCK] int16, of bfloat16 weights.
        scalars: [7] float32: lr, weight_decay, eps, the betas and their bias corrections.
    """
    if moments[0][1] is not None:
        # Makes constants of them in compiled code. It is one kernel only with rows of a constant length that come in
        # as rows: with views of [N] in here it is nine, which take up to 16 bytes an element for a moment.
        assert weight.shape[1] == BLOCK and len(levels[0][1]) == len(levels[1][1]) == BLOCK - 1
    lr, weight_decay, eps, beta1, beta2, correction1, correction2 = scalars.unbind()
    master = weight if low_bits is None else join(weight, low_bits)
    g = gradient.float()
    first = beta1 * decode(moments[0], levels[0]) + (1 - beta1) * g
    second = beta2 * decode(moments[1], levels[1]) + (1 - beta2) * g * g
    change = (first / correction1) / ((second / correction2).sqrt() + eps) + weight_decay * master
    master = master - lr * change
    encode(first, moments[0], levels[0])
    encode(second, moments[1], levels[1])
    if low_bits is None:
        weight.copy_(master)
    else:
        split(master, weight, low_bits)


@cache
def _compiled_update() -> Callable[..., None]:
    # torch 2.11's own choice for such a kernel, 32 elements a thread, runs out of registers on an H100: 255 and spills,
    # 8 of 64 warps at work. Tuning, at the first step, also tries 4 elements a thread: 62 registers.
    return torch.compile(adamw_update, dynamic=True, options={"max_autotune_pointwise": True})


def decode(moment: Moment, levels: Levels) -> Tensor:
    """The numbers of a moment."""
    codes, scales = moment
    return codes if scales is None else levels[0][codes.int()] * scales


def encode(numbers: Tensor, moment: Moment, levels: Levels) -> None:
    """Write numbers as the codes of their nearest levels; the largest of a block is its scale."""
    codes, scales = moment
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
