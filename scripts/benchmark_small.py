"""Training a small model: `fit` with and without `data.preload` beside a plain training loop of the same model.

python scripts/benchmark_small.py                  # 15 M parameters, 1,024 rows of 80 tokens, on a GPU
python scripts/benchmark_small.py --rows 8 --steps 3 --warm_up 2 --sizes '{hidden_size: 32, …}'
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

from dream_lightning import DreamModel, DreamModule, S1KDataModule, SamplingParams, load_tokenizer
from dream_lightning.cli import readable_errors, tune_gc
from dream_lightning.model_factory import new_config

SIZES = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6}
RECORDED = 10  # steps under the profiler


class Clock(L.Callback):
    """Times the steps after the first `warm_up`, then records how long the GPU is busy."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last = warm_up, warm_up + steps
        self.seconds = self.busy = float("nan")
        self._profile: Any = None

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        self.reached(trainer.global_step)

    def reached(self, step: int) -> None:
        if step in (self.first, self.last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == self.first:
            self._started = time.perf_counter()
        if step == self.last:
            self.seconds = (time.perf_counter() - self._started) / (self.last - self.first)
            if torch.cuda.is_available():
                self._profile = profile(activities=[ProfilerActivity.CUDA])
                self._profile.__enter__()
        if step == self.last + RECORDED and self._profile:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            events = self._profile.profiler.kineto_results.events()
            spans = sorted((e.start_ns(), e.end_ns()) for e in events if "CUDA" in str(e.device_type()))
            busy, until = 0, 0
            for start, end in spans:
                busy += max(0, end - max(start, until))
                until = max(until, end)
            self.busy = busy / (max(end for _, end in spans) - spans[0][0])


def main(
    sizes: dict[str, int] = SIZES,
    rows: int = 1024,
    length: int = 80,
    warm_up: int = 30,
    steps: int = 100,
    only: str | None = None,
) -> None:
    """Print tokens per second, share of the time that the GPU is busy, and the last loss.

    Args:
        sizes: of the model.
        rows: of a batch.
        length: of a row in tokens.
        warm_up: steps before the clock starts.
        steps: on the clock.
        only: one row of the table instead of all four.
    """
    results = {}
    runs = {
        "plain loop, compiled": lambda clock: plain_loop(clock, sizes, rows, length, compiled=True),
        "plain loop": lambda clock: plain_loop(clock, sizes, rows, length, compiled=False),
        "fit": lambda clock: fit(clock, sizes, rows, length, preload=False),
        "fit, preload": lambda clock: fit(clock, sizes, rows, length, preload=True),
    }
    for name, run in runs.items() if only is None else [(only, runs[only])]:
        clock = Clock(warm_up, steps)
        loss = run(clock)
        results[name] = clock, loss
        print(f"{name}: {1000 * clock.seconds:.1f} ms, loss {loss:.3f}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{rows} rows of {length} tokens, {sizes}, {device}\n")
    print("| | ms a step | tokens/s | GPU busy | last loss |\n|---|---:|---:|---:|---:|")
    for name, (clock, loss) in results.items():
        speed = rows * length / clock.seconds
        print(f"| {name} | {1000 * clock.seconds:.1f} | {speed:,.0f} | {clock.busy:.0%} | {loss:.3f} |")


def fit(clock: Clock, sizes: dict[str, int], rows: int, length: int, *, preload: bool) -> float:
    """Train as `dream-lightning fit` does."""
    module = DreamModule(
        new_model=sizes,
        tokenizer="bytes",
        weighting="none",
        normalizer="masked",
        compile_layers=torch.cuda.is_available(),
        optimizer=lambda parameters: adamw(parameters),
        sampling=SamplingParams(max_new_tokens=16, steps=16),
    )
    trainer = L.Trainer(
        max_steps=clock.last + RECORDED + 1,
        precision="bf16-mixed",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, data_of(module.tokenizer, rows, length, preload))
    return trainer.callback_metrics["train/loss"].item()


def plain_loop(clock: Clock, sizes: dict[str, int], rows: int, length: int, *, compiled: bool) -> float:
    """The loop that one would write without this package, in nanoGPT's style."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer("bytes")
    data = data_of(tokenizer, rows, length, True)
    data.setup("fit")
    ids = torch.from_numpy(data.train_set.arrays["ids"].copy()).view(-1, length)
    prompt = torch.from_numpy(data.train_set.prompt_length)
    model = DreamModel(new_config(sizes, tokenizer)).to(device)
    optimizer = adamw(model.parameters())
    forward: Callable = torch.compile(model) if compiled else model
    column = torch.arange(length, device=device)
    for step in range(clock.last + RECORDED + 1):
        clock.reached(step)
        chosen = torch.randint(len(ids), (rows,))
        x_0, start = (x[chosen].pin_memory() if device.type == "cuda" else x[chosen] for x in (ids, prompt))
        x_0, start = x_0.to(device, non_blocking=True).long(), start.to(device, non_blocking=True)
        t = torch.rand(rows, 1, device=device)
        masked = (torch.rand(rows, length, device=device) < t) & (column >= start[:, None])
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(torch.where(masked, tokenizer.mask_token_id, x_0)).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), x_0.flatten(), reduction="none")
        loss = (nll * masked.flatten()).sum() / masked.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def data_of(tokenizer: Any, rows: int, length: int, preload: bool) -> S1KDataModule:
    """The bundled sums, filled with eos to one length."""
    return S1KDataModule(
        "bundled",
        tokenizer=tokenizer,
        validation_source="bundled",
        style="bare",
        max_length=length,
        eos_fill_to=length,
        batch_size=rows,
        preload=preload,
        validation_questions=0,
        cache_dir=tempfile.gettempdir() + "/benchmark_small",
    )


def adamw(parameters: Any) -> torch.optim.AdamW:
    """Of both."""
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(parameters, lr=7e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)


if __name__ == "__main__":
    tune_gc()
    with readable_errors():
        auto_cli(main, as_positional=False)
