"""What compiled layers make again in the backward pass must be the same, and cheap."""

import pytest
import torch
from torch import nn

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.kernels import recomputing
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.modeling import rotary_angles
from dream_lightning.model_factory import compile_layers


@pytest.fixture(autouse=True)
def afresh():
    yield
    torch._dynamo.reset()
    torch._inductor.config.joint_custom_post_pass = None
    torch._functorch.config.activation_memory_budget = 1.0


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)])
def test_dropout_is_the_same_in_both_passes(dropout, attention_dropout):
    """The gradient by autograd and by two forward passes, beside each other on the way of the gradient."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 448, "intermediate_size": 2368, "num_attention_heads": 28, "num_key_value_heads": 4}
    tokens = {"pad_token_id": 1, "mask_token_id": 2, "eos_token_id": 1, "bos_token_id": 1}
    config = DreamConfig(vocab_size=256, num_hidden_layers=1, attention_dropout=attention_dropout, **sizes, **tokens)
    model = DreamModel(config)
    add_lora(model, LoraParams(targets=["q_proj", "v_proj"], dropout=dropout))
    compile_layers(model)
    layer = model.model.layers[0].train()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    rotation = rotary_angles(torch.arange(256)[None], config.head_dim, 1e4, torch.float32)
    x, weight = torch.randn(1, 256, 448, requires_grad=True), torch.randn(1, 256, 448)
    trained = layer.self_attn.v_proj.lora_A["default"].weight

    def loss():
        torch.manual_seed(1)
        return (layer(x, rotation, None) * weight).sum()

    (gradient,) = torch.autograd.grad(loss(), trained)
    step = 0.02 * gradient / gradient.norm()
    around = []
    for sign in (1, -1):
        with torch.no_grad():
            trained.add_(sign * step)
            around.append(loss().item())
            trained.sub_(sign * step)
    assert (around[0] - around[1]) / 0.04 == pytest.approx(gradient.norm().item(), rel=2e-3)


def test_what_is_kept():
    aten = torch.ops.aten
    kept = [aten.native_dropout, aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention]
    kept += [torch.ops.dream_lightning.attention_one_by_one, torch.ops.torch_attn._varlen_attn]
    assert all(recomputing._is_kept(operation.default) for operation in kept)
    others = [aten.mm, aten._scaled_dot_product_cudnn_attention_backward, torch.ops.torch_attn._varlen_attn_backward]
    assert not any(recomputing._is_kept(operation.default) for operation in others)


def test_anybody_elses_pass_is_not_replaced():
    torch._inductor.config.joint_custom_post_pass = other = lambda graph: None
    with pytest.raises(ValueError, match=r"joint_custom_post_pass is .*set compile_layers to false"):
        recomputing.recompute_what_is_cheap()
    assert torch._inductor.config.joint_custom_post_pass is other


def test_code_for_another_attention_is_not_taken_from_a_cache():
    kept = recomputing._Kept().uuid()
    assert kept == recomputing._Kept().uuid()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert kept != recomputing._Kept().uuid()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
