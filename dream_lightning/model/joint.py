"""Fewer kernels for a forward without gradients: q with k and v and gate with up at once, sums in products.

A forward of few tokens is bound by reading weights, and one large product reads them faster than two or three small
ones. The weights lie one after the other in one tensor, of which those of the layers are views: no memory more, and
parameters keep their identity, names, values and gradients. A forward of many tokens gains where the last products of
attention and MLP add themselves to the residual stream, and where gate and up are never written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Joint = tuple[Tensor, Tensor | None]  # weight [sum of out_features, D] and bias of several layers
Factors = tuple[Tensor, Tensor]  # x [..., I] and weight [O, I] of a product that is yet to be made

# Measured at 7B shapes on an H100: gate and up of 512 tokens by one product 0.187 ms for 0.196, of 4,096 tokens 1.65
# for 1.46; these by the kernel, with what becomes of them, 1.68 for 1.74, but of 1,056 tokens 0.56 for 0.49.
_FEW, _MANY, _ANY_NUMBER = 1024, 2048, 2**62
_GROUPS = (  # and the most tokens of a forward with which one product is faster
    ("self_attn", ("q_proj", "k_proj", "v_proj"), _ANY_NUMBER),
    ("mlp", ("gate_proj", "up_proj"), _FEW),
)
_ALIGNMENT = 16  # bytes: compiled code and libraries take it for granted that weights begin at multiples


def products(x: Tensor, layers: Sequence[nn.Module], joint: Joint | None) -> Sequence[Tensor]:
    """What each of the layers makes of x [..., D]; by one product where they are `joined`."""
    if joint is None:
        return [layer(x) for layer in layers]
    assert not torch.is_grad_enabled(), "the layers would get no gradients"
    return F.linear(x, *joint).split([layer.out_features for layer in layers], dim=-1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) of x [..., D] and weights [I, D], where DreamMLP's `fused` says that it is faster."""
    assert not torch.is_grad_enabled(), "the weights would get no gradients"
    if torch.is_autocast_enabled(x.device.type) or not x.dtype == gate.dtype == up.dtype:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)
    return _swiglu(x.flatten(0, -2), gate, up).unflatten(0, x.shape[:-1])


@torch.library.custom_op("dream_lightning::swiglu", mutates_args=())
def _swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    from dream_lightning.model import swiglu  # which needs triton

    return swiglu.swiglu(x, gate, up)


@_swiglu.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(len(x), len(gate))


def last_product(x: Tensor, layer: nn.Module, later: bool) -> Tensor | Factors:
    """What the layer makes of x [..., I]; while `joined` lasts its factors, for `added`."""
    return (x, layer.weight) if later else layer(x)


def added(stream: Tensor, product: Tensor | Factors) -> Tensor:
    """The sum [B, W, D]; of factors, made by their product within `stream`, which changes."""
    if isinstance(product, Tensor):
        return stream + product
    assert not torch.is_grad_enabled(), "what changes has no gradient"
    x, weight = product
    if torch.is_autocast_enabled(stream.device.type) or not stream.dtype == x.dtype == weight.dtype:
        return stream + F.linear(x, weight)
    stream = stream.contiguous()
    _add_to_stream(stream, x, weight)
    return stream


@torch.library.custom_op("dream_lightning::add_to_stream", mutates_args=("stream",))
def _add_to_stream(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    # An operation of its own, as the compiler would take it apart into a copy and a product.
    stream.view(-1, stream.shape[-1]).addmm_(x.flatten(0, -2), weight.t())


@_add_to_stream.register_fake
def _(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    pass


def lay_together(trunk: nn.Module) -> None:
    """Move weights to where `joined` can use them: plain linear layers only, and once.

    Needs memory for one group beside the model. Adapted, quantised and hooked layers stay where they are, and so do
    groups of which only a part is trained: `torch.save` of that part would write all.
    """
    with torch.inference_mode(False), torch.no_grad():  # Lightning validates in inference mode, and then trains
        for _, layers, _ in _groups(trunk):
            for tensors in _parameters(layers):
                if _as_one(tensors) is None and _may_move(tensors):
                    whole = torch.cat([t.data for t in tensors])
                    for tensor, part in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
                        tensor.data = part
                    if whole.is_cuda:  # the old places are too small for the next group, and would lie about unused
                        torch.cuda.empty_cache()


@contextmanager
def joined(trunk: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, forwards of so many tokens (rows · columns) without gradients use one product for what lies together.

    And sums are made in products, so that a layer's input changes; gate and up of many tokens by a kernel of ours.
    """
    groups, ends = list(_groups(trunk)), [end for layer in trunk.layers for end in _ends(layer)]
    gated = [layer.mlp for layer in trunk.layers if tokens >= _MANY and _has_kernel(layer.mlp)]
    try:
        for mlp in gated:
            mlp.fused = True
        for owner in ends:
            owner.adds_later = True
        for owner, layers, most in groups:
            weight, *bias = (_as_one(tensors) for tensors in _parameters(layers))
            if tokens <= most and weight is not None and None not in bias:
                owner.joint = (weight, *bias) if bias else (weight, None)
        yield
    finally:
        for owner, _, _ in groups:
            owner.joint = None
        for mlp in gated:
            mlp.fused = False
        for owner in ends:
            owner.adds_later = False


def _groups(trunk: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Linear], int]]:
    for layer in trunk.layers:
        for name, parts, most in _GROUPS:
            owner = getattr(layer, name)
            layers = [getattr(owner, part) for part in parts]
            if all(map(_is_plain, layers)):
                yield owner, layers, most


def _ends(layer: nn.Module) -> Iterator[nn.Module]:
    for owner, last in ((layer.self_attn, layer.self_attn.o_proj), (layer.mlp, layer.mlp.down_proj)):
        if _is_plain(last) and not owner._forward_hooks:
            yield owner


def _has_kernel(mlp: nn.Module) -> bool:
    """Whether `swiglu` can make gate and up, on the kind of GPU where it was measured."""
    layers = (mlp.gate_proj, mlp.up_proj)
    if not all(_is_plain(layer) and layer.bias is None and layer.weight.is_cuda for layer in layers):
        return False
    weight = mlp.gate_proj.weight
    fits = weight.dtype.itemsize == 2 and all(size * weight.itemsize % _ALIGNMENT == 0 for size in weight.shape)
    return fits and torch.cuda.get_device_capability(weight.device) == (9, 0)


def _is_plain(layer: nn.Module) -> bool:
    own_ways = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not own_ways


def _parameters(layers: list[nn.Linear]) -> list[list[Tensor]]:
    """The weights, and where there are some the biases."""
    kinds = ["weight"] if layers[0].bias is None else ["weight", "bias"]
    return [[getattr(linear, kind) for linear in layers] for kind in kinds]


def _may_move(tensors: list[Tensor]) -> bool:
    kinds = {(t.dtype, t.device, t.requires_grad, t.is_inference()) for t in tensors}
    return len(kinds) == 1 and not tensors[0].is_inference() and all(t.nbytes % _ALIGNMENT == 0 for t in tensors)


def _as_one(tensors: list[Tensor]) -> Tensor | None:
    """One tensor over all, if they lie one after the other in one storage."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.data_ptr() == end and tensor.is_contiguous()):
            return None
        end += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
