"""The KV cache: keys and values that are kept from one forward to the next."""

import torch
from torch import Tensor

LayerCache = tuple[Tensor, Tensor, Tensor]  # keys [B, K, L, E], values [B, K, L, E], columns [W]; see `store`


class KeyValueCache:
    """Keys and values of every layer at every column of a batch, each from the last forward that computed its column.

    Attention is bidirectional, so a cached key is exact only until any token of its row changes. Shapes and addresses
    never change, as CUDA graphs need. `shape` is [B, K, L, E].
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device):
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self.generation = 0  # counts the generations that use it: a compiled model has one cache for all

    def of_layer(self, layer: int, columns: Tensor) -> LayerCache:
        """For the columns [W] int64 to compute."""
        return self._keys[layer], self._values[layer], columns


def store(cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write keys and values [B, K, W, E] to their columns in-place; returns those of all columns, [B, K, L, E] each."""
    keys, values, columns = cache  # of another dtype than k and v if sharded float32 weights compute in bfloat16
    keys.index_copy_(2, columns, k.to(keys.dtype))
    values.index_copy_(2, columns, v.to(values.dtype))
    return keys.to(k.dtype), values.to(v.dtype)
