"""From options to a network, and the kernels as an option."""

import pytest
import torch

from dream_lightning import load_tokenizer
from dream_lightning.model import attention
from dream_lightning.model_factory import install_kernels, random_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("cuda", [True, False])
def test_packed_attention_is_installed_on_a_gpu_only(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    model = random_model(SIZES, load_tokenizer("bytes"))
    install_kernels(model, training=False)
    assert (model.model.make_attention is attention.make_attention) == (not cuda)
    ids, mask = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6) > 1
    plain = random_model(SIZES, load_tokenizer("bytes"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids, mask).logits, plain(ids, mask).logits)  # on the CPU the same


@pytest.mark.parametrize(
    ("changes", "words"), [({"hidden": 3}, "new_model has hidden"), ({"hidden_size": None}, "new_model lacks hidden")]
)
def test_unknown_and_missing_sizes_are_refused(changes, words):
    sizes = {name: size for name, size in (SIZES | changes).items() if size is not None}
    with pytest.raises(ValueError, match=words):
        random_model(sizes, load_tokenizer("bytes"))
