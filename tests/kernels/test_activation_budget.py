"""The activation budget recomputes what is cheap and keeps attention."""

import pytest
import torch

from dream_lightning.errors import UserError
from dream_lightning.kernels import activation_budget, packed_attention


@pytest.fixture(autouse=True)
def restore_settings():
    inductor, functorch = torch._inductor.config, torch._functorch.config
    with inductor.patch(joint_custom_post_pass=None), functorch.patch(activation_memory_budget=1.0):
        yield


def test_attention_is_kept_and_nothing_else():
    assert packed_attention  # registers the operations
    aten, ours = torch.ops.aten, torch.ops.dream_lightning
    kept = [aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention]
    kept += [ours.cudnn_attention, torch.ops.torch_attn._varlen_attn]
    assert all(activation_budget.is_attention(operation.default) for operation in kept)
    others = [aten.mm, aten._scaled_dot_product_cudnn_attention_backward, ours.cudnn_attention_backward]
    assert not any(activation_budget.is_attention(operation.default) for operation in others)


def test_a_pass_of_somebody_else_is_not_replaced():
    torch._inductor.config.joint_custom_post_pass = other = lambda graph: None
    with pytest.raises(UserError, match=r"joint_custom_post_pass is .*set model.compile_layers to false"):
        activation_budget.install()
    assert torch._inductor.config.joint_custom_post_pass is other


def test_the_cache_distinguishes_attention_kernels():
    activation_budget.install()
    key = torch._inductor.config.joint_custom_post_pass.uuid()
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
        assert torch._inductor.config.joint_custom_post_pass.uuid() != key
