"""The terms of the plan against what autograd saves, storage by storage."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch._functorch.config
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.adapters.float8_linear import to_float8
from dream_lightning.adapters.quantized_linear import dequantize
from dream_lightning.diffusion.head import token_nll
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.modeling import rotary_angles
from dream_lightning.plan import Setting, make_plan
from dream_lightning.plan.activations import EAGER_DEQUANTIZATION, checkpoint_keeps, layer_keeps, logits_bytes

CONFIG = DreamConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mask_token_id=90,
    pad_token_id=91,
    bos_token_id=91,
    eos_token_id=91,
)
ROWS, LENGTH = 2, 48
ADAPTERS = [
    None,
    LoraParams(rank=4, targets=["q_proj", "v_proj"]),
    LoraParams(rank=4, targets=["o_proj", "up_proj"]),
    LoraParams(rank=4, targets="all-linear"),
]


def setting(dtype=torch.float32, mixed=True, lora=None, **options):
    return Setting(CONFIG, ROWS, LENGTH, torch.optim.AdamW, dtype=dtype, mixed=mixed, lora=lora, **options)


def network(s: Setting) -> DreamModel:
    model = DreamModel(CONFIG).to(s.dtype).train()
    if s.lora is not None:
        add_lora(model, s.lora)
    return model


def saved_bytes(run, ignored: set[int]) -> int:
    """Bytes of the storages that autograd saves while it runs, each once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())  # kept alive: addresses are not used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for _, size in storages.values())


