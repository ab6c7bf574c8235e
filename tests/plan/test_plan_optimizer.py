"""States of an optimiser: counted on the meta device, held to a real one's after a step."""

import pytest
import torch
from torch import Tensor, nn

from dream_lightning.plan.optimizer import optimizer_memory
from dream_lightning.training.optimizer import AdamW8bit

SHAPES = [(320, 350), (64, 80), (70,), (6000,)]


def eight_bit(name):
    return lambda groups: getattr(pytest.importorskip("bitsandbytes").optim, name)(groups, lr=1e-3)


def package_s_own(groups):
    pytest.importorskip("bitsandbytes")
    return AdamW8bit(groups, lr=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda groups: torch.optim.AdamW(groups, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, lr=1e-3),
        lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        eight_bit("AdamW8bit"),
        eight_bit("Lion8bit"),
        package_s_own,
    ],
    ids=["adamw", "amsgrad", "sgd", "momentum", "adamw8bit", "lion8bit", "own"],
)
def test_states_equal_a_real_optimizer_s(make, dtype):
    real = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = make([{"params": real}])
    for p in real:
        p.grad = torch.randn_like(p)
    optimizer.step()
    tables = ("qmap1", "qmap2")  # of codes, shared by all parameters
    held = sum(
        t.nbytes
        for state in optimizer.state.values()
        for name, t in state.items()
        if isinstance(t, Tensor) and t.dim() and name not in tables
    )
    counted = optimizer_memory(make, [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in SHAPES])
    assert counted.states + counted.paged == held


def test_paged_states_are_those_of_large_parameters():
    shapes = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    paged, plain = (optimizer_memory(eight_bit(name), shapes) for name in ("PagedAdamW8bit", "AdamW8bit"))
    assert paged.paged == 2 * 320 * 350 and plain.paged == 0
    assert paged.states + paged.paged == plain.states


def test_an_optimizer_that_cannot_be_counted():
    with pytest.raises(ValueError, match="states of Adafactor cannot be counted"):
        optimizer_memory(torch.optim.Adafactor, [nn.Parameter(torch.empty(3, 3, device="meta"))])
