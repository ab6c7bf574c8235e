"""The native Dream against the authors' numbers, and its official format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModel, AutoModelForMaskedLM

from dream_lightning.batch import DocumentBounds
from dream_lightning.model import DreamConfig, DreamModel, attention
from dream_lightning.model_factory import compile_layers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mask_token_id": 90,
    "pad_token_id": 91,
    "bos_token_id": 91,
    "eos_token_id": 91,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared("golden/dream-tiny/golden.safetensors"))


@pytest.fixture(scope="module")
def golden_model(shared):
    return DreamModel.from_pretrained(shared("golden/dream-tiny")).eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DreamModel(DreamConfig(**SIZES)).eval()


@pytest.mark.parametrize("case", ["full", "int mask", "bool mask", "square mask"])
@torch.no_grad()
def test_forward_equals_the_authors(golden, golden_model, case):
    name = "full" if case == "full" else "leftpad"
    mask, positions = None, None
    if case != "full":
        mask, positions = golden["forward.leftpad.attention_mask"], golden["forward.leftpad.position_ids"]
        if case != "int mask":
            mask = mask.bool()
        if case == "square mask":
            mask = mask[:, None, None, :] & mask[:, None, :, None]
    logits = golden_model(golden[f"forward.{name}.input_ids"], mask, positions).logits
    torch.testing.assert_close(logits, golden[f"forward.{name}.logits"], rtol=1e-5, atol=1e-5)


def test_dream_7b_has_the_official_names_shapes_and_size(shared):
    folder = shared("data/dream-v0-instruct-7b")
    config = DreamConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = DreamModel(config)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert state.keys() == index["weight_map"].keys()
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512
    assert 2 * sum(t.numel() for t in state.values()) == index["metadata"]["total_size"]


def test_save_and_load_keep_every_bit(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DreamModel.from_pretrained(tmp_path)
    automatic = AutoModel.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(automatic) is DreamModel
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(automatic.state_dict()[name], tensor)


def test_saved_config_is_what_the_authors_read(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"model_type": "Dream", "architectures": ["DreamModel"], "torch_dtype": "bfloat16", "rope_theta": 1e6}
    assert expected.items() <= config.items()
    assert config["auto_map"]["AutoModel"] == "modeling_dream.DreamModel"
    assert config["mask_token_id"] == 90
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["mask_token_id"] == 90 and generation["eos_token_id"] == 91
    assert DreamModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_labels_are_refused(model):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="computes no loss from labels"):
        model(ids, labels=ids)


def test_gradient_checkpointing_changes_nothing(model):
    ids = torch.randint(0, 90, (2, 12))
    model.train()
    model(ids).logits.sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids).logits.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def test_repeated_keys_and_values_give_the_same(model, monkeypatch):
    """As on GPUs where no fused kernel takes a mask and fewer key/value heads."""
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    plain = model(ids, attention_mask=mask).logits
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(attention.MaskedAttention, "repeat_kv", always, raising=False)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(k), sdpa(*a, **k))[1]
    )
    assert torch.allclose(model(ids, attention_mask=mask).logits, plain, atol=1e-6)
    assert calls and not any(k["enable_gqa"] for k in calls)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 6, 5), (1, 6)])
def test_wrong_masks_are_refused(model, shape):
    with pytest.raises(ValueError, match="attention_mask is"):
        model(torch.zeros(2, 6, dtype=torch.int64), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 50}, "hidden_size is 50"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"mask_token_id": 96}, "mask_token_id is 96"),
        ({"mask_token_id": None}, "mask_token_id is null"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"eos_token_id": [91, 92]}, "eos_token_id is .91, 92., wanted a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, wanted at least 1 and at most"),
        ({"hidden_size": "48"}, "hidden_size is '48', wanted a whole number"),
        ({"intermediate_size": 80.5}, "intermediate_size is 80.5, wanted a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear.*another network"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters is .*yarn.*another network"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': another network than Dream's, which has hidden_act 'silu'"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config is .*which has no quantization_config"),
    ],
)
def test_impossible_configs_and_other_networks_are_refused_by_field(change, words):
    with pytest.raises(ValueError, match=words):
        DreamConfig(**{**SIZES, **change})


def test_both_spellings_of_rope_and_fields_that_say_what_holds_are_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    neutral = {"layer_types": ["full_attention"] * 2, "sliding_window": 4096, "head_dim": 8, "attention_bias": True}
    ids = torch.arange(12)[None]
    for theta, fields in [(1e6, neutral), (5e5, {"rope_theta": 5e5}), (5e5, {"rope_parameters": {"rope_theta": 5e5}})]:
        rope = {"rope_scaling": {"rope_type": "default"}} | fields
        (tmp_path / "config.json").write_text(json.dumps(config | rope))
        model.model.rotary.theta = theta
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        assert loaded.config.rope_theta == theta and torch.equal(loaded(ids).logits, model(ids).logits)


def lose_a_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate_a_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def change_the_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 128}
    (folder / "config.json").write_text(json.dumps(config))


def lose_the_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def rename_a_tensor(folder):
    state = DreamModel.from_pretrained(folder).state_dict()
    lose_the_weights(folder)
    state = {k.replace("model.norm", "model.last_norm"): v for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_tensor(change):
    def damage(folder):
        state = DreamModel.from_pretrained(folder).state_dict()
        lose_the_weights(folder)
        state["model.norm.weight"] = change(state["model.norm.weight"])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_the_index(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] |= change(folder, index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def write_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_shard, r"lacks 1 of its .*model-00002-of"),
        (truncate_a_shard, r"00001-of-.* damaged or no whole safetensors file"),
        (change_the_vocabulary, r"lm_head.weight is \[96, 48\], wanted \[128, 48\]"),
        (rename_a_tensor, r"missing: model.norm.weight; 1 tensors are unexpected: model.last_norm"),
        (lose_the_weights, "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (write_config('{"model_type": "llama", "hidden_size": 64}'), "model_type is 'llama', wanted 'Dream'"),
        (change_a_tensor(torch.Tensor.char), r"have another type: model.norm.weight is I8, wanted BF16"),
        (change_a_tensor(torch.Tensor.bool), r"model.norm.weight is BOOL"),
        (change_a_tensor(lambda weight: weight / 0), r"model.norm.weight in .* holds NaN or infinity"),
        (change_a_tensor(lambda weight: weight * torch.nan), r"model.norm.weight in .* holds NaN or infinity"),
        (
            change_the_index(lambda f, m: {"lm_head.weight": f"../{f.name}/{m['lm_head.weight']}"}),
            r"names the file '../",
        ),
        (change_the_index(lambda f, m: {"lm_head.weight": f"{f / m['lm_head.weight']}"}), r"names the file '/"),
        (
            change_the_index(lambda f, m: {"lm_head.weight": m["model.embed_tokens.weight"]}),
            r"lacks lm_head.weight, which",
        ),
        (change_the_index(lambda f, m: {"lm_head.weight": 3}), r"index.json is damaged or no weight index"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[1"), r"index.json is damaged or no weight index"),
        (write_config("[]"), r"config.json is damaged or no Dream's configuration"),
        (write_config('{"model_type": "Dream", "hidden_act": "gelu"}'), r"config.json: hidden_act is 'gelu'"),
        (write_config('{"model_type": "Dr'), r"config\.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(model, tmp_path, damage, words):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        DreamModel.from_pretrained(tmp_path)


def test_an_unknown_hub_id_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a-model").mkdir()
    for name, meant in (("nobody/no-such-model", ""), (tmp_path / "a-modle", "did you mean a-model. ")):
        with pytest.raises(ValueError, match=rf"neither a folder here nor a hub id.*\): {meant}check the spelling"):
            DreamModel.from_pretrained(name)


@pytest.mark.parametrize("padding", [None, 3])
def test_a_span_equals_the_same_columns_of_all(deep, prompts, padding):
    ids, mask = prompts(2, 12), None
    if padding:
        mask = (torch.arange(12) >= padding).expand(2, 12).clone()
        mask[1] = True
    with torch.no_grad():
        for first, last in ((2, 12), (7, 11)):
            some = deep.model(ids, mask, span=(first, last))
            torch.testing.assert_close(some, deep.model(ids, mask)[:, first:last])


def test_layers_are_compiled_once_for_rows_of_all_lengths(model):
    """One graph with documents in a row and one without; torch would take the first length for the only one."""
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    model.train()
    for length in (12, 30, 17):
        ids = torch.zeros(1, length, dtype=torch.long)
        starts = torch.tensor([0, *range(3, length - 8), length], dtype=torch.int32)
        for mask in (None, DocumentBounds(starts)):
            model(ids, mask).logits.sum().backward()
    assert counter.frame_count == 2
    torch._dynamo.reset()
