"""AdamW with 8-bit moments over exact float32 master weights in bfloat16 parameters."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import fit_on
from torch._dynamo.testing import CompileCounter
from torch._inductor import metrics
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import get_scheduler

from dream_lightning import DreamModule
from dream_lightning.training import optimizer as optim

LR, STEPS, SIZE = 2e-6, 50, 8192
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights(size=SIZE, seed=0):
    """bfloat16 numbers of the size that a 7B model's weights have."""
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def train(parameter, optimizer, *, steps=STEPS, first=0, gradient_scale=1.0):
    for i in range(first, first + steps):
        g = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) + 0.5
        parameter.grad = (g * gradient_scale).bfloat16().to(parameter)
        optimizer.step()


def float32_training(size=SIZE, make=None, **options):
    """Another optimizer on float32 weights; bitsandbytes' own 8-bit AdamW by default."""
    import bitsandbytes

    parameter = torch.nn.Parameter(weights(size).float())
    settings = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.01}
    train(parameter, (make or bitsandbytes.optim.AdamW8bit)([parameter], **settings), **options)
    return parameter.detach()


def master(optimizer, parameter):
    return optim.join(parameter.detach().view(-1), optimizer.state[parameter]["low_bits"].view(-1))


def test_split_rounds_to_the_nearest_bfloat16_and_join_gives_the_number_back():
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(
        250
    )
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-45, 1.00390625, 3.4e38, torch.inf, -torch.inf])
    numbers = torch.cat([numbers, special])
    weight, low_bits = torch.empty_like(numbers, dtype=torch.bfloat16), torch.empty_like(numbers, dtype=torch.int16)
    optim.split(numbers.clone(), weight, low_bits)
    assert torch.equal(optim.join(weight, low_bits).view(torch.int32), numbers.view(torch.int32))
    finite = numbers.isfinite() & (numbers.abs() < 3e38)
    torchs = numbers.bfloat16()
    error, least = (weight.double() - numbers.double()).abs(), (torchs.double() - numbers.double()).abs()
    assert torch.equal(error[finite], least[finite])
    assert torch.equal(weight[~finite].float(), torchs[~finite].float())


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_bitsandbytes(signed):
    theirs = pytest.importorskip("bitsandbytes").functional.create_dynamic_map(signed)
    assert torch.equal(optim.dynamic_levels(signed=signed), theirs)


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_its_nearest_level(signed):
    both = optim.levels_on(torch.device("cpu"))[not signed]
    levels = both[0]
    assert len(levels) == 256 and (levels.diff() > 0).all() and levels[-1] == 1
    sizes = torch.tensor([1e-12, 1e3] * 4)[:, None]
    numbers = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) ** 3 * sizes
    numbers[5] = 0
    numbers = numbers if signed else numbers.abs()
    codes, scales = torch.empty(8, 256, dtype=torch.uint8), torch.empty(8, 1)
    optim.encode(numbers, (codes, scales), both)
    assert torch.equal(scales[:, 0], numbers.abs().amax(-1))
    error = (optim.decode((codes, scales), both) - numbers).abs()
    least = (levels * scales[..., None] - numbers[..., None]).abs().amin(-1)
    assert (error <= least + 1e-6 * scales).all()


