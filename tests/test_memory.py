"""The plan against measurements, against what autograd saves, and against a real step on the CPU."""

import shutil
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import SGD, AdamW
from torch.profiler import ProfilerActivity, profile

from dream_lightning import cli, memory
from dream_lightning.adapters import LoraParams, add_lora, load_quantized
from dream_lightning.diffusion.denoiser import features
from dream_lightning.diffusion.head import token_nll
from dream_lightning.errors import UserError
from dream_lightning.memory import Setting, changes, count_parameters, layer_keeps, logits_bytes, make_plan
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.model.modeling import rotary_angles
from dream_lightning.module import DreamModule
from dream_lightning.training.optimizer import AdamW8bit

TOKENS = {"mask_token_id": 90, "pad_token_id": 91, "bos_token_id": 91, "eos_token_id": 91}
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = DreamConfig(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2, **SIZES, **TOKENS)
Q_V, ALL = LoraParams(rank=4, targets=["q_proj", "v_proj"]), LoraParams(rank=4, targets="all-linear")
ADAPTERS = [None, Q_V, LoraParams(rank=4, targets=["o_proj", "up_proj"]), ALL]
FULL_7B = Setting(DreamConfig(), rows=4, length=2048, optimizer=AdamW)
QLORA_7B = replace(FULL_7B, dtype=torch.bfloat16, lora=LoraParams(targets=["q_proj", "v_proj"]), four_bit=True)


@pytest.fixture
def plan(monkeypatch, capsys, shared, tmp_path, cached_parsers):
    """Options of `dream-lightning plan` → its output and messages, with the official config.json and no weights."""
    shutil.copy(shared("data/dream-v0-instruct-7b") / "config.json", tmp_path)
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda _: pytest.fail("a class was instantiated"))
    monkeypatch.setattr(cli, "tune_gc", lambda: None)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["dream-lightning", "plan", *options, f"--model.pretrained={tmp_path}"])
        with suppress(SystemExit):
            cli.main()
        return "".join(capsys.readouterr())

    return run


KEPT = ["--model.gradient_checkpointing=false", "--data.max_length=2048"]
FOUR, LINEAR = [*KEPT, "--data.batch_size=4"], "--model.lora.targets=all-linear"


@pytest.mark.parametrize(
    ("config", "options", "measured"),
    [
        ("single_gpu_qlora", [], 8.3), ("single_gpu_qlora", [*FOUR, LINEAR], 30.2),
        ("single_gpu_qlora", ["--config=model/nf4_float8", *FOUR, LINEAR], 30.5),
        ("single_gpu_qlora", [*KEPT, "--model.gradient_checkpointing=25"], 6.6),
        ("single_gpu_qlora", [LINEAR, "--data.max_length=32768", "--trainer.accumulate_grad_batches=1"], 20.9),
        ("single_gpu_lora", [], 18.7), ("single_gpu_lora", FOUR, 39.2),
        ("single_gpu_lora", ["--config=model/float8", *FOUR], 39.5),
        ("single_gpu_full", [*KEPT, "--data.batch_size=2"], 70.9), ("ddp_qlora", [], 8.3),
        ("fsdp_lora", ["--trainer.devices=2"], 14.2), ("fsdp_full", ["--trainer.devices=2"], 64.1),
        ("fsdp_full", ["--trainer.devices=4"], 35.6),
    ],
)  # fmt: skip
def test_shipped_configs_are_within_15_percent_of_the_measured_peak(plan, monkeypatch, config, options, measured):
    """GiB of max_memory_allocated on H100 and H200, docs/performance.md."""
    monkeypatch.setattr(cli, "report", lambda setting, gpu_gib: make_plan(setting).peak_gib)
    assert float(plan(f"--config={config}", *options).splitlines()[0]) == pytest.approx(measured, rel=0.15)


