"""Fewer kernels for a forward without gradients: fused q·k·v and gate·up projections, residuals added in the product.

A forward of few tokens is bound by reading weights, and one large product reads them faster than two or three small
ones. The weights of a group are views of one tensor: no extra memory, and parameters keep their identity, names, values
and gradients. A forward of many tokens gains where the last product of attention and of the MLP adds to the residual
stream in-place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_lightning.model.attention import within
from dream_lightning.model.modeling import DreamAttention, DreamBaseModel, DreamDecoderLayer, DreamMLP

Weights = tuple[Tensor, Tensor | None]  # fused weight [sum of out_features, D] and bias

# Gate and up by one product, measured at 7B shapes on an H100: 0.187 ms for 0.196 with 512 tokens, 1.65 ms for 1.46
# with 4,096.
_FEW_TOKENS = 1024
_ALIGNMENT = 16  # bytes; compiled code and libraries assume that weights begin at multiples of it


def fuse_weights_(trunk: DreamBaseModel) -> None:
    """Make the weights of q, k and v, and those of gate and up, views of one tensor each; once, in-place.

    Needs memory for one group on top of the model. Adapted, quantized and hooked layers are left alone, and so are
    groups of which only a part trains: `torch.save` of that part would write all of it.
    """
    with torch.inference_mode(False), torch.no_grad():  # Lightning validates in inference mode, and then trains
        for layer in trunk.layers:
            for tensors in (*_parameters(_q_k_v(layer)), *_parameters(_gate_up(layer))):
                if _as_one(tensors) is None and _can_move(tensors):
                    whole = torch.cat([t.data for t in tensors])
                    for tensor, part in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
                        tensor.data = part
                    if whole.is_cuda:  # the freed blocks are too small for the next group
                        torch.cuda.empty_cache()


@contextmanager
def fused_projections(trunk: DreamBaseModel, tokens: int) -> Iterator[None]:
    """Inside, forwards of `tokens` (rows · columns) tokens take fewer kernels; without gradients only.

    Layers whose attention or MLP was replaced or hooked compute as before. A layer changes its input in-place.
    """
    layers = [layer for layer in trunk.layers if _is_original(layer)]
    for layer in layers:
        layer.fused = _Fused(
            q_k_v=_fused_weights(_q_k_v(layer)),
            gate_up=_fused_weights(_gate_up(layer)) if tokens <= _FEW_TOKENS else None,
            o_proj=_is_plain(layer.self_attn.o_proj),
            down_proj=_is_plain(layer.mlp.down_proj),
        )
        layer.__class__ = _FusedDecoderLayer
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = DreamDecoderLayer
            del layer.fused


class _Fused(NamedTuple):
    """Which products of a layer are fused; with None or False its modules are called."""

    q_k_v: Weights | None
    gate_up: Weights | None
    o_proj: bool
    down_proj: bool


class _FusedDecoderLayer(DreamDecoderLayer):
    fused: _Fused

    def forward(self, x: Tensor, rotation, mask, cache=None, span=None) -> Tensor:
        """As `DreamDecoderLayer.forward`; x may change."""
        assert not torch.is_grad_enabled(), "the layer would get no gradients"
        q, k, v = fused_linear(self.input_layernorm(x), _q_k_v(self), self.fused.q_k_v)
        seen = self.self_attn.attend(q, k, v, rotation, mask, cache, span)
        x = linear_residual(x[:, within(span)], seen, self.self_attn.o_proj, self.fused.o_proj)
        gate, up = fused_linear(self.post_attention_layernorm(x), _gate_up(self), self.fused.gate_up)
        return linear_residual(x, F.silu(gate) * up, self.mlp.down_proj, self.fused.down_proj)


def fused_linear(x: Tensor, layers: Sequence[nn.Module], weights: Weights | None) -> Sequence[Tensor]:
    """The output of each layer for x [..., D]; by one product where their fused weights are given."""
    if weights is None:
        return [layer(x) for layer in layers]
    return F.linear(x, *weights).split([layer.out_features for layer in layers], dim=-1)


def linear_residual(stream: Tensor, x: Tensor, layer: nn.Module, in_place: bool) -> Tensor:
    """stream [B, W, D] + layer(x [B, W, I]); `in_place` adds inside the product where no dtype has to change."""
    casts = torch.is_autocast_enabled(x.device.type) or not stream.dtype == x.dtype == layer.weight.dtype
    if not in_place or casts:
        return stream + layer(x)
    stream = stream.contiguous()
    _linear_residual_(stream, x, layer.weight)
    return stream


# A custom operation, as the compiler would turn addmm_ into a copy and a product.
@torch.library.custom_op("dream_lightning::linear_residual_", mutates_args=("stream",))
def _linear_residual_(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    stream.view(-1, stream.shape[-1]).addmm_(x.flatten(0, -2), weight.t())


_linear_residual_.register_fake(lambda stream, x, weight: None)


def _q_k_v(layer: DreamDecoderLayer) -> list[nn.Module]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _gate_up(layer: DreamDecoderLayer) -> list[nn.Module]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def _is_original(layer: nn.Module) -> bool:
    own = type(layer) is DreamDecoderLayer
    return own and _is_plain(layer.self_attn, DreamAttention) and _is_plain(layer.mlp, DreamMLP)


def _is_plain(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether it is of this very class and has no hooks."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


def _parameters(layers: list[nn.Module]) -> list[list[Tensor]]:
    """The weights and, if there are any, the biases of plain layers; nothing if a layer is not plain."""
    if not all(map(_is_plain, layers)):
        return []
    kinds = ["weight"] if layers[0].bias is None else ["weight", "bias"]
    return [[getattr(linear, kind) for linear in layers] for kind in kinds]


def _can_move(tensors: list[Tensor]) -> bool:
    kinds = {(t.dtype, t.device, t.requires_grad, t.is_inference()) for t in tensors}
    return len(kinds) == 1 and not tensors[0].is_inference() and all(t.nbytes % _ALIGNMENT == 0 for t in tensors)


def _fused_weights(layers: list[nn.Module]) -> Weights | None:
    tensors = [_as_one(tensors) for tensors in _parameters(layers)]
    if not tensors or any(t is None for t in tensors):
        return None
    weight, *bias = tensors
    return weight, bias[0] if bias else None


def _as_one(tensors: list[Tensor]) -> Tensor | None:
    """One tensor over all, if they are adjacent in one storage."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.data_ptr() == end and tensor.is_contiguous()):
            return None
        end += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
