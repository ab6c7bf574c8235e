"""The 4-bit base: straight from the files, really small, close to bfloat16, and trainable under adapters."""

import hashlib
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dream_lightning.adapters import (
    LoraParams,
    adapter_state,
    add_lora,
    base_hash,
    check_base,
    held_in_bfloat16,
    is_4bit,
    load_4bit,
    load_adapter_state,
    merge_lora,
    quantize_layers,
    trainable_summary,
)
from dream_lightning.diffusion.denoiser import features
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "mask_token_id": 510,
    "pad_token_id": 511,
    "bos_token_id": 511,
    "eos_token_id": 511,
    "max_position_embeddings": 512,
}
IDS = torch.arange(48).reshape(2, 24) * 11 % 500
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def on_meta() -> DreamModel:
    with torch.device("meta"):
        return DreamModel(DreamConfig(**SIZES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = DreamModel(DreamConfig(**SIZES, initializer_range=0.05))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.1)
    path = tmp_path_factory.mktemp("base")
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="300KB")
    assert len(set(weight_files(path).values())) > 1
    return path


@pytest.fixture
def model(folder):
    model = on_meta()
    load_4bit(model, weight_files(folder))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits.float()


@needs_bitsandbytes
class TestFourBits:
    def test_logits_are_close_to_bfloat16(self, model, folder):
        exact = logits(DreamModel.from_pretrained(folder).eval())
        correlation = torch.corrcoef(torch.stack([logits(model).flatten(), exact.flatten()]))[0, 1]
        assert 0.93 < correlation < 1 - 1e-6

    def test_logits_are_those_of_the_rounded_weights(self, model, folder):
        """NF4 moves normally distributed weights by about 9 % (rms), and the arithmetic adds nothing to that."""
        from bitsandbytes.functional import dequantize_4bit

        rounded = DreamModel.from_pretrained(folder).eval()
        for name, p in model.named_parameters():
            if p.dtype == torch.uint8:
                exact, weight = rounded.get_parameter(name).data, dequantize_4bit(p, p.quant_state)
                assert 0.08 < (weight - exact).float().norm() / exact.float().norm() < 0.10, name
                rounded.get_parameter(name).data = weight
        torch.testing.assert_close(logits(model), logits(rounded), rtol=0.02, atol=0.02)

    def test_only_the_layers_linears_are_packed(self, model, folder):
        exact = DreamModel.from_pretrained(folder)
        packed = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
        assert packed == {n for n, p in exact.named_parameters() if "_proj.weight" in n}
        assert len(packed) == 7 * SIZES["num_hidden_layers"]
        for name, p in model.named_parameters():
            assert not p.is_meta and not p.requires_grad
            if name not in packed:
                assert p.dtype == torch.bfloat16
                assert torch.equal(p, exact.get_parameter(name))

    def test_weights_are_four_bits_in_memory(self, model):
        elements = size = 0
        for name, p in model.named_parameters():
            if p.dtype == torch.uint8:
                state = p.quant_state
                elements += state.shape.numel()
                size += p.nbytes + state.absmax.nbytes
                assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16), name
        # 4 bits a weight and 8 for the scale of every 64.
        assert 8 * size / elements == pytest.approx(4 + 8 / 64, rel=0.01)

    def test_counts_are_of_real_parameters(self, model):
        real = sum(p.numel() for p in on_meta().parameters())
        assert trainable_summary(model).total == real
        counted = on_meta()
        quantize_layers(counted)
        add_lora(counted, LoraParams(rank=4))
        count = trainable_summary(counted)
        assert count.total == real + count.trainable == real + 2 * 4 * (128 + 128 + 128 + 32)

    def test_the_start_equals_the_4bit_base_bit_for_bit(self, model):
        before = logits(model)
        add_lora(model, LoraParams(targets="all-linear"))
        assert torch.equal(logits(model), before)

    def test_dora_starts_at_the_4bit_base(self, model):
        before = logits(model)
        add_lora(model, LoraParams(dora=True))
        torch.testing.assert_close(logits(model), before, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_gradients_reach_every_adapter_under_checkpointing(self, model, dora, autocast):
        """Also after a validation: bitsandbytes would repack the weights of an evaluated model for the CPU."""
        add_lora(model, LoraParams(rank=4, targets="all-linear", dora=dora))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.01)
        logits(model)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        where = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.lm_head(features(model, IDS, where)).float().square().sum().backward()
        adapters = {n for n, _ in model.named_parameters() if ".lora_" in n}
        assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == adapters
        assert len(adapters) == (3 if dora else 2) * 7 * SIZES["num_hidden_layers"]
        assert all(model.get_parameter(n).dtype == torch.float32 for n in adapters)

    def test_evaluation_does_not_repack_weights(self, model):
        weight = model.model.layers[0].mlp.up_proj.weight
        before = weight.clone()
        logits(model)
        assert torch.equal(weight, before)

    def test_adapters_move_to_a_bfloat16_base_and_merge_there(self, model, folder):
        add_lora(model, LoraParams(rank=4))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02)
        with pytest.raises(ValueError, match="not merged into a quantised base"):
            merge_lora(model)
        exact = DreamModel.from_pretrained(folder).eval()
        add_lora(exact, LoraParams(rank=4))
        load_adapter_state(exact, adapter_state(model))
        unmerged = logits(exact)
        assert torch.corrcoef(torch.stack([logits(model).flatten(), unmerged.flatten()]))[0, 1] > 0.93
        merge_lora(exact)
        torch.testing.assert_close(logits(exact), unmerged, rtol=0.05, atol=0.05)

    def test_adapters_are_all_that_is_saved(self, model):
        add_lora(model, LoraParams(rank=4))
        assert all(".lora_" in name for name in adapter_state(model))
        assert len(adapter_state(model)) == 2 * 2 * SIZES["num_hidden_layers"]

    def test_float32_checkpoints_become_4_bits_too(self, folder, tmp_path, model):
        DreamModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
        other = on_meta()
        load_4bit(other, weight_files(tmp_path))
        assert torch.equal(logits(other.eval()), logits(model))

    def test_a_model_with_memory_is_refused(self, folder):
        with pytest.raises(ValueError, match="wanted one on the meta device"):
            load_4bit(DreamModel(DreamConfig(**SIZES)), weight_files(folder))

    def test_missing_tensors_are_named(self, folder):
        files = weight_files(folder)
        del files["model.norm.weight"]
        with pytest.raises(ValueError, match=r"lack 1 of the model's tensors, model.norm.weight"):
            load_4bit(on_meta(), files)

    def test_quantising_after_adapters_is_refused(self):
        model = on_meta()
        add_lora(model, LoraParams())
        with pytest.raises(ValueError, match="quantise first"):
            quantize_layers(model)

    def test_dora_on_an_empty_model_is_refused(self):
        model = on_meta()
        quantize_layers(model)
        with pytest.raises(ValueError, match="load_4bit first, or count unquantised"):
            add_lora(model, LoraParams(dora=True))

    def test_nothing_stays_open(self, model, folder):
        """The weights are copies: changing the files later does not reach them."""
        before = model.lm_head.weight.clone()
        file = weight_files(folder)["lm_head.weight"]
        content = file.read_bytes()
        try:
            with open(file, "r+b") as opened:
                opened.seek(-1000, 2)
                opened.write(b"\1" * 1000)
            assert torch.equal(model.lm_head.weight, before)
        finally:
            file.write_bytes(content)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = on_meta()
    with pytest.raises(ValueError, match=r"bitsandbytes cannot be imported .*pip install bitsandbytes, or leave"):
        quantize_layers(model)
    assert not is_4bit(model)


