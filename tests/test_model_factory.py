"""From options to a network, and the kernels as an option."""

import pkgutil
import sys

import pytest
import torch
from material import short_trainer, tiny_data, tiny_module
from meeting import Program
from torch._inductor import async_compile

from dream_lightning import SamplingParams, diffusion_generate, load_tokenizer
from dream_lightning.model import attention
from dream_lightning.model_factory import install_kernels, random_model, start_compilers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def train_and_sample(folder):
    sys.modules["dream_lightning.kernels"] = None  # any import of it raises ImportError
    torch.cuda.is_available = lambda: True  # the question is asked, and the folder is missing
    model = tiny_module()
    model.configure_model()
    torch.cuda.is_available = lambda: False
    data = tiny_data("bundled", folder, first_n=16, validation_source="bundled")
    short_trainer(folder, max_steps=2).fit(model, data)
    out = diffusion_generate(model.model, torch.zeros(1, 5).long(), params=SamplingParams(max_new_tokens=4, steps=4))
    assert out.sequences.shape == (1, 9)
    assert not [name for name in sys.modules if name.startswith("dream_lightning.kernels.")]


def test_training_and_sampling_need_no_kernels(tmp_path):
    Program(train_and_sample, tmp_path).end()


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


def test_compiler_workers_start_for_a_gpu_only(monkeypatch):
    started = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(True))
    start_compilers(torch.device("cpu"))
    assert not started
    start_compilers(torch.device("cuda", 1))
    assert started


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn:Module._compiled_call_impl", "torch._dynamo:config.recompile_limit",
        "torch._dynamo:config.accumulated_recompile_limit", "torch._dynamo:maybe_mark_dynamic",
        "torch._inductor.async_compile:maybe_warm_pool", "torch:_scaled_dot_product_cudnn_attention",
        "torch:ops.aten._scaled_dot_product_cudnn_attention_backward",
    ],
)  # fmt: skip
def test_torch_has_the_private_interface(name):
    pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    ("changes", "words"), [({"hidden": 3}, "new_model has hidden"), ({"hidden_size": None}, "new_model lacks hidden")]
)
def test_unknown_and_missing_sizes_are_refused(changes, words):
    sizes = {name: size for name, size in (SIZES | changes).items() if size is not None}
    with pytest.raises(ValueError, match=words):
        random_model(sizes, load_tokenizer("bytes"))