def test_a_plan_that_fits(plan):
    text = plan("--config=single_gpu_qlora", "--gpu_memory_gib=24", "--model.complementary_masks=true")
    for words in ("5,046,272 train (0.0662 %)", "2 × 8,192 tokens", "weights         5.18 GiB", "fits a card of 24.0"):
        assert words in text
    assert f"torch {torch.__version__}" in text and "GPU: " in text


def test_a_plan_that_does_not_fit_lists_changes(plan):
    text = plan("--config=fsdp_full", "--trainer.strategy=auto", "--trainer.devices=1", "--gpu_memory_gib=80")
    assert "does NOT fit" in text
    assert text.index("max_length=4096") < text.index("single_gpu_qlora") < text.index("fsdp_full on 2 GPUs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config=single_gpu_lora", "--model.float8_products=true"], "float8_products is for trained weights"),
        (["--config=fsdp_lora", "--model.quantize=nf4"], "set trainer.strategy=ddp"),
        (["--config=single_gpu_lora", "--trainer.precision=16-mixed"], "a plan knows bf16-mixed"),
        (["--config=fsdp_full"], "trainer.devices is auto, and no GPU is visible here"),
    ],
)
def test_what_has_no_plan(plan, monkeypatch, options, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert message in plan(*options)


def test_devices_are_counted_however_they_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for devices in (2, "2", [0, 1], "0,1", "1,2,", "auto", "-1", -1):
        assert memory.processes(SimpleNamespace(devices=devices, num_nodes=2)) == 4


def test_running_out_of_memory_says_what_to_change(monkeypatch, capsys, tmp_path):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(DreamModule, "training_step", too_much)
    monkeypatch.setattr(cli, "tune_gc", lambda: None)
    names = ("trainer.default_root_dir", "checkpoint.dirpath", "autosave.dirpath")
    folders = [f"--{name}={tmp_path}" for name in names]
    options = ["--trainer.callbacks=[]", "--trainer.logger=false", "--trainer.limit_val_batches=0", "--data.first_n=64"]
    monkeypatch.setattr(sys, "argv", ["dream-lightning", "fit", "--config=tiny", *options, *folders])
    with pytest.raises(SystemExit):
        cli.main()
    text = "".join(capsys.readouterr())
    assert "error: the GPU ran out of memory (CUDA out of memory. Tried to allocate 1.00 GiB.)" in text
    assert "--data.batch_size=1 --trainer.accumulate_grad_batches=32" in text and "Traceback" not in text


def model_of(s: Setting) -> DreamModel:
    model = DreamModel(s.config).to(s.dtype).train()
    if s.lora is not None:
        add_lora(model, s.lora)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", ADAPTERS, ids=lambda p: str(p and p.targets))
def test_parameters_are_those_of_a_model(lora, dtype):
    s = Setting(SMALL, 1, 1, AdamW, dtype=dtype, lora=lora)
    model, counted = model_of(s), count_parameters(s)
    parameters, layer = list(model.parameters()), list(model.model.layers[0].parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert counted.total == sum(p.numel() for p in parameters)
    assert counted.weights == sum(p.nbytes for p in parameters)
    assert counted.trainable == sum(p.numel() for p in trained)
    assert counted.gradients == sum(p.nbytes for p in trained)
    assert counted.layer == sum(p.numel() for p in layer)
    assert counted.layer_trainable == sum(p.numel() for p in layer if p.requires_grad)
    shapes = Counter(tuple(sorted(p.shape)) for p in trained)
    assert Counter(tuple(sorted(s)) for s in counted.shapes.elements()) == shapes


def test_bytes_of_packed_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = DreamConfig(**SMALL.to_dict() | {"hidden_size": 256, "intermediate_size": 512})
    DreamModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = DreamModel(config)
    load_quantized(model, weight_files(tmp_path), kind="nf4")
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    planned = count_parameters(Setting(config, 1, 1, AdamW, dtype=torch.bfloat16, four_bit=True)).weights
    tables = 14 * 1200  # of codes, for each of the layers
    assert planned - 100 <= held <= planned + tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [AdamW, partial(AdamW, amsgrad=True), SGD, partial(SGD, momentum=0.9), AdamW8bit])
def test_states_equal_those_of_a_real_optimizer(make, dtype):
    shapes = Counter({(320, 350): 2, (64, 80): 1, (70,): 3, (6000,): 1})
    real = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes.elements()]
    optimizer = make([{"params": real}])
    for p in real:
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    counted, stepping = memory.optimizer_bytes(make, shapes, dtype)
    assert counted == sum(t.nbytes for t in states)
    assert (stepping > 0) == isinstance(optimizer, AdamW)
    with pytest.raises(UserError, match="cannot be counted"):
        memory.optimizer_bytes(torch.optim.Adafactor, Counter({(3, 3): 1}), torch.float32)


