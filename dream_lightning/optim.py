"""AdamW for all weights of a 7B model on one 80 GB card: bfloat16 weights, 8-bit moments, no update lost."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states
SLICE = 2**26  # elements updated at a time: temporaries of 8 bytes each, 0.5 GiB
SMALL = 4096  # smaller parameters (biases, norms) keep float32 moments
PAGED = 100_000  # elements from which moments are worth paging
_NO_TAIL = -(2**15)  # the tail of a float32 number that is a bfloat16 number


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

    Gradients are what autograd leaves in them: of bfloat16 weights, summed over micro-batches in bfloat16.

    Bytes a parameter: weight 2, gradient 2, moments 2.03, tail 2; for Dream 7B 57 GiB, and about 0.5 GiB while a step
    is made, so that 80 GB leave 20 GiB for activations (float32 weights, gradients and AdamW take 114 GiB). Moments of
    large parameters lie in paged memory, which the card lends out when activations need it for a moment.

    Args:
        params: parameters or groups, in bfloat16 or float32.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step multiplies the weights by 1 − lr · weight_decay.

    Raises:
        ValueError: bitsandbytes is not installed; a parameter of another dtype; at the first step, less free memory
            on the GPU than the optimiser's state needs.
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
            raise ValueError(
                f"lr is {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: wanted lr and weight_decay of at "
                "least 0, eps above 0, and betas from 0 to below 1"
            )
        self._kernels = _bitsandbytes().functional
        self._loaded: dict[int, dict[str, Any]] = {}
        self._code: dict[torch.device, tuple[Tensor, Tensor]] = {}  # the values of the 256 codes, signed and unsigned
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for p in self._parameters():
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"a parameter is {p.dtype}, wanted bfloat16 or float32: set model.dtype to bfloat16")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._place_loaded()
        if not self.state:
            self._check_memory()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        for device in {p.device for p in self._parameters() if p.is_cuda}:
            torch.cuda.synchronize(device)  # kernels on paged memory are not ordered with reads by the host
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(self._new_state(p))
        state["step"] += 1
        for moment in (state["moment1"], state["moment2"]):
            if getattr(moment, "is_paged", False):
                self._kernels.prefetch_tensor(moment)
        weight, gradient = p.view(-1), p.grad.reshape(-1)
        for start in range(0, p.numel(), SLICE):
            part = slice(start, start + SLICE)
            if "tail" in state:
                master = join(weight[part], state["tail"][part])
                self._adamw(master, gradient[part].float(), state, part, group)
                split(master, weight[part], state["tail"][part])
            else:
                self._adamw(weight[part], gradient[part].float(), state, part, group)

    def _adamw(self, p: Tensor, gradient: Tensor, state: dict[str, Any], part: slice, group: dict[str, Any]) -> None:
        """One slice of float32 weights, in place."""
        (beta1, beta2), step = group["betas"], state["step"]
        lr, eps, weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
        moment1, moment2 = (_slice(state[name], part) for name in ("moment1", "moment2"))
        if "scale1" not in state:
            self._kernels.optimizer_update_32bit(
                "adam", gradient, p, moment1, beta1, eps, step, lr, moment2, beta2, weight_decay=weight_decay
            )
            return
        blocks = slice(part.start // BLOCK, part.stop // BLOCK)
        signed, unsigned = self._codes(p.device)
        self._kernels.optimizer_update_8bit_blockwise(
            *("adam", gradient, p, moment1, moment2, beta1, beta2, 0.0, 0.0, eps, step, lr, signed, unsigned),
            *(state["scale1"][blocks], state["scale2"][blocks], weight_decay),
        )

    def _codes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._code:
            self._code[device] = tuple(self._kernels.create_dynamic_map(signed).to(device) for signed in (True, False))
        return self._code[device]

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        if p.dtype == torch.bfloat16:
            state["tail"] = torch.full((p.numel(),), _NO_TAIL, dtype=torch.int16, device=p.device)
        for i in (1, 2):
            if p.numel() < SMALL:
                state[f"moment{i}"] = torch.zeros(p.numel(), device=p.device)
            else:
                state[f"moment{i}"] = self._new_moment(p)
                state[f"scale{i}"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
        return state

    def _new_moment(self, p: Tensor) -> Tensor:
        if not p.is_cuda or p.numel() < PAGED:
            return torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
        moment = self._kernels.get_paged(p.numel(), dtype=torch.uint8, device=p.device)
        self._kernels.fill(moment, 0)
        return moment

    def _check_memory(self) -> None:
        """Paged memory beyond what the card has would not fail but crawl, so it is refused."""
        for device in {p.device for p in self._parameters() if p.is_cuda}:
            here = [p for p in self._parameters() if p.device == device and p.requires_grad]
            needed = sum(p.numel() * (2 + 8 / BLOCK + 2 * (p.dtype == torch.bfloat16)) for p in here)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            if needed > free:
                raise ValueError(
                    f"the optimiser's state needs {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are "
                    "free beside weights and gradients: train adapters (model.lora), or shard over several GPUs"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but no element type is changed; tensors go to their devices at the next step."""
        super().load_state_dict({**state_dict, "state": {}})  # torch would make every tensor bfloat16
        self._loaded = {i: dict(saved) for i, saved in state_dict["state"].items()}

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        self._place_loaded()
        return super().state_dict()

    def _place_loaded(self) -> None:
        """Not while loading, because Lightning would then move paged memory to the GPU, where it already lies."""
        if self._loaded:
            self._check_memory()
        parameters = self._parameters()
        while self._loaded:
            i, saved = self._loaded.popitem()
            state = self.state[parameters[i]] = self._new_state(parameters[i])
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value


def split(master: Tensor, weight: Tensor, tail: Tensor) -> None:
    """Write float32 numbers [N] as their nearest bfloat16 numbers [N] and 16-bit tails [N]; clobbers `master`.

    A float32 number's upper 16 bits are a bfloat16 number. Half a unit of its last place is added first, so that
    cutting the lower bits off rounds to nearest, ties away from zero; the tail is what is cut off.
    """
    halves = master.view(torch.int32).add_(2**15).view(torch.int16).view(-1, 2)  # lower half first: little endian
    weight.view(torch.int16).copy_(halves[:, 1])
    tail.copy_(halves[:, 0])


def join(weight: Tensor, tail: Tensor) -> Tensor:
    """The float32 numbers [N] that `split` wrote, bit for bit."""
    halves = torch.stack((tail, weight.view(torch.int16)), dim=-1)  # [N, 2]
    return halves.view(torch.int32).sub_(2**15).view(-1).view(torch.float32)


def _slice(tensor: Tensor, part: slice) -> Tensor:
    result = tensor[part]
    if getattr(tensor, "is_paged", False):
        result.is_paged = True  # where bitsandbytes looks; a slice does not inherit it
    return result


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"PagedAdamW8bit was asked for, but bitsandbytes cannot be imported ({error}): pip install bitsandbytes, "
            "or use torch.optim.AdamW"
        ) from error
    return bitsandbytes
