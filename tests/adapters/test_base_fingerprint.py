"""Which base adapters belong to."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from dream_lightning.adapters import base_hash, check_base


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm": [128], "layer.0": [320, 256], "layer.1": [320, 256]}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def hash_of(state: dict[str, torch.Tensor], folder) -> str:
    save_file(state, folder / "model.safetensors")
    return base_hash(dict.fromkeys(state, folder / "model.safetensors"))


def test_it_does_not_depend_on_the_shards(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in tensors()}
    for name, tensor in tensors().items():
        save_file({name: tensor}, files[name])
    assert base_hash(files) == hash_of(tensors(), tmp_path)


CHANGES = {
    "one small step": lambda s: {n: (t.float() * (1 + 2**-7)).to(t.dtype) for n, t in s.items()},
    "one layer": lambda s: s | {"layer.1": s["layer.1"] + 0.01},
    "a name": lambda s: {n.replace("norm", "last_norm"): t for n, t in s.items()},
    "a shape": lambda s: s | {"norm": s["norm"][None]},
    "a dtype": lambda s: s | {"norm": s["norm"].view(torch.float16)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_has_another_hash(tmp_path, change):
    assert hash_of(CHANGES[change](tensors()), tmp_path) != hash_of(tensors(), tmp_path)


def test_small_tensors_are_read_whole(tmp_path):
    weight = torch.arange(1000, dtype=torch.float32)
    content = json.dumps(["w", "F32", [1000]]).encode() + weight.numpy().tobytes()
    assert hash_of({"w": weight}, tmp_path) == hashlib.sha256(content).hexdigest()


def test_adapters_of_another_base_are_refused():
    saved = {"name": "Dream-Base", "hash": "a" * 64}
    check_base(saved, {"name": "a copy", "hash": "a" * 64})
    with pytest.raises(ValueError, match=r"belong to Dream-Base \(hash aaaaaaaaaaaa\).*Dream-Instruct has other"):
        check_base(saved, {"name": "Dream-Instruct", "hash": "b" * 64})
