"""Cross-entropy at the masked positions in chunks, so that not all logits are in memory at once.

For Dream 7B the logits of 4,096 masked tokens take 2.5 GB in float32, and their gradient as much again.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LOGITS = 512 * 152_064  # of a chunk: 0.3 GB in float32
_FILLED = 8192  # rows: compiled chunks are filled up to a multiple of it


def chunk_of(vocabulary: int) -> int:
    """Rows of a chunk of `token_nll`: 512 for Dream 7B's vocabulary, all of a batch for that of a small model."""
    rows = max(_LOGITS // vocabulary // 512, 1) * 512
    return rows if rows < _FILLED else rows // _FILLED * _FILLED


def filled_rows(count: int, chunk: int) -> int:
    """Rows that compiled functions get for `count` of them: few shapes, few compilations."""
    block = min(chunk, _FILLED)
    return max(-(-count // block), 1) * block


def token_nll(
    features: Tensor, head: nn.Module, targets: Tensor, *, chunk: int = 512, compiled: bool = False
) -> Tensor:
    """−log p(target) from hidden states: [M, D], [M] int64 → [M] float32.

    Works on `chunk` rows at a time (see `chunk_of`). A frozen head computes the gradient of its input in the forward
    pass; a head that trains is recomputed in the backward pass.

    Args:
        features: hidden states after the last norm.
        head: [..., D] → [..., V].
        compiled: fuse what follows the matrix product (2.3 times faster on an H100).
    """
    frozen = isinstance(head, nn.Linear) and not head.weight.requires_grad
    if frozen and features.requires_grad and torch.is_grad_enabled():
        step = _compiled(_nll_and_gradient) if compiled else _nll_and_gradient
        pieces = _chunks(features, targets, chunk, compiled)
        return torch.cat([_FrozenHead.apply(h, head, target, step) for h, target in pieces])[: len(features)]
    return _recomputed(_nll, features, head, targets, chunk=chunk, compiled=compiled)


def token_nll_and_doubt(
    features: Tensor, head: nn.Module, targets: Tensor, *, temperature: float, chunk: int = 512, compiled: bool = False
) -> Tensor:
    """Also the entropy of softmax(logits / temperature) where the target is the most probable token, else 0: [M, 2].

    To minimize it makes right predictions certain, so that more tokens are filled in a forward, and leaves wrong ones.

    Source: certainty-forcing distillation, Chen et al. 2025 (dParallel, arXiv:2509.26488).
    """
    options = {"chunk": chunk, "compiled": compiled}
    return _recomputed(_nll_and_doubt, features, head, targets, temperature, **options)


def _chunks(features: Tensor, targets: Tensor, chunk: int, compiled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of `chunk` rows, the last one filled if they are compiled."""
    more = (filled_rows(len(features), chunk) if compiled else len(features)) - len(features)
    return zip(F.pad(features, (0, 0, 0, more)).split(chunk), F.pad(targets, (0, more)).split(chunk), strict=True)


def _recomputed(
    function: Callable, features: Tensor, head: nn.Module, targets: Tensor, *extra: float, chunk: int, compiled: bool
) -> Tensor:
    """The function of each chunk; of several, the logits are recomputed in the backward pass."""
    step, pieces = _compiled(function) if compiled else function, list(_chunks(features, targets, chunk, compiled))
    if len(pieces) == 1:
        return step(pieces[0][0], head, pieces[0][1], *extra)[: len(features)]
    out = [checkpoint(step, h, head, target, *extra, use_reentrant=False) for h, target in pieces]
    return torch.cat(out)[: len(features)]


class _FrozenHead(torch.autograd.Function):
    """Computes the gradient of each row's nll in the forward pass, while the logits are in memory."""

    @staticmethod
    def forward(ctx, features: Tensor, head: nn.Linear, targets: Tensor, step: Callable) -> Tensor:
        nll, grad_logits = step(features, head, targets)
        ctx.save_for_backward((grad_logits @ head.weight.to(grad_logits.dtype)).to(features.dtype))
        return nll

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_features,) = ctx.saved_tensors
        return (grad_features * grad[:, None]).to(grad_features.dtype), None, None, None


def _nll(features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(features).float(), targets, reduction="none")


def _nll_and_doubt(features: Tensor, head: nn.Module, targets: Tensor, temperature: float) -> Tensor:
    logits = head(features).float()
    log_p = F.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1) * (logits.argmax(-1) == targets)
    return torch.stack([F.cross_entropy(logits, targets, reduction="none"), entropy], dim=-1)  # [m, 2]


def _nll_and_gradient(features: Tensor, head: nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Also ∂nll/∂logits = softmax(logits) − one-hot(target), [m, V] in the logits' dtype."""
    out = head(features)
    logits = out.float()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return -log_p.gather(-1, targets[:, None]).squeeze(-1), (log_p.exp() - hit.float()).to(out.dtype)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
