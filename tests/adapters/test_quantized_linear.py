"""Quantized bases: read from the files, small, near bfloat16, exact where they promise it, trainable under adapters."""

import sys

import pytest
import torch
from material import loss_after_60_steps, random_dream
from torch import nn

from dream_lightning.adapters import (
    LoraParams,
    adapter_state,
    add_lora,
    dequantized,
    load_adapter_state,
    load_quantized,
    merge_lora,
    trainable_summary,
)
from dream_lightning.adapters.float8_linear import to_float8
from dream_lightning.adapters.quantized_linear import Float8Linear, NF4Float8Linear, NF4Linear, dequantize
from dream_lightning.diffusion.denoiser import features
from dream_lightning.kernels.activation_budget import BUDGET
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.model.modeling import rotary_angles

bnb = pytest.importorskip("bitsandbytes")
LAYERS = {"nf4": NF4Linear, "nf4_float8": NF4Float8Linear, "float8": Float8Linear}
IDS = torch.arange(48).reshape(2, 24) * 11 % 60
every_kind = pytest.mark.parametrize("kind", LAYERS)
in_4_bits = pytest.mark.parametrize("kind", ["nf4", "nf4_float8"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def saved(path, **sizes):
    model = random_dream(**sizes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    assert len(set(weight_files(path).values())) > 1
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"), intermediate_size=192)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base with larger weights, where the rounding of nf4 shows."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8}
    return saved(tmp_path_factory.mktemp("wide"), initializer_range=0.05, **sizes)


def exact(folder) -> DreamModel:
    return DreamModel.from_pretrained(folder).eval()


def loaded(folder, kind="nf4", **options) -> DreamModel:
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(folder))
    load_quantized(model, weight_files(folder), kind=kind, **options)
    return model.eval()


def adapted(folder, kind) -> DreamModel:
    """Its adapters already change something."""
    model = loaded(folder, kind)
    add_lora(model, LoraParams(rank=4, targets="all-linear"), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits.float()


def filled(kind: str, in_features=64, out_features=96) -> tuple[nn.Linear, torch.Tensor]:
    """A layer and its weight before quantization, in which one block is 10,000 times smaller than the others."""
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * torch.rand(out_features, 1)
    weight[5] = weight[5] / 10_000
    layer = LAYERS[kind](nn.Linear(in_features, out_features))
    layer.fill(weight.bfloat16())
    layer.bias = nn.Parameter(0.1 * torch.randn(out_features).bfloat16(), requires_grad=False)
    return layer, weight.bfloat16()


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scales = to_float8(x.detach().flatten(0, -2))
    return (values.float() * scales).view(x.shape)


@pytest.mark.parametrize("again", [False, True])
def test_nf4_is_dequantized_as_bitsandbytes_does_bit_for_bit(again):
    layer, weight = filled("nf4", 256, 320)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(*layer.quantized(), again=again).view(320, 256), expected)
    assert torch.equal(layer.dequantized_weight(), expected)
    assert 0.08 < relative(expected, weight) < 0.10  # of normally distributed weights, rms


def test_in_float8_every_nf4_weight_keeps_four_bits_under_one_scale():
    layer, _ = filled("nf4_float8")
    nf4, scale = layer.dequantized_weight().float(), layer.weight_scales[0]
    weight, again = (dequantize(*layer.quantized()[:-1], dtype=torch.float8_e4m3fn, again=a) for a in (False, True))
    assert torch.equal(weight.view(torch.uint8), again.view(torch.uint8))
    weight = weight.view(96, 64).float()
    assert weight.abs().max() == 448 and (layer.weight_scales == scale).all()
    # Half a step of 4 significant bits, and what rounding to bfloat16 does to the other side.
    assert ((weight * scale - nf4).abs() <= nf4.abs() * (2**-4 + 2**-8)).all()
    assert relative(weight * scale, nf4) < 0.03


@every_kind
def test_products_and_gradients_are_those_of_the_rounded_factors(kind):
    """And so near those of the nf4 weight or, for a float8 base, the bfloat16 weight."""
    layer, weight = filled(kind)
    if kind == "float8":
        forward, backward = rounded(weight), rounded(weight.t()).t()
    else:
        forward = backward = weight = layer.dequantized_weight().float()
    if kind == "nf4_float8":
        float8 = dequantize(*layer.quantized()[:-1], dtype=torch.float8_e4m3fn).view(96, 64)
        forward = backward = float8.float() * layer.weight_scales[0]
    cast = torch.Tensor.float if kind == "nf4" else rounded
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 64, generator=generator).bfloat16().requires_grad_()
    g = torch.randn(3, 50, 96, generator=generator).bfloat16()
    out = layer(x)
    out.backward(g)
    tolerance = {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(x.grad, (cast(g) @ backward).bfloat16(), **tolerance)
    if kind == "nf4":  # which adds the bias before it rounds
        torch.testing.assert_close(out, (cast(x) @ forward.t() + layer.bias).bfloat16(), **tolerance)
    else:
        torch.testing.assert_close(out, (cast(x) @ forward.t()).bfloat16() + layer.bias, **tolerance)
    assert relative(out, x.float() @ weight.float().t() + layer.bias) < 0.05
    assert relative(x.grad, g.float() @ weight.float()) < 0.05
    assert layer.weight.grad is None and layer(x.float()).dtype == torch.float32


def test_every_row_uses_the_whole_range_and_one_outlier_spoils_one_row_only():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[2, 7] = 1e4
    q, scale = to_float8(x)
    assert (q.float().abs().amax(1) == 448).all()
    errors = ((q.float() * scale - x).norm(dim=1) / x.norm(dim=1)).tolist()
    assert max(errors[:2] + errors[3:]) < 0.03


@every_kind
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_layers_give_the_same(kind, device):
    layer, _ = filled(kind)
    layer.to(device).bias = None  # which compiled code adds before it rounds to bfloat16, eager code after
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).bfloat16().to(device).requires_grad_()
    g = torch.randn(32, 96, generator=generator).bfloat16().to(device)
    out, compiled = layer(x), torch.compile(layer, fullgraph=True)(x)
    gradients = [torch.autograd.grad(y, x, g)[0] for y in (compiled, out)]
    if kind == "nf4" or device == "cuda":  # bitsandbytes multiplies eager nf4
        assert relative(compiled, out) < 2**-7 and relative(*gradients) < 2**-7
    else:
        assert torch.equal(compiled, out) and torch.equal(*gradients)


