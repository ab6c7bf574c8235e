"""How much GPU memory a training step takes, by formulas on shapes: nothing is loaded.

Counts what `torch.cuda.max_memory_allocated` counts, for training only; `RESERVE` and `GAPS` come on top. Tests compare
the terms with what autograd saves, and the peak with measurements at 7B shapes, within 15 %.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from dream_lightning.adapters import LoraParams
from dream_lightning.diffusion.head import chunk_of, filled_rows
from dream_lightning.errors import UserError
from dream_lightning.model import DreamConfig, load_tokenizer
from dream_lightning.model_factory import check_options, config_of
from dream_lightning.reporting import versions
from dream_lightning.training.fsdp import refuse_sharded
from dream_lightning.training.optimizer import BLOCK, AdamW8bit, decay_groups, in_8_bits

GIB = 2**30
RESERVE = 1.0  # GiB that torch does not count: CUDA context, buffers of libraries and NCCL
GAPS = 0.03  # of the peak: between the blocks of torch's allocator
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, a uint8 scale per 64, a float32 scale per 256 of those
MakeOptimizer = Callable[[list[dict]], torch.optim.Optimizer]  # from parameter groups
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layers that read the same input


@dataclass(frozen=True)
class Setting:
    """One training step, as the options of `DreamModule`, the data and the trainer describe it."""

    config: DreamConfig
    rows: int  # of a micro-batch on one GPU
    length: int  # tokens of a row, at most
    optimizer: MakeOptimizer
    dtype: torch.dtype = torch.float32  # of the stored weights
    mixed: bool = True  # bfloat16 autocast (`precision=bf16-mixed`)
    lora: LoraParams | None = None
    four_bit: bool = False
    float8_products: bool = False  # of trained weights or of the frozen base
    checkpointed: bool | int = True  # recompute all layers in the backward pass, or the first n
    compiled: bool = False  # layers and loss
    accumulation: int = 1  # micro-batches of a step
    gpus: int = 1  # over which FSDP2 shards weights, gradients and optimizer; 1 for DDP

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def chunk(self) -> int:  # rows of logits at a time
        return chunk_of(self.config.vocab_size)

    @property
    def recomputed(self) -> int:  # layers
        layers = self.config.num_hidden_layers
        return layers if self.checkpointed is True else min(int(self.checkpointed), layers)

    @property
    def casts(self) -> bool:  # autocast copies float32 weights; sharded weights are gathered in bfloat16
        return self.mixed and self.dtype == torch.float32 and self.gpus == 1

    @property
    def stream(self) -> int:  # bytes of an element of the residual stream
        return 4 if self.dtype == torch.float32 and (self.casts or not self.mixed) else 2

    @property
    def compute(self) -> int:  # bytes of an element of what a linear layer reads and writes
        return 2 if self.mixed else self.dtype.itemsize

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:  # linear layers of a decoder layer: name → (in, out)
        d, i = self.config.hidden_size, self.config.intermediate_size
        kv = self.config.num_key_value_heads * self.config.head_dim
        attention = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        return attention | {"gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d)}


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements, unless bytes are named."""

    total: int
    trainable: int
    weights: float  # bytes; a packed 4-bit weight has `NF4` bytes
    gradients: int  # bytes; a gradient has the dtype of its parameter
    layer: int  # of one decoder layer, adapters included
    layer_trainable: int
    shapes: Counter  # shape of a trainable parameter → how many there are


def count_parameters(s: Setting) -> Parameters:
    c, layers = s.config, s.config.num_hidden_layers
    table, norm = (c.vocab_size, c.hidden_size), (c.hidden_size,)
    biases = [s.matrices[name][1:] for name in ("q_proj", "k_proj", "v_proj")]
    base = Counter({table: 2, norm: 1})
    base.update(layers * [*s.matrices.values(), *biases, norm, norm])
    matrices = sum(map(prod, s.matrices.values()))
    layer, total = matrices + sum(map(prod, biases)) + 2 * c.hidden_size, sum(map(prod, base.elements()))
    weights = total * s.dtype.itemsize - layers * matrices * (s.dtype.itemsize - NF4) * s.four_bit
    if s.lora is None:
        return Parameters(total, total, weights, total * s.dtype.itemsize, layer, layer, base)
    adapters = Counter(layers * [(n, s.lora.rank) for name in s.lora.target_names for n in s.matrices[name]])
    count = sum(map(prod, adapters.elements()))
    per_layer = count // layers
    return Parameters(total + count, count, weights + 4 * count, 4 * count, layer + per_layer, per_layer, adapters)


