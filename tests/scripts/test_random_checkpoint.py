"""The random checkpoint is what the official one is, but for its numbers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer

FILE = Path(__file__).parents[2] / "scripts" / "random_checkpoint.py"
TINY = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mask_token_id": 260,
    "eos_token_id": 256,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("random_checkpoint", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_it_loads_and_its_numbers_are_as_said(script, tmp_path, max_shard_size):
    folder = tmp_path / "random"
    script.main(str(folder), tokenizer="bytes", max_shard_size=max_shard_size, initializer_range=0.1, **TINY)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (max_shard_size == "5GB")
    model = DreamModel.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif tensor.dim() == 2:
            assert abs(tensor.float().std() / 0.1 - 1) < 0.1 and abs(tensor.float().mean()) < 0.01
        else:
            assert 0 < tensor.float().abs().max() < 1  # biases count too
    assert len(load_tokenizer(folder)) == 263
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_the_seed_decides(script, tmp_path):
    heads = []
    for number, seed in enumerate([1, 1, 2]):
        script.main(str(tmp_path / str(number)), seed=seed, **TINY)
        heads.append(load_file(tmp_path / str(number) / "model.safetensors")["lm_head.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_only_an_empty_folder_is_written(script, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        script.main(str(tmp_path), **TINY)


def test_by_default_names_files_and_sizes_are_the_official_ones(script, shared, tmp_path, monkeypatch):
    """All but the numbers: the tensors stay on the meta device and no weights are written."""
    monkeypatch.setattr(script, "random_like", lambda tensor, *_: tensor)
    monkeypatch.setattr(script, "save_file", lambda tensors, path, **_: path.write_text("\n".join(tensors)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 16e9}))
    script.main(str(tmp_path / "random"), device="cpu")
    official = shared("data/dream-v0-instruct-7b")
    index = json.loads((official / "model.safetensors.index.json").read_text())
    assert json.loads((tmp_path / "random" / "model.safetensors.index.json").read_text()) == index
    for file in set(index["weight_map"].values()):
        names = (tmp_path / "random" / file).read_text().splitlines()
        assert sorted(names) == sorted(name for name, other in index["weight_map"].items() if other == file)
    config = json.loads((official / "config.json").read_text())
    written = json.loads((tmp_path / "random" / "config.json").read_text())
    who_wrote_it = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in config.items() if k not in who_wrote_it} == {
        k: written.get(k) for k in config if k not in who_wrote_it
    }
    assert DreamConfig.from_pretrained(tmp_path / "random").torch_dtype == torch.bfloat16