@in_4_bits
def test_a_compiled_decoder_layer_keeps_nothing_of_its_weights(folder, kind):
    """As the compiler partitions it: it saves tensors of 6 tokens and adapters of rank 4, not of weights or scales."""
    layer, kept = adapted(folder, kind).train().model.layers[0], []
    rest = (rotary_angles(torch.arange(6)[None], 16, 1e6, torch.bfloat16), None)
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t)
        return t

    def run():
        kept.clear()
        x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            y = layer(x, *rest)
        y.float().square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        layer.zero_grad()
        return [y.detach(), x.grad, *gradients]

    eager = run()
    with torch._functorch.config.patch(activation_memory_budget=BUDGET):
        layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        partitioned = run()
    assert kept and all({6, 4} & set(t.shape) for t in kept), [t.shape for t in kept]
    assert len(partitioned) == 2 + 2 * 7
    for ours, expected in zip(partitioned, eager, strict=True):
        assert relative(ours, expected) < 0.01


@every_kind
def test_only_linear_layers_are_quantized_and_all_are_frozen(folder, kind):
    model, plain = loaded(folder, kind), exact(folder)
    quantized = {name for name, module in model.named_modules() if type(module) is LAYERS[kind]}
    assert quantized == {name for name, _ in plain.named_modules() if name.endswith("_proj")}
    for name, p in model.named_parameters():
        assert not p.is_meta and not p.requires_grad
        if name.removesuffix(".weight") not in quantized:
            assert p.dtype == torch.bfloat16 and torch.equal(p, plain.get_parameter(name))


def test_nf4_logits_are_those_of_the_dequantized_weights_and_near_the_exact_ones(wide):
    model, plain = loaded(wide), exact(wide)
    assert 0.93 < correlation(logits(model), logits(plain)) < 1 - 1e-6
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            weight = plain.get_submodule(name).weight
            assert 0.08 < relative(module.dequantized_weight(), weight) < 0.10, name
            weight.data = module.dequantized_weight()
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.02, atol=0.02)