def optimizer_bytes(make: MakeOptimizer, shapes: Counter, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the states, and how many more a step takes. UserError: it cannot step on the meta device."""
    parameters = {shape: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes}
    try:
        optimizer = make(decay_groups(parameters.values()))
        if isinstance(optimizer, AdamW8bit):
            return sum(_adamw_8bit(p) * shapes[shape] for shape, p in parameters.items()), 0
        for group in optimizer.param_groups:
            group["fused"] = False  # the fused kernels keep the same, but need a real device
        for p in parameters.values():
            p.grad = torch.empty_like(p)
        optimizer.step()
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        raise UserError(
            f"the optimizer's states cannot be counted ({str(error)[:200]}): plan with torch.optim.AdamW instead"
        ) from error
    states = stepping = 0
    # The foreach form, torch's default on a GPU, holds the root of all second moments at once; the fused one does not.
    foreach = not optimizer.defaults.get("fused") and optimizer.defaults.get("foreach", False) is not False
    for shape, p in parameters.items():
        state = optimizer.state[p]
        states += shapes[shape] * sum(t.nbytes for t in state.values() if isinstance(t, Tensor) and t.dim())
        stepping += shapes[shape] * foreach * state["exp_avg_sq"].nbytes if "exp_avg_sq" in state else 0
    return states, stepping


def _adamw_8bit(p: Tensor) -> int:
    low_bits = 2 * p.numel() * (p.dtype == torch.bfloat16)
    moment = p.numel() + 4 * p.numel() // BLOCK if in_8_bits(p) else 4 * p.numel()
    return 2 * moment + low_bits


def layer_keeps(s: Setting) -> int:
    """Bytes per token that a decoder layer saves for its backward pass when not recomputed; at most, when compiled."""
    c = s.config  # attention is counted as its kernels for a GPU save it, without an L² term
    hidden, inner, key_value = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    kept = s.compute * (2 * hidden + 2 * key_value) + 4 * c.num_attention_heads  # q, k, v, output and log-sums
    if s.lora is not None:
        kept += s.compute * s.lora.rank * len(s.lora.target_names)  # A's outputs
    if s.compiled:  # inputs of linear layers, norms, silu and the sum after attention are recomputed
        return kept + (s.stream + s.compute) * hidden + 2 * 4 + 2 * s.compute * inner
    kept += 2 * (4 * hidden + 4)  # the float32 input of each norm and 1 / rms
    kept += 3 * s.compute * inner  # gate, silu(gate), up
    if s.lora is None:
        kept += 2 * s.stream * hidden  # quotients, for the gradients of the norms' weights
    # Inputs of trained layers or adapters. o_proj reads the attention output, which is kept anyway; autocast copies a
    # float32 input for each reader, otherwise q, k, v share theirs, and so do gate and up.
    targets = list(s.matrices) if s.lora is None else s.lora.target_names
    read = targets if s.casts else {_SHARED.get(t, t) for t in targets}
    return kept + s.compute * sum(s.matrices[t][0] for t in read if t != "o_proj")


def logits_bytes(s: Setting, *, backward: bool) -> int:
    """Bytes of one chunk of logits and what is derived from them."""
    if s.lora is None:  # float32 logits and log-softmax, compiled 16-bit logits twice; backward also their gradient
        eager, compiled = (12, 3 * s.compute) if backward else (8, 2 * s.compute)
    else:  # forward only: 16-bit and float32 logits, log p, p, hits twice and the gradient; compiled logits, gradient
        eager, compiled = (0, 0) if backward else (19 + s.compute * 2, 2 * s.compute)
    rows = min(s.chunk, filled_rows(s.tokens, s.chunk) if s.compiled else s.tokens)
    return (compiled if s.compiled else eager) * rows * s.config.vocab_size


@dataclass(frozen=True)
class Plan:
    """What a step needs: bytes by part at the moments that can be its peak."""

    setting: Setting
    parameters: Parameters
    moments: dict[str, dict[str, float]]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak_gib(self) -> float:  # as `torch.cuda.max_memory_allocated` gives it
        return sum(self.moments[self.peak_moment].values()) / GIB

    @property
    def needed_gib(self) -> float:  # what the GPU must have
        return self.peak_gib * (1 + GAPS) + RESERVE


def make_plan(s: Setting) -> Plan:
    """What a training step allocates. Raises UserError as `optimizer_bytes`."""
    p = count_parameters(s)
    states, stepping = optimizer_bytes(s.optimizer, p.shapes, s.dtype if s.lora is None else torch.float32)
    layers, recomputed, sharded, trained = s.config.num_hidden_layers, s.recomputed, s.gpus > 1, s.lora is None
    hidden, inner = s.config.hidden_size, s.config.intermediate_size
    table = s.config.vocab_size * hidden  # elements of the embeddings, and of the head
    matrix = inner * hidden * s.compute  # bytes of the largest matrix
    layer, checkpoint = s.tokens * layer_keeps(s), s.tokens * s.stream * hidden  # a recomputed layer keeps its input
    # The last norm, and the masked tokens' hidden states; a frozen head computes their gradient in its forward pass.
    top = s.tokens * (4 * hidden + 4 + 2 * s.stream * hidden)
    kept = recomputed * checkpoint + (layers - recomputed) * layer + top
    # In the MLP: gradients of the product's factors and of gate, and twice that of the residual stream.
    temporary = s.tokens * (3 * s.compute * inner + 2 * s.stream * hidden)
    temporary += s.tokens * inner * s.float8_products * (1 if s.compiled else 9)  # rounded to float8, eager in float32

    gradients = p.gradients / s.gpus
    # Lightning frees the last step's gradients between forward and backward pass; while they accumulate, not at all.
    older = gradients if s.accumulation > 1 else 0
    head = table * s.compute * trained
    # In the head's backward pass: one chunk's gradient and the sum of the others', which autocast converts to float32.
    at_head = trained * max(head * min(2, -(-s.tokens // s.chunk)), table * (s.compute + 4) * s.casts)
    # FSDP2 reduces gradients in float32, a copy of the whole layer's. Those of head and norm wait for the end of the
    # backward pass, those of adapters for the last micro-batch.
    new = matrix * trained + (p.layer_trainable * (s.compute + 4) + head) * sharded
    if s.lora and sharded and s.accumulation > 1:
        gradients, older = gradients + 4 * p.trainable, older + 4 * p.trainable
    of_head = trained * table * s.dtype.itemsize / s.gpus
    of_embeddings = trained * table * (2 * s.compute + 4 if sharded else s.stream)

    # Autocast keeps bfloat16 copies of float32 weights: of trained ones until the forward pass is over, afterwards, and
    # of frozen ones, for the layers that are not recomputed.
    copy = 2 * p.layer * s.casts
    copies = (layers - recomputed) * copy
    forward_copies = layers * copy + 2 * table * s.casts if trained else copies
    # FSDP2 gathers a layer and prefetches the next. The head stays gathered, and frozen embeddings too.
    ends = table * (1 if trained else 2) * s.compute * sharded
    pair, last = 2 * p.layer * s.compute * sharded, (p.layer + table * trained) * s.compute * sharded
    in_layer = ends + matrix * s.four_bit  # dequantized

    def moment(copies: float, gradients: float, activations: float, logits: float = 0, temporaries: float = 0) -> dict:
        always = {"weights": p.weights / s.gpus, "optimizer": states / s.gpus}
        changing = {"copies": copies, "gradients": gradients, "activations": activations, "logits": logits}
        return always | changing | {"temporaries": temporaries}

    last_layer = in_layer + copies + copy * (recomputed == layers) + pair, max(older, of_head) + new
    first_layer = in_layer + copy + last, gradients + new, layer + checkpoint * (recomputed > 0)
    moments = {
        "forward, at the head": moment(forward_copies + ends, gradients, kept, logits_bytes(s, backward=False)),
        "backward, at the head": moment(copies + ends, older + at_head, kept, logits_bytes(s, backward=True)),
        "backward, last layer": moment(*last_layer, kept - top + layer * (recomputed == layers), temporaries=temporary),
        "backward, first layer": moment(*first_layer, temporaries=temporary),
        "backward, embeddings": moment(ends, gradients + of_embeddings, 0),
        "optimizer step": moment(0, gradients, 0, temporaries=stepping / s.gpus),
    }
    return Plan(s, p, moments)


def setting_from(options: Namespace) -> Setting:
    """What `fit` would run with these options; reads only config.json or the tokenizer. Raises UserError as `fit`."""
    model, data, trainer = options.model, options.data, options.trainer
    precision = str(trainer.precision or "32-true")
    if precision not in ("bf16-mixed", "32-true", "32", "bf16-true", "bf16"):
        raise UserError(f"trainer.precision is {precision}: a plan knows bf16-mixed, bf16-true and 32-true")
    lora = _instantiate(LoraParams | None, model.lora)
    check_options({**vars(model), "lora": lora})
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    sharded = "fsdp" in name.lower() or "ModelParallel" in name
    if sharded:
        refuse_sharded(quantized=model.quantize is not None, compiled_answers=model.sampling.compile)
    if not (gpus := processes(trainer) if sharded else 1):
        raise UserError(
            f"trainer.devices is {trainer.devices}, and no GPU is visible here: set a number (--trainer.devices=2)"
        )
    tokenizer = load_tokenizer(model.tokenizer) if model.pretrained is None else None
    config = config_of(model.pretrained, model.new_model, tokenizer, model.from_autoregressive)
    bfloat16 = model.quantize is not None or precision in ("bf16-true", "bf16")
    return setting_of(
        config,
        model,
        rows=data.batch_size * (2 if model.complementary_masks else 1),
        length=data.max_length,
        optimizer=_instantiate(OptimizerCallable, model.optimizer),
        dtype=torch.bfloat16 if bfloat16 else getattr(torch, model.dtype),
        mixed=precision == "bf16-mixed",
        lora=lora,
        accumulation=trainer.accumulate_grad_batches,
        gpus=gpus,
    )


def setting_of(config: DreamConfig, model: Any, **others: Any) -> Setting:
    """The fields that a DreamModule, or its options, say in their own words, and others."""
    return Setting(
        config,
        four_bit=model.quantize in ("nf4", "nf4_float8"),
        float8_products=model.float8_products or model.quantize in ("nf4_float8", "float8"),
        checkpointed=model.gradient_checkpointing,
        compiled=model.compile_layers,
        **others,
    )


def _instantiate(kind: Any, value: Any) -> Any:
    parser = ArgumentParser()
    parser.add_argument("--value", type=kind)
    return parser.instantiate_classes(parser.parse_object({"value": value})).value


def processes(trainer: Namespace) -> int:
    """How many `trainer.devices` starts on all nodes; 0 if it means all GPUs of this machine and torch sees none."""
    devices = trainer.devices
    if devices in ("auto", "-1", -1):
        devices = torch.cuda.device_count()
    elif isinstance(devices, str):
        devices = [number for number in devices.split(",") if number] if "," in devices else int(devices)
    return (len(devices) if isinstance(devices, list) else devices) * (trainer.num_nodes or 1)


def changes(s: Setting, gpu_gib: float) -> Iterator[tuple[str, Plan]]:
    """Options that lower the memory, each on top of those before, with its plan; more GPUs until it fits `gpu_gib`."""
    accumulate, length = s.accumulation * s.rows, max(s.length // 2, 1024)
    batch = f"--data.batch_size=1 --trainer.accumulate_grad_batches={accumulate} (the same steps)"
    shorter = f"--data.max_length={length} (shortens thinking, see data-report)"
    for option, change in (
        (batch, {"rows": 1, "accumulation": accumulate}),
        (shorter, {"length": min(length, s.length)}),
        ("--model.gradient_checkpointing=true (about a third slower)", {"checkpointed": True}),
    ):
        smaller = replace(s, **change)
        if (smaller.rows, smaller.length, smaller.recomputed) != (s.rows, s.length, s.recomputed):
            s = smaller
            yield option, make_plan(s)
    if s.four_bit:
        return
    bfloat16 = replace(s, dtype=torch.bfloat16, mixed=True)
    if s.gpus == 1 and s.lora is None and s.dtype == torch.float32:
        option = "--config single_gpu_full (bfloat16 weights with exact updates, 8-bit moments)"
        yield option, make_plan(replace(bfloat16, optimizer=AdamW8bit))
    if s.gpus == 1:
        four_bit = replace(bfloat16, four_bit=True, float8_products=False, lora=s.lora or LoraParams())
        yield "--config single_gpu_qlora (trains adapters on a 4-bit base)", make_plan(four_bit)
    if s.lora is None:
        s = replace(s, dtype=torch.float32, mixed=True, optimizer=torch.optim.AdamW)
    for gpus in (n for n in (2, 4, 8, 16, 32, 64) if n > s.gpus):
        plan = make_plan(replace(s, gpus=gpus))
        yield f"--config {'fsdp_full' if s.lora is None else 'fsdp_lora'} on {gpus} GPUs", plan
        if plan.needed_gib <= gpu_gib:
            return


def report(setting: Setting, gpu_gib: float | None) -> str:
    """Versions, the plan, whether it fits a card of `gpu_gib` (None: this machine's), and what to change if not."""
    if gpu_gib is None and torch.cuda.is_available():
        gpu_gib = torch.cuda.mem_get_info()[1] / GIB
    plan = make_plan(setting)
    installed = versions("torch", "lightning", "transformers", "bitsandbytes", "triton")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    visible = ", ".join(gpus) or "none visible to torch, see nvidia-smi and CUDA_VISIBLE_DEVICES"
    lines = [", ".join(map(" ".join, installed.items())), f"GPU: {visible}", "", *describe(plan), ""]
    if gpu_gib is None:
        return "\n".join([*lines, "No GPU is visible: --gpu_memory_gib 24 says whether this fits a card of that size."])
    fits = plan.needed_gib <= gpu_gib
    lines.append(f"It {'fits' if fits else 'does NOT fit'} a card of {gpu_gib:.1f} GiB.")
    return "\n".join(lines if fits else [*lines, *_advice(setting, gpu_gib)])


def out_of_memory(setting: Setting, error: Exception) -> str:
    """The message for a run that ended so: what was needed, and what to change."""
    plan = make_plan(setting)
    total = torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else plan.needed_gib * 0.99
    first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    start = f"the GPU ran out of memory ({first}). Saved checkpoints are intact: --ckpt_path last resumes."
    return "\n".join([start, *describe(plan), *_advice(setting, total)])


def describe(plan: Plan) -> list[str]:
    """The plan by part, at its peak."""
    s, p = plan.setting, plan.parameters
    kind = "all weights" if s.lora is None else f"adapters of rank {s.lora.rank} on {', '.join(s.lora.target_names)}"
    base = "nf4" if s.four_bit else str(s.dtype).removeprefix("torch.")
    sharded = f"sharded over {s.gpus} GPUs" if s.gpus > 1 else ""
    notes = {
        **dict.fromkeys(("weights", "optimizer", "gradients"), sharded),
        "copies": "gathered" if sharded else "dequantized" if s.four_bit else "in bfloat16, of float32 weights",
        "activations": f"{s.config.num_hidden_layers} layers, {s.recomputed} of them recomputed",
        "logits": f"of {min(s.chunk, s.tokens)} masked tokens at a time",
        "temporaries": "of one layer's backward pass, or of the optimizer step",
        "sum": "torch.cuda.max_memory_allocated",
        "needed": f"with {GAPS:.0%} for the allocator's gaps and {RESERVE:.0f} GiB for the CUDA context",
    }
    sizes = {part: size / GIB for part, size in plan.moments[plan.peak_moment].items() if size >= GIB / 200}
    sizes |= {"sum": plan.peak_gib, "needed": plan.needed_gib}
    return [
        f"{p.total:,} parameters ({base}), {p.trainable:,} train ({100 * p.trainable / p.total:.4f} %): {kind}",
        f"{s.rows} × {s.length:,} tokens per micro-batch and GPU" + f", {sharded}" * bool(sharded),
        "",
        f"Peak while training, {plan.peak_moment}:",
        *(f"  {part:<12} {size:7.2f} GiB   {notes[part]}".rstrip() for part, size in sizes.items()),
        "Loading, validation and generation are not counted.",
    ]


def _advice(setting: Setting, gpu_gib: float) -> list[str]:
    lines, fits = ["What to change, in this order, each on top of those above:"], False
    for option, plan in changes(setting, gpu_gib):
        verdict = "fits" if plan.needed_gib <= gpu_gib else "does not fit"
        lines.append(f"  {plan.needed_gib:7.2f} GiB needed, {verdict}: {option}")
        fits |= verdict == "fits"
    return lines if fits else [*lines, "None of this suffices: take a larger GPU, or a smaller model."]