class TestBaseHash:
    def test_does_not_depend_on_the_shards(self, folder, tmp_path):
        DreamModel.from_pretrained(folder).save_pretrained(tmp_path)
        assert len(set(weight_files(tmp_path).values())) == 1
        assert base_hash(weight_files(tmp_path)) == base_hash(weight_files(folder))

    @pytest.mark.parametrize("change", ["one small step", "one layer", "a name", "a shape", "a dtype"])
    def test_another_base_has_another_hash(self, folder, tmp_path, change):
        state = {}
        for name, file in weight_files(folder).items():
            with safe_open(file, framework="pt") as tensors:
                state[name] = tensors.get_tensor(name)
        if change == "one small step":
            state = {n: (t.float() * (1 + 2**-7)).to(t.dtype) for n, t in state.items()}
        elif change == "one layer":
            state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"] + 0.01
        elif change == "a name":
            state["model.last_norm.weight"] = state.pop("model.norm.weight")
        elif change == "a shape":
            state["model.norm.weight"] = state["model.norm.weight"][None]
        else:
            state["model.norm.weight"] = state["model.norm.weight"].view(torch.float16)
        save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
        assert base_hash(weight_files(tmp_path)) != base_hash(weight_files(folder))

    def test_small_tensors_are_read_whole(self, tmp_path):
        weight = torch.arange(1000, dtype=torch.float32)
        save_file({"w": weight}, tmp_path / "model.safetensors")
        content = json.dumps(["w", "F32", [1000]]).encode() + weight.numpy().tobytes()
        assert base_hash(weight_files(tmp_path)) == hashlib.sha256(content).hexdigest()

    def test_adapters_of_another_base_are_refused(self):
        check_base("a" * 64, "a" * 64, saved_base="x", loaded_base="y")
        with pytest.raises(ValueError, match=r"belong to Dream-Base \(hash aaaaaaaaaaaa\).*Dream-Instruct has other"):
            check_base("a" * 64, "b" * 64, saved_base="Dream-Base", loaded_base="Dream-Instruct")


@needs_bitsandbytes
def test_held_in_bfloat16_the_numbers_stay(model):
    with torch.no_grad():
        before = model(IDS).logits
        with held_in_bfloat16(model):
            assert not any("4bit" in type(module).__name__ for module in model.modules())
            inside = model(IDS).logits
        after = model(IDS).logits
    torch.testing.assert_close(inside, before)
    assert torch.equal(after, before)
    with pytest.raises(ValueError, match="no 4-bit layers"), held_in_bfloat16(torch.nn.Linear(2, 2)):
        pass


@needs_bitsandbytes
def test_held_in_bfloat16_under_adapters(model):
    add_lora(model, LoraParams(targets="all-linear"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            before = model(IDS).logits
            with held_in_bfloat16(model):
                inside = model(IDS).logits
            after = model(IDS).logits
    torch.testing.assert_close(inside, before)
    assert torch.equal(after, before)
