"""Fewer kernels for a forward without gradients: q with k and v and gate with up at once, sums in products.

A forward of few tokens is bound by reading weights, and one large product reads them faster than two or three small
ones. The weights lie one after the other in one tensor, of which those of the layers are views: no memory more, and
parameters keep their identity, names, values and gradients. A forward of many tokens gains where the last products of
attention and MLP add themselves to the residual stream, and where gate and up are never written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dream_lightning.batch import DocumentBounds
from dream_lightning.model.kv_cache import LayerCache
from dream_lightning.model.modeling import AttentionMask, DreamAttention, DreamDecoderLayer, DreamMLP, Span, within

Weights = tuple[Tensor, Tensor | None]  # weight [sum of out_features, D] and bias of several layers

# Measured at 7B shapes on an H100: gate and up of 512 tokens by one product 0.187 ms for 0.196, of 4,096 tokens 1.65
# for 1.46; these by the kernel, with what becomes of them, 1.68 for 1.74, but of 1,056 tokens 0.56 for 0.49.
_FEW, _MANY = 1024, 2048
_ALIGNMENT = 16  # bytes: compiled code and libraries take it for granted that weights begin at multiples


def fuse_weights_(trunk: nn.Module) -> None:
    """Move weights to where `joined` can use them: plain linear layers only, and once.

    Needs memory for one group beside the model. Adapted, quantised and hooked layers stay where they are, and so do
    groups of which only a part is trained: `torch.save` of that part would write all.
    """
    with torch.inference_mode(False), torch.no_grad():  # Lightning validates in inference mode, and then trains
        for layer in trunk.layers:
            for tensors in (*_parameters(_q_k_v(layer)), *_parameters(_gate_up(layer))):
                if _as_one(tensors) is None and _may_move(tensors):
                    whole = torch.cat([t.data for t in tensors])
                    for tensor, part in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
                        tensor.data = part
                    if whole.is_cuda:  # the old places are too small for the next group, and would lie about unused
                        torch.cuda.empty_cache()


@contextmanager
def joined(trunk: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, forwards of so many tokens (rows · columns) without gradients take fewer kernels.

    Those of layers whose attention and MLP are Dream's own and not hooked. A layer's input changes.
    """
    layers = [layer for layer in trunk.layers if _is_own(layer)]
    try:
        for layer in layers:
            layer.joint = JointForward.of(layer, tokens)
        yield
    finally:
        for layer in layers:
            layer.joint = None


@dataclass(frozen=True)
class JointForward:
    """A layer's forward in fewer kernels; where None or False stands, in those of its modules."""

    q_k_v: Weights | None  # by one product
    gate_up: Weights | None  # the same
    gated: bool  # gate, up and what becomes of them by `swiglu`
    attention_adds: bool  # the last product adds itself to the residual stream
    mlp_adds: bool  # the same

    @classmethod
    def of(cls, layer: DreamDecoderLayer, tokens: int) -> "JointForward":
        """What is faster for so many tokens, and can be done with weights as they lie."""
        return cls(
            _together(_q_k_v(layer)),
            _together(_gate_up(layer)) if tokens <= _FEW else None,
            tokens >= _MANY and _has_kernel(layer.mlp),
            _is_plain(layer.self_attn.o_proj),
            _is_plain(layer.mlp.down_proj),
        )

    def __call__(
        self,
        layer: DreamDecoderLayer,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: AttentionMask | DocumentBounds | None,
        cache: LayerCache | None,
        span: Span | None,
    ) -> Tensor:
        """As `DreamDecoderLayer.forward`; x may change."""
        assert not torch.is_grad_enabled(), "the layer would get no gradients"
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = products(layer.input_layernorm(x), _q_k_v(layer), self.q_k_v)
        seen = attention.attend(q, k, v, rotation, mask, cache, span)
        x = added(x[:, within(span)], seen, attention.o_proj, self.attention_adds)

        h = layer.post_attention_layernorm(x)
        if self.gated:
            h = swiglu(h, mlp.gate_proj.weight, mlp.up_proj.weight)
        else:
            gate, up = products(h, _gate_up(layer), self.gate_up)
            h = F.silu(gate) * up
        return added(x, h, mlp.down_proj, self.mlp_adds)


