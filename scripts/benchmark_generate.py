"""Speed of generation at the shapes of a checkpoint, beside the authors' loop, in one run; the table comes last.

python scripts/random_checkpoint.py --folder /tmp/dream7b
python scripts/benchmark_generate.py --pretrained /tmp/dream7b

Weights may be random: nothing here depends on what is generated, except `threshold`, which then is at its worst case,
one token a forward.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from jsonargparse import auto_cli
from torch import Tensor

from dream_lightning import DreamModel, SamplingParams
from dream_lightning.adapters import dequantized
from dream_lightning.cli import readable_errors
from dream_lightning.diffusion.denoiser import align
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser
from dream_lightning.model_factory import quantized_model
from dream_lightning.sampling import denoising_steps


def authors_loop(model: DreamModel, prompt: Tensor, new_tokens: int, steps: int) -> Iterator[Tensor]:
    """Masks filled by entropy as the authors' `diffusion_generate` does it: logits of every position, eagerly."""
    mask = model.config.mask_token_id
    x = torch.nn.functional.pad(prompt, (0, new_tokens), value=mask)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        where = x == mask
        with torch.no_grad():
            probs = align(model(x).logits)[where].softmax(-1)
        confidence = torch.full(x.shape, -torch.inf, device=x.device, dtype=probs.dtype)
        confidence[where] = (probs * (probs + 1e-10).log()).sum(-1)
        left = where.sum() / len(x)
        count = int(left * (1 - times[step + 1] / times[step])) if step < steps - 1 else int(left)
        filled = torch.full_like(x, mask).masked_scatter_(where, probs.argmax(-1))
        chosen = confidence.topk(count).indices
        x.scatter_(1, chosen, filled.gather(1, chosen))
        yield x


class Bench:
    """Runs, and the lines of the table."""

    def __init__(self, device: str, prompt: int, new_tokens: int, block: int) -> None:
        self.device, self.prompt, self.new_tokens, self.block = device, prompt, new_tokens, block
        self.steps_lines: list[str] = []
        self.speed_lines: list[str] = []
        self.notes: list[str] = []

    def milliseconds(self, run: Callable[[], Iterator[Tensor]]) -> tuple[list[float], float]:
        """Time of every step of the second run, and seconds of the first one, compilation included."""
        started = time.perf_counter()
        for _ in run():
            pass
        self._wait()
        first = time.perf_counter() - started
        marks = [self._mark()]
        for _ in run():
            marks.append(self._mark())
        self._wait()
        pairs = zip(marks, marks[1:])  # noqa: B905, RUF007
        if self.device == "cuda":
            return [a.elapsed_time(b) for a, b in pairs], first
        return [1000 * (b - a) for a, b in pairs], first

    def waits(self, name: str, run: Callable[[], Iterator[Tensor]]) -> None:
        """How often the host waited for the device in a run, as torch counts it."""
        if self.device != "cuda":
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                steps = sum(1 for _ in run())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        number = sum("synchroniz" in str(w.message) for w in caught)
        self.notes.append(f"{name}: the host waited {number} times in {steps} steps")

    def steps(self, name: str, rows: int, run: Callable, *, target: float | None = None, block_steps: int = 0) -> float:
        """One line of the table of steps: the median, with a cache that of the steps which use it."""
        times, first = self.milliseconds(run)
        note = ""
        if block_steps:
            full = [t for i, t in enumerate(times) if i % block_steps == 0]
            times = [t for i, t in enumerate(times) if i % block_steps]
            note = f"refresh at a block's start {statistics.median(full):.1f}"
        ms = statistics.median(times)
        goal = "–" if target is None else f"{target:g}"
        self.steps_lines.append(f"| {name} | {rows} × {self.length} | {ms:.1f} | {goal} | {first:.0f} | {note} |")
        print(self.steps_lines[-1], flush=True)
        return ms

    def speed(self, name: str, rows: int, run: Callable[[], Iterator[Tensor]], forwards: int) -> None:
        """One line of the table of whole answers."""
        times, first = self.milliseconds(run)
        seconds = sum(times) / 1000
        a_forward, a_second = self.new_tokens / forwards, rows * self.new_tokens / seconds
        self.speed_lines.append(
            f"| {name} | {rows} | {a_forward:.1f} | {a_second:,.0f} | {seconds:.2f} | {first:.0f} |"
        )
        print(self.speed_lines[-1], flush=True)

    @property
    def length(self) -> int:
        return self.prompt + self.new_tokens

    def ids(self, rows: int, new_tokens: int | None = None) -> Tensor:
        prompt = self.length - (new_tokens or self.new_tokens)
        return torch.randint(0, 100, (rows, prompt), device=self.device)

    def params(self, new_tokens: int | None = None, **options) -> SamplingParams:
        new_tokens = new_tokens or self.new_tokens
        return SamplingParams(**{"max_new_tokens": new_tokens, "steps": new_tokens, "forbid_mask": True, **options})

    def _mark(self):
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def print(self) -> None:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        print(f"\n{name} · torch {torch.__version__} · medians of the second run\n")
        print("| a step | rows × tokens | ms | target | first run s | |\n|---|---|---|---|---|---|")
        print("\n".join(self.steps_lines))
        print("", *self.notes, sep="\n")
        if self.speed_lines:
            print(f"\n| {self.new_tokens} new tokens | rows | tokens a forward | tokens/s | s | first run s |")
            print("|---|---|---|---|---|---|\n" + "\n".join(self.speed_lines))


