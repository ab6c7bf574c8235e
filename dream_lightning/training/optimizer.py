"""AdamW for all weights of a 7B model on one 80 GB card: bfloat16 weights, 8-bit moments, no update lost."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dream_lightning.errors import UserError

BLOCK = 256  # elements of a moment that share a scale
SMALL = 4096  # smaller parameters (biases, norms), and those that do not fill their blocks, keep float32 moments
PAGED = 100_000  # elements from which moments are worth paging
_NO_TAIL = -(2**15)  # the tail of a float32 number that is a bfloat16 number


Levels = tuple[Tensor, Tensor]  # what 8-bit codes stand for, [256] rising, and the middles between neighbours [255]


def in_8_bits(p: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    return p.numel() >= SMALL and p.numel() % BLOCK == 0


def decay_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser: those with one dimension (norms, biases) get no weight decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(params: Iterable[Any]) -> torch.optim.AdamW:
    """The default optimiser; a function with a name, which a saved config.yaml can hold and a lambda it cannot."""
    return torch.optim.AdamW(params, lr=2e-6, betas=(0.9, 0.95), weight_decay=0.01)


class PagedAdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 8-bit moments (arXiv:2110.02861) over exact float32 master weights.

    At lr 2e-6 an update is a fiftieth of the distance between two bfloat16 numbers near 0.02, so bfloat16 weights
    alone never move. A bfloat16 weight is the upper half of a float32 number; the lower half is kept here as a "tail"
    of 16 bits. Together they are the float32 master weight, and the model computes with its nearest bfloat16 number,
    as it would under `bf16-mixed`. Nothing is lost, weight decay included, and nothing is random: a resumed run is the
    same to the bit. Stochastic rounding would save the tail's 2 bytes, but at this lr its noise on a weight grows as
    large as what the weight learns. Parameters in float32 are updated as they are.

    Gradients are what they find: of bfloat16 weights, summed over micro-batches in bfloat16, in `DreamModule` on one
    device by the products that make them, which round the sum once (`adapters.accumulation`).

    Bytes a parameter: weight 2, gradient 2, moments 2.03, tail 2; for Dream 7B 57 GiB, so that 80 GB leave 20 GiB for
    activations (float32 weights, gradients and AdamW take 114 GiB). Moments of large parameters lie in paged memory,
    which the card lends out when activations need it for a moment. On a GPU a parameter's update is compiled into one
    kernel, which reads and writes every number once and takes no memory.

    Args:
        params: parameters or groups, in bfloat16 or float32.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step multiplies the weights by 1 − lr · weight_decay.

    Raises:
        UserError: bitsandbytes is not installed; a parameter of another dtype, or divided over processes; at the
            first step, less free memory on the GPU than the optimiser's state needs.
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
        self._library = _bitsandbytes().functional
        self._pages: dict[int, Tensor] = {}  # by address, what the library knows of paged moments
        self._levels: dict[torch.device, tuple[Levels, Levels]] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for p in self._parameters():
            if isinstance(p, DTensor):
                raise UserError(
                    "the weights are divided over processes, whose blocks of moments would not be whole: set "
                    "model.optimizer to torch.optim.AdamW, as in configs/fsdp_full.yaml"
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
            numbers: dict[tuple, Tensor] = {}  # one copy to the device for all parameters that took as many steps
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
        for name in ("moment1", "moment2"):
            if (address := state[name].data_ptr()) in self._pages:
                self._library.prefetch_tensor(self._pages[address])
        update = _compiled_update if p.is_cuda else adamw_update
        shape = state["moment1"].shape
        update(
            p.view(shape),
            p.grad.reshape(shape),
            state.get("tail"),
            *(state["moment1"], state.get("scale1"), state["moment2"], state.get("scale2")),
            *(*self._levels_on(p.device), numbers),
        )

    def _levels_on(self, device: torch.device) -> tuple[Levels, Levels]:
        """Of the first and of the second moment."""
        if device not in self._levels:
            both = (self._library.create_dynamic_map(signed).to(device) for signed in (True, False))
            self._levels[device] = tuple((levels, (levels[1:] + levels[:-1]) / 2) for levels in both)
        return self._levels[device]

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        shape = (p.numel() // BLOCK, BLOCK) if in_8_bits(p) else (p.numel(),)
        if p.dtype == torch.bfloat16:
            state["tail"] = torch.full(shape, _NO_TAIL, dtype=torch.int16, device=p.device)
        for i, (levels, _) in enumerate(self._levels_on(p.device), 1):
            if in_8_bits(p):
                zero = int(levels.abs().argmin())
                state[f"moment{i}"] = self._new_moment(p).fill_(zero).view(shape)
                state[f"scale{i}"] = torch.zeros(shape[0], 1, device=p.device)
            else:
                state[f"moment{i}"] = torch.zeros(shape, device=p.device)
        return state

    def _new_moment(self, p: Tensor) -> Tensor:
        if not p.is_cuda or p.numel() < PAGED:
            return torch.empty(p.numel(), dtype=torch.uint8, device=p.device)
        with torch.cuda.device(p.device):  # whose memory it is from then on: from another one torch would make a copy
            pages = self._library.get_paged(p.numel(), dtype=torch.uint8, device=p.device)
        self._pages[pages.data_ptr()] = pages
        return torch.as_tensor(_OnDevice(pages), device=p.device)

    def _check_memory(self) -> None:
        """Paged memory beyond what the card has would not fail but crawl, so it is refused."""
        for device in {p.device for p in self._parameters() if p.is_cuda}:
            here = [p for p in self._parameters() if p.device == device and p.requires_grad]
            needed = sum(p.numel() * (2 + 8 / BLOCK + 2 * (p.dtype == torch.bfloat16)) for p in here)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            if needed > free:
                raise UserError(
                    f"the optimiser's state needs {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are "
                    "free beside weights and gradients: train adapters (model.lora), or shard over several GPUs"
                )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but no element type is changed, and large moments go into paged memory again.

        Raises:
            UserError: the states are of parameters of other sizes or another element type.
        """
        super().load_state_dict({**state_dict, "state": {}})  # torch would make every tensor bfloat16
        self._check_memory()
        parameters = self._parameters()
        for i, saved in state_dict["state"].items():
            state = self.state[parameters[i]] = self._new_state(parameters[i])
            if _shapes(saved) != _shapes(state):
                raise UserError(
                    f"the saved states of parameter {i} are {_shapes(saved)}, here {_shapes(state)}: go on with the "
                    "model.dtype of the run that saved them, the tail is half of a bfloat16 weight"
                )
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(state.items()) if isinstance(value, Tensor)}