def test_small_updates_are_lost_by_bfloat16_alone_and_kept_here():
    """lr 2e-6: torch's AdamW leaves bfloat16 weights where they are; ours move as float32 weights do."""
    lost = torch.nn.Parameter(weights())
    train(lost, torch.optim.AdamW([lost], lr=LR, betas=(0.9, 0.95), weight_decay=0.01))
    far = weights().abs() > 2e-3  # nearer to zero bfloat16 numbers lie so close that updates do count
    assert far.float().mean() > 0.9
    assert torch.equal(lost[far], weights()[far])

    kept = torch.nn.Parameter(weights())
    optimizer = optim.AdamW8bit([kept], lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    train(kept, optimizer)
    ours = master(optimizer, kept)
    eight_bit, exact = float32_training(), float32_training(make=torch.optim.AdamW)
    moved = (exact - weights().float()).abs().mean()
    assert (ours - eight_bit).abs().mean() < 0.002 * moved  # two ways to round the same arithmetic
    assert (ours - exact).abs().mean() < 1.01 * (eight_bit - exact).abs().mean() < 0.01 * moved
    assert (exact - weights().float())[far].mean() < -0.4 * LR * STEPS  # gradients of mean 0.5 push downwards
    assert 0.1 < (kept != weights())[far].float().mean() < 0.9  # whose low-order bits have run over so far


def test_weight_decay_too_small_for_bfloat16_is_kept():
    """Without a gradient a step multiplies by 1 − 2e-8, which not even float32 sees every time; 1 − 2e-6 it does."""
    parameter = torch.nn.Parameter(weights())
    optimizer = optim.AdamW8bit([parameter], lr=LR, weight_decay=1.0)
    train(parameter, optimizer, gradient_scale=0.0)
    ratio = master(optimizer, parameter).double() / weights().double()
    assert torch.equal(parameter[:10], weights()[:10])
    assert ratio.nanmean().item() == pytest.approx((1 - LR) ** STEPS, abs=2e-6)


@pytest.mark.parametrize("size", [300_001, 1000], ids=["fills no blocks", "small"])
def test_moments_that_stay_in_float32_give_exact_adamw(size):
    parameter = torch.nn.Parameter(weights(size))
    optimizer = optim.AdamW8bit([parameter], lr=LR)
    train(parameter, optimizer, steps=5)
    assert optimizer.state[parameter]["moment1"].dtype == torch.float32
    exact = float32_training(size, torch.optim.AdamW, steps=5)
    rounding = 5 * 2**-23 * exact.abs() + 1e-4 * LR  # of each step: torch rounds decay and change one after the other
    assert ((master(optimizer, parameter) - exact).abs() <= rounding).all()


@pytest.mark.parametrize("shape", [(32, 256), (1024, 1024), (300_001,), (1000,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_the_compiled_update_is_the_plain_one(shape, dtype, device, monkeypatch):
    size = torch.Size(shape).numel()
    here, there = (torch.nn.Parameter(weights(size).view(shape).to(d, dtype)) for d in ("cpu", device))
    plain, compiled = optim.AdamW8bit([here], lr=LR), optim.AdamW8bit([there], lr=LR)
    train(here, plain, steps=5)
    monkeypatch.setattr(optim, "adamw_update", optim._compiled_update())
    train(there, compiled, steps=5)
    a, b = (
        master(o, p).cpu() if dtype == torch.bfloat16 else p.detach().cpu().view(-1)
        for o, p in ((plain, here), (compiled, there))
    )
    moved = (a - weights(size).float()).abs().mean()
    assert (a - b).abs().mean() < 0.002 * moved


def compilations(shapes) -> int:
    """How often the update is compiled for parameters of these shapes, in three steps."""
    torch._dynamo.reset()
    counter = CompileCounter()
    parameters = [torch.nn.Parameter(weights(torch.Size(s).numel()).view(s)) for s in shapes]
    optimizer = optim.AdamW8bit(optim.decay_groups(parameters))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "adamw_update", torch.compile(optim.adamw_update, dynamic=True, backend=counter))
        for _ in range(3):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
    return counter.frame_count


def test_one_compilation_serves_all_shapes_steps_and_groups():
    assert compilations([(512, 64), (64, 512), (640, 64), (16, 2048)]) == 1
    assert compilations([(64,), (192,), (300_001,)]) == 1
    assert compilations([(640, 64), (64,), (64, 64), (32,), (160, 256)]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 1024), (300_001,)], ids=str)
def test_on_a_gpu_an_update_is_one_kernel_and_takes_no_memory(shape):
    torch._dynamo.reset()
    metrics.reset()
    parameter = torch.nn.Parameter(weights(torch.Size(shape).numel()).view(shape).cuda())
    optimizer = optim.AdamW8bit([parameter], lr=LR)
    train(parameter, optimizer, steps=2)
    assert metrics.generated_kernel_count == 1
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 4096


def test_float32_parameters_are_updated_as_they_are():
    parameter = torch.nn.Parameter(weights().float())
    optimizer = optim.AdamW8bit([parameter], lr=LR)
    train(parameter, optimizer)
    halves = torch.nn.Parameter(weights())
    other = optim.AdamW8bit([halves], lr=LR)
    train(halves, other)
    assert torch.equal(parameter.detach(), master(other, halves))
    assert "low_bits" not in optimizer.state[parameter]


@pytest.mark.parametrize("device", DEVICES)
def test_saved_and_loaded_it_resumes_to_the_bit(tmp_path, device):
    def start():
        pair = [torch.nn.Parameter(weights(n).to(device)) for n in (204_800, 100)]
        unused = torch.nn.Parameter(weights(10))
        return pair, optim.AdamW8bit([{"params": [unused, pair[0]]}, {"params": [pair[1]]}], lr=LR)

    def steps(pair, optimizer, first):
        for i in range(first, first + 5):
            for p in pair:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
            optimizer.step()

    pair, optimizer = start()
    steps(pair, optimizer, 0)
    torch.save({"optimizer": optimizer.state_dict(), "weights": pair}, tmp_path / "five.pt")
    steps(pair, optimizer, 5)

    saved = torch.load(tmp_path / "five.pt", weights_only=True, map_location="cpu")
    again, resumed = start()
    for p, value in zip(again, saved["weights"], strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert {i: s["step"] for i, s in resumed.state_dict()["state"].items()} == {1: 5, 2: 5}
    steps(again, resumed, 5)
    for p, q in zip(pair, again, strict=True):
        assert torch.equal(master(optimizer, p), master(resumed, q))
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][name])), name


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_states_of_another_element_type_are_refused(saved):
    """Into float32 the low-order bits would go nowhere, into bfloat16 they would be lost silently."""
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[saved]
    first, second = (torch.nn.Parameter(weights().to(dtype)) for dtype in (saved, other))
    optimizer = optim.AdamW8bit([first])
    train(first, optimizer, steps=1)
    with pytest.raises(ValueError, match=r"its state is not: use the model\.dtype of the saved run"):
        optim.AdamW8bit([second]).load_state_dict(optimizer.state_dict())


