"""nf4 weights, float8 products: the same base as nf4, near its products, nothing kept, and it learns as well."""

import copy

import pytest
import torch
from material import loss_after_60_steps
from torch import nn

from dream_lightning.adapters import LoraParams, add_lora, held_in_bfloat16, is_4bit, load_4bit, merge_lora
from dream_lightning.adapters.dequantization import dequantize
from dream_lightning.adapters.float8 import to_float8
from dream_lightning.adapters.nf4_float8 import multiply_in_float8
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.model.modeling import rotary_angles

bnb = pytest.importorskip("bitsandbytes")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mask_token_id": 3,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
IDS = torch.arange(48).reshape(2, 24) * 11 % 60


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = DreamModel(DreamConfig(**SIZES))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(folder, *, float8_products=True) -> DreamModel:
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(folder))
    load_4bit(model, weight_files(folder), float8_products=float8_products)
    return model


def linear(in_features=64, out_features=96) -> tuple[nn.Linear, torch.Tensor]:
    """A filled layer, and its weight rounded to nf4, [out, in]. One block is 10,000 times smaller than the others."""
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * torch.rand(out_features, 1)
    weight[5] = weight[5] / 10_000
    layer = bnb.nn.Linear4bit(in_features, out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=True).to("cpu")
    layer.bias = nn.Parameter(layer.bias.data.bfloat16(), requires_grad=False)
    multiply_in_float8(layer)
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def as_float8(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's weights in float8 [out, in] and their scale."""
    statistics = (layer.levels, layer.scale_codes, layer.scale_levels, layer.superscales, layer.offset)
    weight = dequantize(layer.weight.data.view(-1), *statistics, dtype=torch.float8_e4m3fn)
    assert torch.equal(
        weight.view(torch.uint8),
        dequantize(layer.weight.data.view(-1), *statistics, dtype=torch.float8_e4m3fn, again=True).view(torch.uint8),
    )
    return weight.view(layer.out_features, -1), layer.weight_scales[0]


def test_every_weight_keeps_four_bits_under_one_scale():
    layer, nf4 = linear()
    weight, scale = as_float8(layer)
    assert weight.float().abs().max() == 448 and (layer.weight_scales == scale).all()
    # Half a step of 4 significant bits, and what rounding to bfloat16 does to the other side.
    assert ((weight.float() * scale - nf4).abs() <= nf4.abs() * (2**-4 + 2**-8)).all()
    assert relative(weight.float() * scale, nf4) < 0.03


def test_product_and_gradient_are_those_of_rounded_factors():
    layer, nf4 = linear()
    weight, scale = as_float8(layer)
    weight = weight.float() * scale
    x = torch.randn(3, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(3, 50, 96, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(g)

    def rounded(t):
        q, scales = to_float8(t.detach().flatten(0, -2))
        return (q.float() * scales).view(t.shape)

    torch.testing.assert_close(out, (rounded(x) @ weight.t()).bfloat16() + layer.bias, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(x.grad, (rounded(g) @ weight).bfloat16(), rtol=2**-7, atol=1e-3)
    # And so near those of the nf4 base.
    assert relative(out, x.float() @ nf4.t() + layer.bias) < 0.05
    assert relative(x.grad, g.float() @ nf4) < 0.05


def test_compiled_it_gives_the_same_bits():
    layer, _ = linear()
    layer.bias = None  # which compiled code adds before it rounds to bfloat16, eager code after
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 64, dtype=torch.bfloat16, generator=generator, requires_grad=True)
    g = torch.randn(7, 96, dtype=torch.bfloat16, generator=generator)
    out, compiled = layer(x), torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(compiled, out)
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (compiled, out)))


def run(module, *inputs, keep=None) -> list[torch.Tensor]:
    """Output and gradients; `keep` gets what is saved for the backward pass and is neither a weight nor a buffer."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()

    def pack(t):
        if keep is not None and t.untyped_storage().data_ptr() not in known:
            keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = module(x, *inputs)
    y.float().square().sum().backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    module.zero_grad()
    return [y.detach(), x.grad, *gradients]


def adapted(folder, float8_products) -> DreamModel:
    """Its adapters already change something."""
    model = loaded(folder, float8_products=float8_products)
    add_lora(model, LoraParams(rank=4, targets="all-linear"), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.train()


@pytest.mark.parametrize("float8_products", [True, False])
def test_a_decoder_layer_keeps_nothing_of_its_weights(folder, float8_products):
    """As the compiler divides it, generating no code: of 6 tokens and adapters of rank 4, not of weights or scales."""
    layer, kept = adapted(folder, float8_products).model.layers[0], []
    rest = (rotary_angles(torch.arange(6)[None], 16, 1e6, torch.bfloat16), None)
    eager = run(layer, *rest)
    with torch._functorch.config.patch(activation_memory_budget=0.8):
        layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        divided = run(layer, *rest, keep=kept)
    assert kept and all({6, 4} & set(t.shape) for t in kept), [t.shape for t in kept]
    assert len(divided) == 2 + 2 * 7
    for ours_, expected in zip(divided, eager, strict=True):
        assert relative(ours_, expected) < 0.01


def test_the_base_is_that_of_nf4(folder):
    plain, model = loaded(folder, float8_products=False).eval(), loaded(folder).eval()
    assert is_4bit(model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        expected, before = plain(IDS).logits, model(IDS).logits
        with held_in_bfloat16(plain), held_in_bfloat16(model):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model(IDS).logits, before)
    assert 0 < relative(before, expected) < 0.1


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dora": True}, {"rslora": True}], ids=str)
def test_gradients_reach_every_adapter_under_checkpointing(folder, options):
    model = loaded(folder).train()
    add_lora(model, LoraParams(rank=4, targets="all-linear", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).logits.float().square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trained
    with pytest.raises(ValueError, match="not merged into a quantised base"):
        merge_lora(model)


def test_adapters_on_it_learn_like_those_on_nf4(folder):
    """Loss of a next-value task after 60 steps, within 3 %."""
    losses = [loss_after_60_steps(loaded(folder, float8_products=products)) for products in (False, True)]
    assert losses[0] < 3.5  # of ln 64 = 4.16: it has learnt something
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_what_has_no_float8_is_refused(folder, tmp_path, monkeypatch):
    odd = copy.deepcopy(SIZES) | {"intermediate_size": 120}
    DreamModel(DreamConfig(**odd)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        loaded(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"A100 has no 8-bit floats.*set model.quantize to nf4"):
        load_4bit(model, weight_files(folder), device="cuda", float8_products=True)
