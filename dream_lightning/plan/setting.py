"""What the memory of a training step depends on, and the parameters that it has, counted without memory."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.diffusion.head import chunk_of
from dream_lightning.model import DreamConfig, DreamModel

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a uint8 scale per 64, a float32 scale per 256 of those


@dataclass(frozen=True)
class Setting:
    """One training step, as the options of `DreamModule`, the data and the trainer describe it."""

    config: DreamConfig
    rows: int
    """of a micro-batch on one GPU"""
    length: int
    """tokens of a row, at most"""
    optimizer: Callable[[list[dict]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    """of the stored weights"""
    mixed: bool = True
    """bfloat16 arithmetic over float32 or bfloat16 weights (`precision=bf16-mixed`)"""
    lora: LoraParams | None = None
    four_bit: bool = False
    float8_products: bool = False
    """of trained weights, or of the frozen base: 4-bit weights, or float8 ones, which take as much as bfloat16"""
    checkpointed: bool | int = True
    """whether all layers are recomputed in the backward pass, or so many of the first"""
    compiled: bool = False
    """layers and loss"""
    accumulation: int = 1
    """micro-batches of a step; with more than one, gradients live through every backward pass but the first"""
    gpus: int = 1
    """over which weights, gradients and optimiser are sharded (FSDP2); under DDP each GPU is a single one"""
    head_chunk: int | None = None
    """rows of logits at a time; None = so many as training takes"""

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def chunk(self) -> int:
        """Rows of logits at a time, as in `dream_lightning.diffusion.head.token_nll`."""
        return self.head_chunk or chunk_of(self.config.vocab_size)

    @property
    def recomputed(self) -> int:
        """Layers that are recomputed in the backward pass: so many of the first."""
        layers = self.config.num_hidden_layers
        return layers if self.checkpointed is True else min(int(self.checkpointed), layers)

    @property
    def casts(self) -> bool:
        """Whether autocast copies float32 weights and activations; sharded weights arrive in bfloat16 already."""
        return self.mixed and self.dtype == torch.float32 and self.gpus == 1

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream."""
        return 4 if self.dtype == torch.float32 and (self.casts or not self.mixed) else 2

    @property
    def compute(self) -> int:
        """Bytes of an element of what a linear layer reads and writes."""
        return 2 if self.mixed else self.dtype.itemsize


@dataclass(frozen=True)
class Parameters:
    """Counts and bytes of a model's parameters; a packed 4-bit weight counts all its elements."""

    total: int
    trainable: int
    weights: int
    """bytes of all"""
    gradients: int
    """bytes of all gradients; one has the dtype of its parameter"""
    layer: int
    """elements of one decoder layer, adapters included"""
    layer_trainable: int
    """those of them that train"""
    cast: int
    """trainable float32 elements that linear layers read; autocast keeps their bfloat16 copies for a whole forward"""
    layer_cast: int
    """float32 elements that the linear layers of one decoder layer read, trainable or not"""
    trained: tuple[nn.Parameter, ...]
    """the trainable ones themselves, on the meta device"""


def count_parameters(setting: Setting) -> Parameters:
    """The parameters of a setting's model. About a second for the 7B, then remembered."""
    sizes = json.dumps(setting.config.to_dict(), sort_keys=True, default=str)
    return _count(_Model((sizes, repr(setting.lora), setting.dtype, setting.four_bit), setting))


class _Model:
    """A setting, compared by what its model depends on: so variants with other batches share one count."""

    def __init__(self, key: tuple, setting: Setting) -> None:
        self.key, self.setting = key, setting

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Model) and self.key == other.key


@lru_cache(maxsize=16)
def _count(of: _Model) -> Parameters:
    with torch.device("meta"):
        model = DreamModel(of.setting.config).to(of.setting.dtype)
        layers = model.model.layers
        packed = {id(m.weight) for m in layers.modules() if type(m) is nn.Linear and of.setting.four_bit}
        if of.setting.lora is not None:
            add_lora(model, of.setting.lora)
    layer, n = {id(p) for p in layers[0].parameters()}, Counter()
    for name, p in model.named_parameters():
        size, trains = p.numel() * p.element_size(), p.requires_grad
        read_by_linear = p.dtype == torch.float32 and "embed_tokens" not in name and "norm" not in name
        n["total"] += p.numel()
        n["trainable"] += p.numel() * trains
        n["weights"] += round(p.numel() * NF4) if id(p) in packed else size
        n["gradients"] += size * trains
        n["layer"] += p.numel() * (id(p) in layer)
        n["layer_trainable"] += p.numel() * (trains and id(p) in layer)
        n["cast"] += p.numel() * (read_by_linear and trains)
        n["layer_cast"] += p.numel() * (read_by_linear and id(p) in layer)
    return Parameters(**n, trained=tuple(p for p in model.parameters() if p.requires_grad))