def products(x: Tensor, layers: Sequence[nn.Module], together: Weights | None) -> Sequence[Tensor]:
    """What each of the layers makes of x [..., D]; by one product of their weights `together`."""
    if together is None:
        return [layer(x) for layer in layers]
    return F.linear(x, *together).split([layer.out_features for layer in layers], dim=-1)


def added(stream: Tensor, x: Tensor, layer: nn.Module, in_product: bool) -> Tensor:
    """stream [B, W, D] + what the layer makes of x [B, W, I]; in its product, which changes the stream."""
    if not in_product:
        return stream + layer(x)
    if _casts(stream, x, layer.weight):
        return stream + F.linear(x, layer.weight)
    stream = stream.contiguous()
    _add_to_stream(stream, x, layer.weight)
    return stream


@torch.library.custom_op("dream_lightning::add_to_stream", mutates_args=("stream",))
def _add_to_stream(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    # An operation of its own, as the compiler would take it apart into a copy and a product.
    stream.view(-1, stream.shape[-1]).addmm_(x.flatten(0, -2), weight.t())


@_add_to_stream.register_fake
def _(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    pass


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) of x [..., D] and weights [I, D], by one kernel where no type has to change."""
    if _casts(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)
    return _swiglu(x.flatten(0, -2), gate, up).unflatten(0, x.shape[:-1])


@torch.library.custom_op("dream_lightning::swiglu", mutates_args=())
def _swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    from dream_lightning.kernels import swiglu  # which needs triton

    return swiglu.swiglu(x, gate, up)


@_swiglu.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(len(x), len(gate))


def _casts(*tensors: Tensor) -> bool:
    """Whether a product of these casts one of them, which torch's own products do and ours do not."""
    return torch.is_autocast_enabled(tensors[0].device.type) or len({t.dtype for t in tensors}) > 1


def _q_k_v(layer: nn.Module) -> list[nn.Module]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _gate_up(layer: nn.Module) -> list[nn.Module]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def _is_own(layer: DreamDecoderLayer) -> bool:
    parts = (layer.self_attn, DreamAttention), (layer.mlp, DreamMLP)
    return all(type(part) is kind and not _own_ways(part) for part, kind in parts)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not _own_ways(layer)


def _own_ways(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _has_kernel(mlp: DreamMLP) -> bool:
    """Whether `swiglu` can make gate and up, on the kind of GPU where it was measured."""
    layers = (mlp.gate_proj, mlp.up_proj)
    if not all(_is_plain(layer) and layer.bias is None and layer.weight.is_cuda for layer in layers):
        return False
    weight = mlp.gate_proj.weight
    fits = weight.dtype.itemsize == 2 and all(size * weight.itemsize % _ALIGNMENT == 0 for size in weight.shape)
    return fits and torch.cuda.get_device_capability(weight.device) == (9, 0)


def _parameters(layers: list[nn.Module]) -> list[list[Tensor]]:
    """The weights, and where there are some the biases, of plain layers; nothing where one is not plain."""
    if not all(map(_is_plain, layers)):
        return []
    kinds = ["weight"] if layers[0].bias is None else ["weight", "bias"]
    return [[getattr(linear, kind) for linear in layers] for kind in kinds]


def _may_move(tensors: list[Tensor]) -> bool:
    kinds = {(t.dtype, t.device, t.requires_grad, t.is_inference()) for t in tensors}
    return len(kinds) == 1 and not tensors[0].is_inference() and all(t.nbytes % _ALIGNMENT == 0 for t in tensors)


def _together(layers: list[nn.Module]) -> Weights | None:
    """Weights and biases, if each lie one after the other."""
    tensors = [_as_one(tensors) for tensors in _parameters(layers)]
    if not tensors or any(t is None for t in tensors):
        return None
    weight, *bias = tensors
    return weight, bias[0] if bias else None


def _as_one(tensors: list[Tensor]) -> Tensor | None:
    """One tensor over all, if they lie one after the other in one storage."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.data_ptr() == end and tensor.is_contiguous()):
            return None
        end += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