def test_float8_logits_are_near_those_of_the_base_without_float8(folder):
    assert 0 < relative(logits(loaded(folder, "float8")), logits(exact(folder))) < 0.1
    assert 0 < relative(logits(loaded(folder, "nf4_float8")), logits(loaded(folder))) < 0.1


def test_nf4_weights_take_4_bits_and_their_scales_8_per_64(folder):
    layers = [module for module in loaded(folder).modules() if isinstance(module, NF4Linear)]
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(layer.weight.nbytes + layer.scale_codes.nbytes for layer in layers)
    assert 8 * size / elements == 4 + 8 / 64
    assert trainable_summary(loaded(folder)).startswith(f"0 of {exact(folder).num_parameters():,} parameters")


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_adapter_under_checkpointing_after_a_validation(folder, kind, autocast):
    model = adapted(folder, kind)
    weight = model.model.layers[0].mlp.up_proj.base_layer.weight
    before, _ = weight.clone(), logits(model)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    where = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.lm_head(features(model, IDS, where)).float().square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trained
    assert len(trained) == 2 * 7 * 2
    assert {model.get_parameter(n).dtype for n in trained} == {torch.float32}
    with pytest.raises(ValueError, match="load the bfloat16 checkpoint"):
        merge_lora(model)


@every_kind
def test_adapters_start_at_the_base_bit_for_bit(folder, kind):
    model = loaded(folder, kind)
    before = logits(model)
    add_lora(model, LoraParams(targets="all-linear"))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("kind", "reference"), [("float8", exact), ("nf4_float8", loaded)])
def test_adapters_learn_as_on_the_base_without_float8(folder, kind, reference):
    """Loss of a next-value task after 60 steps, within 3 %."""
    expected = loss_after_60_steps(reference(folder))
    assert expected < 3.5  # of ln 64 = 4.16: it has learnt something
    assert loss_after_60_steps(loaded(folder, kind)) == pytest.approx(expected, rel=0.03)


def test_adapters_move_to_the_bfloat16_base_and_merge_there(wide):
    model, plain = loaded(wide), exact(wide)
    for adapters_of in (model, plain):
        add_lora(adapters_of, LoraParams(rank=4))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02)
    load_adapter_state(plain, adapter_state(model.state_dict()))
    unmerged = logits(plain)
    assert correlation(logits(model), unmerged) > 0.93
    merge_lora(plain)
    torch.testing.assert_close(logits(plain), unmerged, rtol=0.05, atol=0.05)


@in_4_bits
@pytest.mark.parametrize("make", [loaded, adapted])
def test_dequantized_layers_give_the_logits_of_nf4(folder, kind, make):
    model, plain = make(folder, kind), make(folder, "nf4")
    with torch.autocast("cpu", torch.bfloat16, enabled=make is adapted):
        before, expected = logits(model), logits(plain)
        with dequantized(model), dequantized(plain):
            assert not any(isinstance(module, NF4Linear) for module in model.modules())
            torch.testing.assert_close(logits(model), expected)
            assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), before)


def test_float32_checkpoints_give_the_same_base(folder, tmp_path):
    DreamModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(loaded(folder)))


def test_weights_are_copies_that_do_not_follow_the_files(tmp_path):
    model = loaded(saved(tmp_path, intermediate_size=192))
    before = model.lm_head.weight.clone()
    with open(weight_files(tmp_path)["lm_head.weight"], "r+b") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")  # of the tensors
        opened.write(b"\1" * (opened.seek(0, 2) - opened.seek(start)))
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(exact(tmp_path).lm_head.weight, before)


@pytest.mark.parametrize(("kind", "words"), [("nf4", "of 64"), ("nf4_float8", "of 16"), ("float8", "of 16")])
def test_sizes_that_do_not_fit_are_refused(tmp_path, kind, words):
    random_dream(intermediate_size=120).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"multiples {words}"):
        loaded(tmp_path, kind)


@pytest.mark.parametrize("kind", ["nf4_float8", "float8"])
def test_a_gpu_without_float8_is_refused(folder, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 has no float8.*set model.quantize to nf4"):
        loaded(folder, kind, device="cuda")


def test_without_bitsandbytes_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes, or leave"):
        loaded(folder)