def saved_bytes(run, ignored: set[int]) -> int:
    """Bytes of the storages that autograd saves, each once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())  # keeps it alive: addresses are not reused
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for _, size in storages.values())


def layer_saves(s: Setting, compiled: bool = False) -> tuple[int, int]:
    """Bytes that a real layer saves for a micro-batch, and bytes of its weights' copies under autocast."""
    model = model_of(s)
    layer, c = model.model.layers[0], s.config
    x = torch.randn(s.rows, s.length, c.hidden_size, dtype=s.dtype, requires_grad=True)
    rotation = rotary_angles(torch.arange(s.length)[None], c.head_dim, c.rope_theta, s.dtype)
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotation)}
    if compiled:
        layer.compile(backend="aot_eager_decomp_partition")  # chooses as the real one, generates no code

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=s.mixed):
            layer(x, rotation, None)

    if s.mixed:
        copies = 2 * sum(p.numel() for p in layer.parameters() if p.dim() > 1 and p.dtype == torch.float32)
    else:
        copies = sum(p.nbytes for name, p in layer.named_parameters() if "lora_B" in name)  # times the scale
    with torch._functorch.config.patch(activation_memory_budget=0.8):
        return saved_bytes(run, ignored), copies


@pytest.mark.parametrize("lora", ADAPTERS, ids=lambda p: str(p and p.targets))
@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_a_layer_saves_what_the_plan_says(dtype, mixed, lora):
    s = Setting(SMALL, 2, 48, AdamW, dtype=dtype, mixed=mixed, lora=lora)
    saved, copies = layer_saves(s)
    assert saved - copies == s.tokens * layer_keeps(s)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("lora", [None, Q_V, ALL], ids=lambda p: str(p and p.targets))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_saves_no_more_than_the_plan_says(dtype, lora):
    """By the compiler's own choice within the activation budget, in the 7B's proportions."""
    wide = {"hidden_size": 256, "intermediate_size": 1352, "num_attention_heads": 8}
    s = Setting(DreamConfig(**SMALL.to_dict() | wide), 2, 256, AdamW, dtype=dtype, lora=lora, compiled=True)
    (saved, copies), planned = layer_saves(s, compiled=True), s.tokens * layer_keeps(s)
    assert saved <= 1.01 * planned + copies
    if dtype == torch.bfloat16 and lora is not Q_V:
        assert saved == pytest.approx(planned, rel=0.02)


def test_logits_of_one_chunk():
    """The head saves its log-softmax, one float32 number per logit; at most twice that exists in the forward pass."""
    s = Setting(SMALL, 2, 48, AdamW, mixed=False)
    head, x, targets = nn.Linear(64, 96, bias=False), torch.randn(96, 64, requires_grad=True), torch.zeros(96).long()
    saved = saved_bytes(lambda: token_nll(x, head, targets), {head.weight.untyped_storage().data_ptr()})
    logits = 96 * 96
    assert 0 <= saved - 4 * (logits + 96 * 64) < 1100  # x, targets, and a few numbers
    assert logits_bytes(s, backward=False) == 2 * 4 * logits and logits_bytes(s, backward=True) == 3 * 4 * logits