def weights_of(model) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("lora", ADAPTERS, ids=lambda p: str(p and p.targets))
@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_a_layer_keeps_what_the_plan_says(dtype, mixed, lora):
    """Exactly. Copies of weights under autocast are counted apart, so they are taken off here."""
    s = setting(dtype, mixed, lora)
    model = network(s)
    layer = model.model.layers[0]
    x = torch.randn(ROWS, LENGTH, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    rotation = rotary_angles(torch.arange(LENGTH)[None], CONFIG.head_dim, CONFIG.rope_theta, dtype)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            layer(x, rotation, None)

    ignored = weights_of(model) | {t.untyped_storage().data_ptr() for t in rotation}
    if mixed:
        copies = 2 * sum(p.numel() for p in layer.parameters() if p.dim() > 1 and p.dtype == torch.float32)
    else:
        copies = sum(p.nbytes for name, p in layer.named_parameters() if "lora_B" in name)  # times the scale
    assert saved_bytes(run, ignored) - copies == s.tokens * sum(layer_keeps(s).values())


def test_a_four_bit_layer_keeps_no_more(tmp_path):
    """Its weights are saved as they are, packed, and its inputs not at all."""
    pytest.importorskip("bitsandbytes")
    from dream_lightning.adapters import load_quantized
    from dream_lightning.model.loading import weight_files

    DreamModel(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = DreamModel(CONFIG)
    load_quantized(model, weight_files(tmp_path), kind="nf4")
    lora = LoraParams(rank=4, targets=["q_proj", "v_proj"])
    add_lora(model, lora)
    s = setting(torch.bfloat16, True, lora, four_bit=True)
    x = torch.randn(ROWS, LENGTH, CONFIG.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotation = rotary_angles(torch.arange(LENGTH)[None], CONFIG.head_dim, CONFIG.rope_theta, torch.bfloat16)
    layer = model.model.layers[0].train()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x, rotation, None)

    ignored = weights_of(model) | {t.untyped_storage().data_ptr() for t in rotation}
    copies = 2 * sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert saved_bytes(run, ignored) - copies == s.tokens * sum(layer_keeps(s).values())


def peak_bytes(run) -> int:
    """What a function allocates at most, its result included, as torch's profiler counts it."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_uncompiled_float8_products_take_what_the_plan_says():
    x = torch.randn(512, 1024, dtype=torch.bfloat16)
    assert peak_bytes(lambda: to_float8(x)) == pytest.approx(9 * x.numel(), rel=0.01)
    blocks = x.numel() // 64
    codes = torch.zeros(blocks, dtype=torch.uint8)
    quantized = (x.view(torch.uint8)[:, ::4].reshape(-1), torch.ones(16), codes, torch.ones(256), torch.ones(blocks))
    peak = peak_bytes(lambda: dequantize(*quantized, torch.zeros(()), dtype=torch.float8_e4m3fn))
    assert peak == pytest.approx(EAGER_DEQUANTIZATION * x.numel(), rel=0.01)
    s = replace(setting(torch.bfloat16, True, LoraParams()), compiled=True)
    eager = replace(s, float8_products=True, compiled=False)
    plans = [make_plan(each).moments["backward, first layer"] for each in (s, replace(eager, compiled=True), eager)]
    plain, *float8 = (moment.temporaries for moment in plans)
    wide = s.tokens * CONFIG.intermediate_size
    assert [size - plain for size in float8] == [wide, 9 * wide]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recomputed_layer_keeps_its_input(dtype):
    model = network(setting(dtype))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = []

    def checkpointed(layer, x, *others):
        kept.append(x.nbytes)
        return layer(x, *others)

    model.model._gradient_checkpointing_func = checkpointed
    with torch.autocast("cpu", torch.bfloat16):
        model.model(torch.zeros(ROWS, LENGTH, dtype=torch.int64))
    assert kept == [ROWS * LENGTH * checkpoint_keeps(setting(dtype))] * CONFIG.num_hidden_layers


def test_logits_of_one_chunk():
    """The head keeps its log-softmax: one float32 number a logit; at most twice that is alive in its forward pass."""
    s = setting(torch.float32, False, head_chunk=512)
    head, x = torch.nn.Linear(64, 96, bias=False), torch.randn(s.tokens, 64, requires_grad=True)
    ignored = {t.untyped_storage().data_ptr() for t in (head.weight, x)}
    targets = torch.zeros(s.tokens, dtype=torch.int64)
    ignored.add(targets.untyped_storage().data_ptr())
    kept = saved_bytes(lambda: token_nll(x, head, targets), ignored)
    logits, hidden = s.tokens * 96, s.tokens * 64
    assert 0 <= kept - 4 * (logits + hidden) < 1100  # the targets, and a few numbers
    assert logits_bytes(s, backward=False) == 2 * 4 * logits
    assert logits_bytes(setting(head_chunk=10), backward=True) == 3 * 4 * 10 * 96


WIDE = DreamConfig(**{**CONFIG.to_dict(), "hidden_size": 256, "intermediate_size": 1352, "num_attention_heads": 8})


@pytest.mark.parametrize("lora", [ADAPTERS[0], ADAPTERS[1], ADAPTERS[3]], ids=lambda p: str(p and p.targets))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_keeps_no_more_than_the_plan_says(dtype, lora):
    """By the compiler's own choice, under DreamModule's setting and in the 7B's proportions."""
    torch._dynamo.reset()
    s = Setting(WIDE, 2, 256, torch.optim.AdamW, dtype=dtype, lora=lora, compiled=True)
    model = DreamModel(WIDE).to(dtype).train()
    if lora is not None:
        add_lora(model, lora)
    layer = model.model.layers[0]
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    layer.compile(backend="aot_eager_decomp_partition")  # chooses as the real one, generates no code
    x = torch.randn(2, 256, WIDE.hidden_size, dtype=dtype, requires_grad=True)
    rotation = rotary_angles(torch.arange(256)[None], WIDE.head_dim, WIDE.rope_theta, dtype)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x, rotation, None)

    with torch._functorch.config.patch(activation_memory_budget=0.8):
        kept = saved_bytes(run, parameters | {t.untyped_storage().data_ptr() for t in rotation})
    planned = s.tokens * sum(layer_keeps(s).values())
    copies = 2 * sum(p.numel() for p in layer.parameters() if p.dim() > 1 and p.dtype == torch.float32)
    assert kept <= 1.01 * planned + copies
    if dtype == torch.bfloat16 and lora is not ADAPTERS[1]:
        assert kept == pytest.approx(planned, rel=0.02)