def main(
    pretrained: str,
    prompt: int = 256,
    new_tokens: int = 256,
    block: int = 32,
    many: int = 8,
    most: int = 32,
    four_bit: bool = True,
    answers: bool = True,
) -> None:
    """Print milliseconds a step and tokens a second.

    Args:
        pretrained: an official-format folder.
        prompt: tokens of each prompt.
        new_tokens: to generate.
        block: block_length where there are blocks.
        many: rows of the second size of batch.
        most: rows of the largest batch.
        four_bit: measure the nf4 base too.
        answers: measure whole answers too.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    bench = Bench(device, prompt, new_tokens, block)
    few = new_tokens // 8  # steps of uncached runs, 8 tokens each
    model = DreamModel.from_pretrained(pretrained).to(device).eval()
    before = gpu_memory()
    fast = CompiledDenoiser(model, capture=device == "cuda")
    if device == "cuda":
        bench.notes.append(f"weights laid together for fewer products: {before} before, {gpu_memory()} after")
    one = {}
    for rows, target in ((1, 13.0), (many, 88.0)):
        ids, params = bench.ids(rows), bench.params(steps=few)
        one[rows] = bench.steps("authors' loop", rows, partial(authors_loop, model, ids, new_tokens, few))
        bench.steps("uncached, eager", rows, partial(denoising_steps, model, ids, params=params))
        bench.steps("uncached, compiled", rows, partial(denoising_steps, fast, ids, params=params), target=target)
    ids, short = bench.ids(1), 2 * block
    cached = bench.params(block_length=block, cache="dual", tokens_per_step=1)
    bench.steps("dual cache, eager", 1, partial(denoising_steps, model, ids, params=cached), block_steps=block)
    run = partial(denoising_steps, fast, ids, params=cached)
    bench.steps("dual cache, compiled", 1, run, target=6.5, block_steps=block)
    bench.waits("dual cache, compiled", run)
    bench.waits("uncached, compiled", partial(denoising_steps, fast, ids, params=bench.params(steps=few)))
    certain = bench.params(block_length=block, cache="dual", threshold=0.9)
    bench.waits("threshold, dual cache, compiled", partial(denoising_steps, fast, ids, params=certain))
    ends, prefix = bench.ids(1, short), bench.params(short, block_length=block, cache="prefix", tokens_per_step=1)
    run = partial(denoising_steps, fast, ends, params=prefix)
    bench.steps(f"prefix cache, the last {short} tokens, compiled", 1, run, target=6.5, block_steps=block)
    if answers:
        whole_answers(bench, fast, one, (1, many, most))
    if four_bit and device == "cuda":
        del model, fast, run
        nf4_steps(bench, pretrained)
    bench.print()


def gpu_memory() -> str:
    """What torch holds."""
    used, reserved = torch.cuda.memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30
    return f"{used:.2f} GiB in use, {reserved:.2f} reserved"


def whole_answers(bench: Bench, fast: CompiledDenoiser, one: dict[int, float], sizes: tuple[int, ...]) -> None:
    """Tokens per second at given tokens per forward, and with a threshold that random weights never pass."""
    for rows in sizes:
        ids = bench.ids(rows)
        if rows in one:
            bench.speed_lines.append(
                f"| authors' loop, from its step | {rows} | 1.0 | {1000 * rows / one[rows]:,.0f} | | |"
            )
        dual = {"block_length": bench.block, "cache": "dual"}
        ways = [("dual cache, threshold 0.9 never passed", {"alg": "maskgit_plus", "threshold": 0.9}, 1)]
        ways += [(f"dual cache, {k} tokens a step", {"tokens_per_step": k}, k) for k in (2, 4, 8)]
        for name, options, k in ways:
            params = bench.params(**dual, **options)
            bench.speed(name, rows, partial(denoising_steps, fast, ids, params=params), bench.new_tokens // k)


def nf4_steps(bench: Bench, pretrained: str) -> None:
    """The 4-bit base: unpacked at every forward, and held in bfloat16 while generating."""
    model = quantized_model(pretrained, "nf4", torch.device("cuda")).eval()
    ids, params = bench.ids(1), bench.params(steps=bench.new_tokens // 8)
    cached = bench.params(block_length=bench.block, cache="dual", tokens_per_step=1)
    for name, context in (("nf4", nullcontext()), ("nf4 dequantized", dequantized(model))):
        with context:
            fast = CompiledDenoiser(model)
            if name == "nf4":
                bench.steps(f"{name}, uncached, eager", 1, partial(denoising_steps, model, ids, params=params))
            bench.steps(f"{name}, uncached, compiled", 1, partial(denoising_steps, fast, ids, params=params))
            run = partial(denoising_steps, fast, ids, params=cached)
            bench.steps(f"{name}, dual cache, compiled", 1, run, block_steps=bench.block)


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