MEDIUM = DreamConfig(vocab_size=2000, hidden_size=64, intermediate_size=256, num_hidden_layers=4, **SIZES, **TOKENS)
STEP = Setting(MEDIUM, rows=2, length=256, optimizer=partial(AdamW, foreach=False))  # as on the CPU
LORA = {"dtype": torch.bfloat16, "lora": LoraParams(targets="all-linear")}
CHANGES = {
    "full": {},
    "kept": {"checkpointed": False},
    "half": {"checkpointed": 2},
    "accumulated": {"accumulation": 2},
    "float32": {"mixed": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "lora": LORA,
    "lora kept": {**LORA, "checkpointed": False},
    "lora q, v": {**LORA, "lora": LoraParams(targets=["q_proj", "v_proj"])},
}


def measured_peak(s: Setting) -> int:
    """Bytes at the peak of the second step: what stays between steps, and what the profiler sees on top."""
    model = model_of(s)
    if s.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.checkpointed_layers = s.recomputed
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = s.optimizer(trained)
    x_t = torch.arange(s.tokens).reshape(s.rows, s.length) % 80
    is_masked = torch.ones_like(x_t, dtype=torch.bool)

    def step():
        """In Lightning's order: the last step's gradients are freed after the forward pass."""
        for micro_batch in range(s.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=s.mixed):
                loss = token_nll(features(model, x_t, is_masked), model.lm_head, x_t[is_masked], chunk=s.chunk)
            if micro_batch == 0:
                optimizer.zero_grad()
            loss.sum().backward()
            del loss
        optimizer.step()

    step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    before = sum(t.nbytes for t in [*model.parameters(), *(p.grad for p in trained), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(sizes, initial=before))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_within_15_percent_of_a_real_step(change):
    setting = replace(STEP, **change)
    assert make_plan(setting).peak_gib * 2**30 == pytest.approx(measured_peak(setting), rel=0.15)


def test_float32_masters_take_16_bytes_per_parameter_and_autocast_copies():
    total, plan = 7_615_616_512, make_plan(FULL_7B)
    at_head = plan.moments["forward, at the head"]
    assert at_head["weights"] + at_head["gradients"] + at_head["optimizer"] == 16 * total
    assert at_head["copies"] == pytest.approx(2 * total, rel=0.08)  # everything but embeddings and norms
    assert plan.moments["optimizer step"]["temporaries"] == 4 * total  # the foreach AdamW's root of second moments
    fused = replace(FULL_7B, optimizer=partial(AdamW, fused=True))
    assert make_plan(fused).moments["optimizer step"]["temporaries"] == 0


def test_sharding_divides_what_stays_and_gathers_layers_in_bfloat16():
    lora = replace(QLORA_7B, four_bit=False)
    for setting, tables in ((FULL_7B, 1), (lora, 2)):
        one, eight = (make_plan(replace(setting, gpus=gpus)) for gpus in (1, 8))
        table, layer = 152_064 * 3_584, one.parameters.layer
        at_head, last = (eight.moments[name] for name in ("forward, at the head", "backward, last layer"))
        for part in ("weights", "optimizer"):
            assert at_head[part] == one.moments["forward, at the head"][part] / 8
        assert at_head["copies"] == 2 * tables * table
        assert last["copies"] == 2 * (tables * table + 2 * layer)


def test_changes_come_in_order_each_with_its_plan():
    found = list(changes(replace(FULL_7B, length=8192, checkpointed=False), gpu_gib=48))
    names = ["batch_size=1", "max_length=4096", "gradient_checkpointing=true", "single_gpu_full", "single_gpu_qlora"]
    words = [*names, "fsdp_full on 2 GPUs", "fsdp_full on 4 GPUs"]
    assert all(word in option for word, (option, _) in zip(words, found, strict=True))
    batch, length, checkpointing, eight_bit, four_bit, two, four = (plan.needed_gib for _, plan in found)
    assert batch > length > checkpointing > eight_bit > four_bit and checkpointing > two > 48 >= four
    assert found[0][1].setting.accumulation == 4  # the same optimizer step
    assert not list(changes(replace(QLORA_7B, rows=1, length=1024), 4))
