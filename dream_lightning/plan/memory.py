"""How much GPU memory a training step takes, by arithmetic on shapes: nothing is loaded.

Counted is what `torch.cuda.max_memory_allocated` counts, the tensors of this process. `RESERVE` and `GAPS` come on
top. Validation, generation and loading are not counted.
"""

from dataclasses import dataclass

from dream_lightning.plan.activations import (
    checkpoint_keeps,
    float8_temporaries,
    layer_keeps,
    layer_temporaries,
    logits_bytes,
    top_keeps,
)
from dream_lightning.plan.optimizer import OptimizerMemory, optimizer_memory
from dream_lightning.plan.setting import Parameters, Setting, count_parameters

GIB = 2**30
RESERVE = 1.0  # GiB that torch does not count: the CUDA context, the libraries' and NCCL's own buffers
GAPS = 0.03  # of the peak: between the blocks of torch's allocator


@dataclass(frozen=True)
class Memory:
    """Bytes by part at one moment of a step."""

    weights: float = 0
    copies: float = 0
    """of weights: bfloat16 under autocast, unsharded under FSDP, taken out of 4 bits"""
    optimizer: float = 0
    gradients: float = 0
    activations: float = 0
    logits: float = 0
    temporaries: float = 0
    """of a layer's backward pass, or of the optimiser's step"""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What a step needs."""

    setting: Setting
    parameters: Parameters
    optimizer: OptimizerMemory
    moments: dict[str, Memory]

    @property
    def peak_moment(self) -> str:
        """Its name."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Memory:
        """The largest moment, by part."""
        return self.moments[self.peak_moment]

    @property
    def peak_gib(self) -> float:
        """As `torch.cuda.max_memory_allocated` would give it."""
        return self.peak.total / GIB

    @property
    def needed_gib(self) -> float:
        """What the GPU must have: the peak, and paged states too while the optimiser steps, lest it crawls."""
        stepping = self.moments["optimiser step"].total + self.optimizer.paged
        return max(self.peak.total, stepping) / GIB * (1 + GAPS) + RESERVE


def make_plan(setting: Setting) -> Plan:
    """Count a setting.

    Raises:
        UserError: see `optimizer_memory`.
    """
    parameters = count_parameters(setting)
    optimizer = optimizer_memory(setting.optimizer, parameters.trained)
    return Plan(setting, parameters, optimizer, _moments(setting, parameters, optimizer))


def _moments(s: Setting, p: Parameters, states: OptimizerMemory) -> dict[str, Memory]:
    """What is alive at the moments of a step that can be its peak."""
    layers = s.config.num_hidden_layers
    always = {"weights": p.weights / s.gpus, "optimizer": states.states / s.gpus}
    table = s.config.vocab_size * s.config.hidden_size  # elements of the embeddings, and of the head

    recomputed = s.recomputed
    layer = s.tokens * sum(layer_keeps(s).values())
    top = s.tokens * top_keeps(s)
    kept = recomputed * s.tokens * checkpoint_keeps(s) + (layers - recomputed) * layer + top
    temporary = s.tokens * layer_temporaries(s) + float8_temporaries(s)

    gradients = p.gradients / s.gpus
    # Lightning frees the last step's gradients between forward and backward; while they accumulate, not at all.
    older = gradients if s.accumulation > 1 else 0
    head_gradient = 0 if s.lora else table * s.compute
    # In the head's backward pass: one chunk's gradient and the sum of the others', which autocast then makes float32.
    at_head = 0 if s.lora else max(head_gradient * min(2, -(-s.tokens // s.chunk)), table * (s.compute + 4) * s.casts)
    # FSDP2 sums gradients in float32, a copy of the whole layer's; those of head and norm wait for the end, those of
    # adapters for a step's last micro-batch, whole until then.
    unreduced = p.layer_trainable * (s.compute + 4) + head_gradient if s.gpus > 1 else 0
    if s.lora and s.gpus > 1 and s.accumulation > 1:
        gradients, older = (n + 4 * p.trainable for n in (gradients, older))

    # bfloat16 copies of float32 parameters: of trainable ones until the forward pass is over, of others and after it
    # for the layers that keep them; a recomputed layer makes its own again.
    copy = 2 * p.layer_cast if s.mixed and s.gpus == 1 else 0
    copies = (layers - recomputed) * copy
    forward_copies = max(copies, 2 * p.cast) if s.mixed and s.gpus == 1 else 0
    # The largest matrix of a layer: taken out of 4 bits, or its gradient before it is added to the others'.
    matrix = s.config.intermediate_size * s.config.hidden_size * s.compute
    unpacked, new_gradient = matrix * s.four_bit, 0 if s.lora else matrix
    # FSDP2 gathers a layer and, ahead of time, the next (the embeddings come last). The head stays gathered, and the
    # embeddings too where neither trains.
    gathered = (2 * table, 2 * p.layer, p.layer) if s.lora else (table, 2 * p.layer, p.layer + table)
    ends, pair, last = (n * s.compute if s.gpus > 1 else 0 for n in gathered)
    return {
        "forward, at the head": Memory(
            **always,
            copies=forward_copies + ends,
            gradients=gradients,
            activations=kept,
            logits=logits_bytes(s, backward=False),
        ),
        "backward, at the head": Memory(
            **always,
            copies=copies + ends,
            gradients=older + at_head,
            activations=kept,
            logits=logits_bytes(s, backward=True),
        ),
        "backward, last layer": Memory(
            **always,
            copies=copies + (copy if recomputed == layers else 0) + unpacked + ends + pair,
            gradients=max(older, 0 if s.lora else table * s.dtype.itemsize / s.gpus) + new_gradient + unreduced,
            activations=kept - top + (layer if recomputed == layers else 0),
            temporaries=temporary,
        ),
        "backward, last recomputed layer": Memory(
            **always,
            copies=(copy if recomputed else 0) + unpacked + ends + pair,
            gradients=max(older, 0 if s.lora else table * s.dtype.itemsize / s.gpus) + new_gradient + unreduced,
            activations=recomputed * s.tokens * checkpoint_keeps(s) + layer,
            temporaries=temporary,
        ),
        "backward, first layer": Memory(
            **always,
            copies=copy + unpacked + ends + last,
            gradients=gradients + new_gradient + unreduced,
            activations=layer + (s.tokens * checkpoint_keeps(s) if recomputed else 0),
            temporaries=temporary,
        ),
        "backward, embeddings": Memory(
            **always,
            copies=ends,
            gradients=gradients + (0 if s.lora else table * (s.compute + 4 + s.compute if s.gpus > 1 else s.stream)),
        ),
        "optimiser step": Memory(**always, gradients=gradients, temporaries=states.temporary / s.gpus),
    }
