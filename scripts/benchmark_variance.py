"""What stratified t and complementary masks bring: gradient variance at equal work, and steps to a validation loss.

python scripts/benchmark_variance.py                        # the model of the quickstart, minutes on a CPU
python scripts/benchmark_variance.py --model millions       # 5 M parameters; on a GPU add --device cuda --jobs 8
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, count, islice
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse import auto_cli

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning.cli import readable_errors, shipped_configs

TINY = yaml.safe_load(shipped_configs()["tiny"].read_text())["model"]["new_model"]
LARGER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "initializer_range": 0.05}
MODELS = {"tiny": (TINY, 1.5e-3), "millions": (TINY | LARGER, 7e-4)}  # sizes, learning rate
SCHEMES = {
    "independent t": {"stratified_t": False, "complementary_masks": False},
    "stratified t": {"stratified_t": True, "complementary_masks": False},
    "independent t, complementary masks": {"stratified_t": False, "complementary_masks": True},
    "stratified t, complementary masks": {"stratified_t": True, "complementary_masks": True},
}
VALIDATED = 256  # documents


class Curve(L.Callback):
    """Validation loss by step."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.points.append((trainer.global_step, trainer.callback_metrics["val/nll"].item()))


def new_module(model: str, scheme: str, weighting: str, seed: int) -> DreamModule:
    """The first weights are the same for every scheme of a seed."""
    L.seed_everything(seed, verbose=False)
    sizes, lr = MODELS[model]
    return DreamModule(
        new_model=sizes,
        tokenizer="bytes",
        weighting=weighting,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)),
        seed=seed,
        **SCHEMES[scheme],
    )


def new_data(module: DreamModule, rows: int, cache: str) -> S1KDataModule:
    """`rows` forwards per step; with complementary masks these are half as many documents."""
    return S1KDataModule(
        "bundled",
        tokenizer=module.tokenizer,
        validation_source="bundled",
        max_length=128,
        eos_fill_to=30,
        batch_size=rows // 2 if module.complementary_masks else rows,
        validation_questions=0,
        seed=module.seed,
        cache_dir=cache,
    )


def train(module: DreamModule, data: S1KDataModule, steps: int, device: str, *, validations: int = 0) -> Curve:
    curve = Curve()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    L.Trainer(
        accelerator=device,
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[curve],
        val_check_interval=max(1, steps // max(1, validations)),
        check_val_every_n_epoch=None,
        limit_val_batches=VALIDATED // data.batch_size if validations else 0,
        num_sanity_val_steps=0,
        **dict.fromkeys(quiet, False),
    ).fit(module, data)
    return curve


def gradient_moments(module: DreamModule, data: S1KDataModule, draws: int, device: str) -> tuple[float, float]:
    """E|g − ḡ|² and |ḡ|² of the gradient of a step at these weights, over `draws` steps; both unbiased."""
    module.to(device).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    total, squares = torch.zeros(sum(p.numel() for p in parameters), device=device), 0.0
    loader = data.train_dataloader()
    epochs = (loader.sampler.set_epoch(epoch) or loader for epoch in count())
    for batch in islice(chain.from_iterable(epochs), draws):
        batch, noised = module.training_noise(batch.to(device))
        loss = module.loss(batch, noised, module.masked_nll(batch, noised)).mean
        g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])
        total, squares = total + g, squares + g.square().sum()
    mean_squared = (total / draws).square().sum()
    variance = (squares - draws * mean_squared) / (draws - 1)
    return variance.item(), (mean_squared - variance / draws).item()  # the mean has variance too: subtracted


def quiet_process() -> None:
    """Of the pool: one thread, and no words of Lightning's."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One job in its own process: a training run of one scheme, or the variances of all schemes at the same weights."""
    rows, device, cache = job["rows"], job["device"], job["cache"]
    module = new_module(job["model"], job["scheme"], job["weighting"], job["seed"])
    if job["kind"] == "curve":
        curve = train(module, new_data(module, rows, cache), job["steps"], device, validations=10)
        return job | {"points": curve.points}
    train(module, new_data(module, rows, cache), job["warm_up"], device)
    moments = {}
    for scheme, options in SCHEMES.items():
        vars(module).update(options)
        data = new_data(module, rows, cache)
        data.setup("fit")
        moments[scheme] = gradient_moments(module, data, job["draws"], device)
    squared = mean(m for _, m in moments.values())  # equal for all schemes up to the noise of its estimate
    return job | {"variances": {scheme: variance / squared for scheme, (variance, _) in moments.items()}}


