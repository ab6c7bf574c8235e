"""What a validation costs in time and memory: FLOPs and bytes of its forwards over a few measured speeds.

Seconds of a forward are √(compute² + read²) + dequantization: FLOPs over the speed of large products, bytes of the
weights over the speed of memory. Layers that are not compiled take at least the time in which the host starts their
kernels, sharded ones that in which they are gathered. Tests compare with measurements on an H100, within 15 %.
Compilation is not counted: a shape takes seconds at its first use.
"""

import time
from dataclasses import dataclass, replace

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from dream_lightning.errors import UserError
from dream_lightning.memory import GAPS, GIB, RESERVE, Setting, count_parameters, optimizer_bytes, processes, setting_of
from dream_lightning.model.flops import matmul_ceiling
from dream_lightning.reporting import duration
from dream_lightning.sampling import SamplingParams

PROMPT = 256  # tokens of a question, as a plan assumes them
_CHUNK = 256  # positions whose float32 logits exist at once


@dataclass(frozen=True)
class Speed:
    """Of a device."""

    name: str
    flops: float  # a second, in large matrix products of a forward
    bytes: float  # of weights read a second
    eager_layer: float  # seconds
    dequantize: float = 1.07e-12  # seconds for a 4-bit weight
    link: float = 350e9  # bytes a second between GPUs


H100 = Speed("an H100", 640e12, 2.3e12, 1.2e-3)  # docs/performance.md


def measured_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """In about a fifth of a second."""
    name = f"this {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "this CPU"
    block = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    copying = []
    for _ in range(4):
        started = time.perf_counter()
        block.clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        copying.append(time.perf_counter() - started)
    host = {"cuda": H100.eager_layer, "cpu": 4e-4}.get(device.type, H100.eager_layer)
    return Speed(name, 0.8 * matmul_ceiling(device, dtype), 2 * len(block) / min(copying), host)


