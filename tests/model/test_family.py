"""Models that descend from Dream load by their config.json and answer; what is another network is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dream_lightning import DreamConfig, DreamModel, SamplingParams, diffusion_generate
from dream_lightning.errors import UserError

# The fields of Dream-v0-Instruct-7B but its sizes.
PUBLISHED = {
    **{"architectures": ["DreamModel"], "model_type": "Dream", "attention_dropout": 0.0, "hidden_act": "silu"},
    **{"auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}},
    **{"bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643, "mask_token_id": 151666},
    **{"initializer_range": 0.02, "max_position_embeddings": 131072, "max_window_layers": 28, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True},
    **{"use_mrope": False, "vocab_size": 152064},
}
TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILY = {"Dream-Coder, DiffuCoder, d3LLM, dParallel": {}, "DreamOn": {"expand_token_id": 151667}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("family")
    state = DreamModel(DreamConfig(**TINY)).to(torch.bfloat16).state_dict()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", FAMILY)
def test_it_loads_answers_and_keeps_its_config(folder, name, tmp_path):
    published = PUBLISHED | TINY | FAMILY[name]
    (folder / "config.json").write_text(json.dumps(published))
    model = DreamModel.from_pretrained(folder)
    params = SamplingParams(max_new_tokens=4, steps=4, forbid_mask=True)
    answer = diffusion_generate(model, torch.arange(5)[None], params=params).sequences[0, 5:]
    assert len(answer) == 4 and not {151666, FAMILY[name].get("expand_token_id")} & set(answer.tolist())
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert published | {"transformers_version": saved["transformers_version"]} == {n: saved.get(n) for n in published}
    assert ("expand_token_id" in saved) == ("expand_token_id" in published)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["DreamForCausalLM"]}, "architectures has 'DreamForCausalLM': another network than Dream's"),
        ({"block_size": 32}, "block_size is 32: another network than Dream's, which has no block_size"),
        ({"model_type": "llada"}, "model_type is 'llada', wanted 'Dream'"),
        ({"expand_token_id": 152064}, "expand_token_id is 152064, wanted at least 0 and at most 152063"),
    ],
)
def test_another_network_is_refused_by_its_field(folder, change, words):
    (folder / "config.json").write_text(json.dumps(PUBLISHED | TINY | change))
    with pytest.raises(UserError, match=rf"config\.json: {words}"):
        DreamModel.from_pretrained(folder)