def steps_to(points: list[tuple[int, float]], target: float) -> float:
    """The step at which a curve first reaches the target, interpolated between two validations."""
    for (a, high), (b, low) in zip([(0, float("inf")), *points], points, strict=False):
        if low <= target:
            return b if high == float("inf") else a + (b - a) * (high - target) / (high - low)
    return float("nan")


def table(weightings: list[str], done: list[dict[str, Any]], cell: Callable[[list[dict[str, Any]], str], str]) -> None:
    """Schemes as rows, objectives as columns."""
    print("| | " + " | ".join(f"`{w}`" for w in weightings) + " |\n|---|" + "---:|" * len(weightings))
    for scheme in SCHEMES:
        cells = [cell([r for r in done if r["weighting"] == w], scheme) for w in weightings]
        print(f"| {scheme} | {' | '.join(cells)} |")


def variance_cell(results: list[dict[str, Any]], scheme: str) -> str:
    variances = [r["variances"] for r in results]
    return relative([v[scheme] for v in variances], [v["independent t"] for v in variances], ".3g")


def curve_cell(results: list[dict[str, Any]], scheme: str) -> str:
    points = {(r["seed"], r["scheme"]): r["points"] for r in results}
    seeds = sorted({seed for seed, _ in points})
    targets = [max(points[seed, name][-1][1] for name in SCHEMES) for seed in seeds]  # reached by all runs of a seed

    def steps(name: str) -> list[float]:
        return [steps_to(points[seed, name], target) for seed, target in zip(seeds, targets, strict=True)]

    def final(name: str) -> list[float]:
        return [points[seed, name][-1][1] for seed in seeds]

    return " · ".join(relative(f(scheme), f("independent t"), form) for f, form in ((steps, ".0f"), (final, ".4f")))


def relative(values: list[float], baseline: list[float], form: str) -> str:
    ratios = [a / b for a, b in zip(values, baseline, strict=True)]
    return f"{mean(values):{form}} ({mean(ratios):.2f} ± {stdev(ratios) if len(ratios) > 1 else 0:.2f})"


def main(
    model: Literal["tiny", "millions"] = "tiny",
    weightings: list[Literal["original", "linear", "cart", "none"]] = ["original", "none"],  # noqa: B006
    rows: int = 8,
    seeds: int = 3,
    steps: int = 300,
    warm_up: int = 150,
    draws: int = 400,
    device: str = "cpu",
    jobs: int = 1,
) -> None:
    """Print two tables in Markdown.

    Args:
        model: the sizes of the quickstart, or 256 wide and 6 deep.
        weightings: objectives to train with.
        rows: forwards per step; complementary masks use two for a document.
        seeds: repetitions, each with its own weights, order and noise.
        steps: of every training run; 0 skips the training runs.
        warm_up: steps of training before the variance of the gradient is measured.
        draws: steps to measure it over; 0 skips this.
        device: cpu or cuda.
        jobs: processes at a time; on one GPU they share it.
    """
    cache = tempfile.mkdtemp(prefix="dream-variance-")
    common = {"model": model, "rows": rows, "device": device, "cache": cache}
    work = []
    for weighting in weightings:
        for seed in range(seeds):
            job = common | {"weighting": weighting, "seed": seed}
            if draws:
                work.append(job | {"kind": "variance", "scheme": "independent t", "warm_up": warm_up, "draws": draws})
            if steps:
                work += [job | {"kind": "curve", "scheme": scheme, "steps": steps} for scheme in SCHEMES]
    done = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), quiet_process) as pool:
        for result in pool.map(run_job, work):
            done.append(result)
            print({k: v for k, v in result.items() if k not in ("cache", "device")}, flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\nmodel {model}, {rows} rows per step, {seeds} seeds, float32, {where}, torch {torch.__version__}")
    if draws:
        print(
            f"\n**Variance of the gradient of a step, E|g − ḡ|² / |ḡ|², after {warm_up} steps, over {draws} steps**\n"
        )
        table(weightings, [r for r in done if r["kind"] == "variance"], variance_cell)
    if steps:
        print(f"\n**Steps to the validation loss that all runs of a seed reach in {steps}, and the final loss**\n")
        table(weightings, [r for r in done if r["kind"] == "curve"], curve_cell)
    print("\nIn brackets: relative to independent t with the same seed, mean ± standard deviation over the seeds.")


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