def module(optimizer=None):
    return DreamModule(
        new_model={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer="bytes",
        dtype="bfloat16",
        optimizer=optimizer or (lambda groups: optim.AdamW8bit(groups, lr=1e-4)),
        lr_schedule="constant_with_warmup",
        warmup_fraction=0.0,
    )


def test_a_resumed_run_is_the_same_to_the_bit(sums, tmp_path):
    whole, resumed = module(), module()
    saving = ModelCheckpoint(tmp_path, filename="four", every_n_train_steps=4)
    options = {"max_steps": 10, "gradient_clip_val": 1.0}
    first = fit_on(sums, whole, enable_checkpointing=True, callbacks=[saving], **options).optimizers[0]
    second = fit_on(sums, resumed, ckpt_path=tmp_path / "four.ckpt", **options).optimizers[0]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(master(first, p), master(second, q)), name


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        (torch.bfloat16, {"lr": -1.0}, r"lr is -1\.0"),
        (torch.bfloat16, {"lr": 0.0}, "lr is 0: nothing would be learned"),
        (torch.bfloat16, {"weight_decay": torch.inf}, "weight_decay is inf"),
        (torch.bfloat16, {"betas": (0.9, 1.0)}, "betas below 1"),
        (torch.bfloat16, {"eps": 0.0}, r"eps is 0\.0"),
        (torch.float16, {}, r"float16, wanted bfloat16 or float32"),
    ],
)
def test_impossible_settings_are_refused(dtype, options, words):
    with pytest.raises(ValueError, match=words):
        optim.AdamW8bit([torch.nn.Parameter(weights().to(dtype))], **options)


def test_sharded_weights_are_refused():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # the other does not exist
    try:
        sharded = distribute_tensor(weights(), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        with pytest.raises(ValueError, match=r"sharded.*torch\.optim\.AdamW"):
            optim.AdamW8bit([torch.nn.Parameter(sharded)])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "words"), [({"lr": 0.0}, "lr is 0"), ({"lr": torch.inf}, "lr is inf"), ({"eps": torch.nan}, "eps")]
)
def test_numbers_of_any_optimizer_are_checked(sums, options, words):
    with pytest.raises(ValueError, match=words):
        fit_on(sums, module(lambda groups: torch.optim.AdamW(groups, **options)), max_steps=1)


def test_bfloat16_weights_with_an_optimizer_that_loses_updates_are_refused(sums):
    with pytest.raises(ValueError, match=r"AdamW loses small updates.*AdamW8bit"):
        fit_on(sums, module(lambda groups: torch.optim.AdamW(groups, lr=1e-4)), max_steps=1)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 10), (10, 10)])
def test_schedules_are_those_of_transformers(shape, warmup, steps):
    theirs = get_scheduler(shape, torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, steps).lr_lambdas[0]
    options = {"shape": shape, "warmup": warmup, "steps": steps}
    assert [optim.lr_factor(step, **options) for step in range(steps + 1)] == [
        theirs(step) for step in range(steps + 1)
    ]