@dataclass(frozen=True)
class Answering:
    """Questions, and how they are answered."""

    count: int
    rows: int  # at once, on each process
    prompt: int  # tokens, at most
    params: SamplingParams
    processes: int = 1

    @property
    def at_once(self) -> int:
        return max(1, min(self.rows, -(-self.count // self.processes)))

    @property
    def batches(self) -> int:
        return -(-self.count // (self.processes * self.at_once))

    @property
    def forwards(self) -> tuple[int, int]:
        """Of a batch, at most: those of all columns, and those of a window next to a KV cache."""
        p = self.params
        in_block = p.block_length or p.max_new_tokens
        each = min(p.steps // p.blocks, -(-in_block // (p.tokens_per_step or 1)))  # a step without a token makes none
        if p.cache == "none":
            return p.blocks * each, 0
        whole = -(-each // p.refresh_every) if p.refresh_every else 1
        return p.blocks * whole, p.blocks * (each - whole)

    @property
    def columns(self) -> int:
        return self.prompt + self.params.max_new_tokens

    @property
    def window(self) -> float:
        """Columns of a forward next to a KV cache, in the mean."""
        p, block = self.params, self.params.block_length or 0
        return block + 1 + ((p.max_new_tokens - block) / 2 if p.cache == "prefix" else 0)


def forward_seconds(s: Setting, speed: Speed, *, rows: int, columns: float, logits: float, compiled: bool) -> float:
    """Of one forward with this many positions and predictions."""
    c, layers = s.config, s.config.num_hidden_layers
    weights = layers * sum(n * m for n, m in s.matrices.values())
    head, attended = c.vocab_size * c.hidden_size, 4 * c.hidden_size * layers * columns
    compute = rows * columns * (2 * weights + attended) + 2 * logits * head
    read = s.compute * (weights + head)
    seconds = (
        (compute / speed.flops) ** 2 + (read / speed.bytes) ** 2
    ) ** 0.5 + s.four_bit * weights * speed.dequantize
    seconds = max(seconds, read * (1 - 1 / s.gpus) / speed.link)
    # bitsandbytes starts kernels of its own for every 4-bit layer.
    return seconds if compiled else max(seconds, layers * speed.eager_layer * (1.7 if s.four_bit else 1))


def answer_seconds(s: Setting, a: Answering, speed: Speed) -> float:
    """To answer all questions; at most, where a threshold or an eos can end an answer sooner."""
    whole, windows = a.forwards
    block = a.params.block_length or a.params.max_new_tokens
    options = {"rows": a.at_once, "logits": a.at_once * block / 2, "compiled": a.params.compile}
    seconds = whole * forward_seconds(s, speed, columns=a.columns, **options)
    seconds += windows * forward_seconds(s, speed, columns=a.window, **options)
    return a.batches * seconds


def likelihood_seconds(s: Setting, tokens: int, speed: Speed, processes: int = 1) -> float:
    """Of a forward over so many tokens, in rows of a micro-batch, half of them masked."""
    rows = max(1, round(tokens / s.tokens / processes))
    options = {"rows": s.rows, "columns": s.length, "logits": s.tokens / 2, "compiled": s.compiled}
    return rows * forward_seconds(s, speed, **options)


def training_seconds(s: Setting, tokens: int, speed: Speed, processes: int = 1) -> float:
    """Of a pass over so many tokens: forward, recomputation, and the backward pass, at three quarters of the speed."""
    passes = 2 + (s.lora is None) + s.recomputed / s.config.num_hidden_layers
    return passes * likelihood_seconds(s, tokens, replace(speed, flops=0.75 * speed.flops), processes)


def answer_gib(s: Setting, a: Answering) -> float | None:
    """GPU memory while questions are answered, with what training keeps: weights and the optimizer's states.

    None if the optimizer's states cannot be counted.
    """
    c, p = s.config, count_parameters(s)
    try:
        states, _ = optimizer_bytes(s.optimizer, p.shapes, s.dtype if s.lora is None else torch.float32)
    except UserError:
        return None
    positions = a.at_once * a.columns
    cached = (a.params.cache != "none") * 2 * s.compute * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    layer = s.compute * (3 * c.intermediate_size + 2 * c.hidden_size) + 2 * s.stream * c.hidden_size
    masked = a.at_once * (a.params.block_length or a.params.max_new_tokens)
    logits = c.vocab_size * (masked * s.compute + 12 * min(masked, _CHUNK))
    copies = 2 * s.casts * p.total  # autocast's bfloat16 copies
    gathered = 2 * 2 * p.layer * (s.gpus > 1)
    kept = (p.weights + states) / s.gpus + copies + gathered
    return (kept + positions * (cached + layer) + logits) / GIB * (1 + GAPS) + RESERVE


def describe_answering(s: Setting, a: Answering, speed: Speed) -> str:
    """One line for a plan."""
    if not a.count:
        return "Validation answers no questions."
    whole, windows = (a.batches * n for n in a.forwards)
    forwards = f"{whole:,} forwards" + (f" and {windows:,} next to the KV cache" if windows else "")
    memory = answer_gib(s, a)
    return (
        f"Validation: {a.count} questions, {a.at_once} at once, of {a.prompt} + {a.params.max_new_tokens:,} tokens: at "
        f"most {forwards}, {duration(answer_seconds(s, a, speed))} on {speed.name}"
        + (f", {memory:.1f} GiB" if memory is not None and speed.name != "this CPU" else "")
    )


def plan_validation(options: Namespace, s: Setting) -> str:
    """For the options of `fit`; reads nothing. On an H100 unless a GPU is visible."""
    data, params = options.data, SamplingParams(**vars(options.model.sampling))
    rows, count = data.question_batch_size or data.batch_size, max(1, processes(options.trainer))
    speed = measured_speed(torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else H100
    return describe_answering(s, Answering(data.validation_questions, rows, PROMPT, params, count), speed)


class ValidationCost(L.Callback):
    """Say before training what a validation will cost: its questions, its likelihood, and its share of the fit."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule
        if not hasattr(data, "prompt_lengths") or not trainer.num_val_batches or not trainer.is_global_zero:
            return
        s = setting_of(
            pl_module.model.config,
            pl_module,
            rows=data.batch_size,
            length=data.encoding["max_length"] if data.packing else int(data.validation_set.lengths.max()),
            optimizer=pl_module.optimizer,
            dtype=torch.bfloat16 if pl_module.quantize else pl_module.weights_dtype,
            mixed=trainer.precision == "bf16-mixed",
            lora=pl_module.lora,
            gpus=trainer.world_size if pl_module.sharded else 1,
        )
        speed = measured_speed(pl_module.device, torch.bfloat16 if s.compute == 2 else torch.float32)
        lengths, processes = data.prompt_lengths(), trainer.world_size
        a = Answering(len(lengths), data.question_batch_size, max(lengths, default=0), pl_module.sampling, processes)
        tokens = int(data.validation_set.lengths.sum()) * data.validation_draws
        likelihood = likelihood_seconds(s, tokens, speed, processes)
        told = f"{describe_answering(s, a, speed)}; likelihood of {tokens:,} tokens, {duration(likelihood)}"
        batches, lengths = trainer.num_training_batches, getattr(data.train_set, "lengths", None)
        total = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if lengths is not None and max(total, batches) < float("inf"):
            count = total // (trainer.val_check_batch * (trainer.check_val_every_n_epoch or 1))
            seconds = count * (answer_seconds(s, a, speed) + likelihood)
            training = training_seconds(s, int(lengths.sum() * total / batches), speed, processes)
            told += f"; {count:,.0f} validations, {seconds / (seconds + training):.0%} of the fit"
        rank_zero_info(told)
