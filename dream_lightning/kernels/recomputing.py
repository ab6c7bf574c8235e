"""What the compiler may make again in the backward pass instead of keeping it."""

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from dream_lightning.errors import UserError

# Custom operations, which torch takes for cheap
_ATTENTION = {"dream_lightning::attention_one_by_one", "torch_attn::_varlen_attn"}


class _Kept(CustomGraphPass):
    """Marks what is random and what is dear, in the graph of forward and backward before they are parted.

    Below a budget of 1, torch (2.11, 2.13) lets the backward pass make anything again but a few operations that it
    knows. Seeds are not among them: dropout would be another one in the backward pass, and gradients wrong.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and _is_kept(node.target):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> tuple:
        """For caches of compiled code; whether cuDNN is torch's attention decides what is compiled, too."""
        return get_hash_for_files((__file__,)), torch.backends.cuda.cudnn_sdp_enabled()


def _is_kept(operation: torch._ops.OpOverload) -> bool:
    random = torch.Tag.nondeterministic_seeded in operation.tags and "backward" not in operation.name()
    return random or operation.name() in _ATTENTION


def recompute_what_is_cheap() -> None:
    """Products and norms of a layer are cheap to make again, and a sixth of what it keeps. In this whole process.

    Raises:
        UserError: somebody else changes graphs in the same place.
    """
    before = torch._inductor.config.joint_custom_post_pass
    if not (before is None or isinstance(before, _Kept)):
        raise UserError(
            f"torch._inductor.config.joint_custom_post_pass is {before!r}, and compiled layers need it: set it to "
            "None, or set compile_layers to false"
        )
    torch._inductor.config.joint_custom_post_pass = _Kept()
    torch._functorch.config.activation_memory_budget = 0.8