def _numbers(group: dict[str, Any], step: int) -> Tensor:
    """What a step needs beside tensors, as one tensor: it changes from step to step, and compiled code stays."""
    beta1, beta2 = group["betas"]
    return torch.tensor(
        [group["lr"], group["weight_decay"], group["eps"], beta1, beta2, 1 - beta1**step, 1 - beta2**step]
    )


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    tail: Tensor | None,
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
        weight: [C, BLOCK] bfloat16 or float32.
        gradient: [C, BLOCK].
        tail: [C, BLOCK] int16, of bfloat16 weights.
        moment1: [C, BLOCK] uint8 codes, or float32 where there are no scales.
        scale1: [C, 1] float32.
        moment2: as moment1.
        scale2: as scale1.
        signed: what the codes of moment1 stand for.
        unsigned: the same of moment2.
        numbers: [7] float32 of `_numbers`.
    """
    if scale1 is not None:
        # Makes constants of them in compiled code. It is one kernel only with rows of a constant length that come in
        # as rows: with views of [N] in here it is nine, which take up to 16 bytes an element for a moment.
        assert weight.shape[1] == BLOCK and len(signed[1]) == len(unsigned[1]) == BLOCK - 1
    lr, weight_decay, eps, beta1, beta2, correction1, correction2 = numbers.unbind()
    master = weight if tail is None else join(weight, tail)
    g = gradient.float()
    first = beta1 * decode(moment1, scale1, signed) + (1 - beta1) * g
    second = beta2 * decode(moment2, scale2, unsigned) + (1 - beta2) * g * g
    change = (first / correction1) / ((second / correction2).sqrt() + eps) + weight_decay * master
    master = master - lr * change
    encode(first, moment1, scale1, signed)
    encode(second, moment2, scale2, unsigned)
    if tail is None:
        weight.copy_(master)
    else:
        split(master, weight, tail)


# torch 2.11's own choice for such a kernel, 32 elements a thread, runs out of registers on an H100: 255 and spills, 8
# of 64 warps at work. Tuning, at the first step, also tries 4 elements a thread: 62 registers.
_compiled_update = torch.compile(adamw_update, dynamic=True, options={"max_autotune_pointwise": True})


def decode(codes: Tensor, scales: Tensor | None, levels: Levels) -> Tensor:
    """8-bit codes [C, BLOCK] with scales [C, 1] → numbers [C, BLOCK]; without scales they are numbers already."""
    return codes if scales is None else levels[0][codes.int()] * scales


def encode(numbers: Tensor, codes: Tensor, scales: Tensor | None, levels: Levels) -> None:
    """Write numbers [C, BLOCK] as the codes of their nearest levels, the largest of a block being its scale."""
    if scales is None:
        codes.copy_(numbers)
        return
    largest = numbers.abs().amax(-1, keepdim=True)
    codes.copy_(torch.bucketize(numbers / largest.clamp(min=1e-38), levels[1], out_int32=True))
    scales.copy_(largest)


def split(master: Tensor, weight: Tensor, tail: Tensor) -> None:
    """Write float32 numbers as their nearest bfloat16 numbers and 16-bit tails, all of one shape.

    A float32 number's upper 16 bits are a bfloat16 number. Half a unit of its last place is added first, so that
    cutting the lower bits off rounds to nearest, ties away from zero; the tail is what is cut off.
    """
    bits = master.view(torch.int32) + 2**15
    weight.view(torch.int16).copy_(bits >> 16)
    tail.copy_(bits)


def join(weight: Tensor, tail: Tensor) -> Tensor:
    """The float32 numbers that `split` wrote, bit for bit."""
    upper, lower = weight.view(torch.int16).int() << 16, tail.int() & 0xFFFF
    return ((upper | lower) - 2**15).view(torch.float32)


class _OnDevice:
    """Paged memory, which bitsandbytes hands out as the host's, as what it is to the GPU."""

    def __init__(self, pages: Tensor) -> None:
        shape, address = (pages.numel(),), (pages.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": address, "version": 3}


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"PagedAdamW8bit was asked for, but bitsandbytes cannot be imported ({error}): pip install bitsandbytes, "
            "or use torch.optim.AdamW"
        ) from error
    return bitsandbytes
