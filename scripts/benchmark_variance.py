"""What stratified t and complementary masks bring: gradient variance at equal work, and steps to a validation loss.

python scripts/benchmark_variance.py                        # the quickstart's model, minutes on a CPU
python scripts/benchmark_variance.py --model millions       # 5 M parameters; on a GPU add --device cuda --jobs 8
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse import auto_cli

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning.batch import Batch
from dream_lightning.readable_errors import readable_errors

TINY = yaml.safe_load((Path(__file__).parents[1] / "configs" / "tiny.yaml").read_text())
SIZES = {
    "tiny": TINY["model"]["new_model"],
    "millions": TINY["model"]["new_model"]
    | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "initializer_range": 0.05},
}
_VALIDATED = 256  # documents
LEARNING_RATE = {"tiny": 1.5e-3, "millions": 7e-4}
SCHEMES = {
    "independent t": {"stratified_t": False},
    "stratified t": {"stratified_t": True},
    "independent t, complementary masks": {"stratified_t": False, "complementary_masks": True},
    "stratified t, complementary masks": {"stratified_t": True, "complementary_masks": True},
}


def new_module(model: str, scheme: str, weighting: str, seed: int) -> DreamModule:
    """The same first weights for every scheme of a seed."""
    L.seed_everything(seed, verbose=False)
    return DreamModule(
        new_model=SIZES[model],
        tokenizer="bytes",
        weighting=weighting,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE[model], betas=(0.9, 0.95)),
        seed=seed,
        **SCHEMES[scheme],
    )


def new_data(module: DreamModule, rows: int, cache: str) -> S1KDataModule:
    """`rows` forwards and backwards a step: with complementary masks these are half as many documents."""
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


class Curve(L.Callback):
    """Validation loss by step."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a point."""
        self.points.append((trainer.global_step, trainer.callback_metrics["val/nll"].item()))


def train(module: DreamModule, data: S1KDataModule, steps: int, device: str, *, validations: int = 0) -> Curve:
    """Train as the quickstart does."""
    curve = Curve()
    L.Trainer(
        accelerator=device,
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[curve],
        val_check_interval=max(1, steps // max(1, validations)),
        check_val_every_n_epoch=None,
        limit_val_batches=_VALIDATED // data.batch_size if validations else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return curve


def endless(data: S1KDataModule) -> Iterator[Batch]:
    """Batches of one epoch after another."""
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def gradient_moments(module: DreamModule, data: S1KDataModule, draws: int, device: str) -> tuple[float, float]:
    """E|g − ḡ|² and |ḡ|² of a step's gradient at these weights, over `draws` steps; both without bias."""
    module.to(device).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    total, squares = torch.zeros(sum(p.numel() for p in parameters), device=device), 0.0
    for batch in islice(endless(data), draws):
        batch, noised = module.training_noise(batch.to(device))
        loss = module.loss(batch, noised, module.masked_nll(batch, noised)).mean
        g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])
        total += g
        squares = squares + g.square().sum()
    mean_squared = (total / draws).square().sum()
    variance = (squares - draws * mean_squared) / (draws - 1)
    return variance.item(), (mean_squared - variance / draws).item()  # the mean has noise of its own: taken off


def run_of(job: dict[str, Any]) -> dict[str, Any]:
    """One job in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    model, scheme, weighting, seed = job["model"], job["scheme"], job["weighting"], job["seed"]
    rows, device, cache = job["rows"], job["device"], job["cache"]
    if job["kind"] == "curve":
        module = new_module(model, scheme, weighting, seed)
        curve = train(module, new_data(module, rows, cache), job["steps"], device, validations=10)
        return job | {"points": curve.points}
    module = new_module(model, "independent t", weighting, seed)
    train(module, new_data(module, rows, cache), job["warm_up"], device)
    moments = {}
    for scheme, options in SCHEMES.items():
        module.stratified_t = options["stratified_t"]
        module.complementary_masks = options.get("complementary_masks", False)
        data = new_data(module, rows, cache)
        data.setup("fit")
        moments[scheme] = gradient_moments(module, data, job["draws"], device)
    squared = mean(m for _, m in moments.values())  # the same for all schemes but for its estimate's noise
    return job | {"variances": {scheme: variance / squared for scheme, (variance, _) in moments.items()}}


def steps_to(points: list[tuple[int, float]], target: float) -> float:
    """The step at which the curve first reaches the target, between two validations by a straight line."""
    for (a, high), (b, low) in zip([(0, float("inf")), *points], points, strict=False):
        if low <= target:
            return b if high == float("inf") else a + (b - a) * (high - target) / (high - low)
    return float("nan")


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
        model: the quickstart's sizes, or 256 wide and 6 deep.
        weightings: objectives to train with.
        rows: forwards and backwards a step; complementary masks use two for a document.
        seeds: repetitions, each with weights, order and noise of its own.
        steps: of every training run; 0 leaves the training runs out.
        warm_up: steps of training before the gradient's variance is measured.
        draws: steps to measure it over; 0 leaves this out.
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
                work.append(job | {"kind": "variance", "scheme": "", "warm_up": warm_up, "draws": draws})
            if steps:
                work += [job | {"kind": "curve", "scheme": scheme, "steps": steps} for scheme in SCHEMES]
    done = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(run_of, work):
            done.append(result)
            print({k: v for k, v in result.items() if k not in ("cache", "device")}, flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    parameters = sum(p.numel() for p in _built(model).parameters())
    print(
        f"\n{parameters:,} parameters, {rows} rows a step, {seeds} seeds, float32, {where}, torch {torch.__version__}"
    )
    if draws:
        print(f"\n**Variance of a step's gradient, E|g − ḡ|² / |ḡ|², after {warm_up} steps, over {draws} steps**\n")
        table(weightings, [r for r in done if r["kind"] == "variance"], _variance_cell)
    if steps:
        print(f"\n**Steps to the validation loss that all runs of a seed reach in {steps}, and the final loss**\n")
        table(weightings, [r for r in done if r["kind"] == "curve"], _curve_cell)
    print("\nIn brackets: relative to independent t with the same seed, mean ± standard deviation over the seeds.")


def table(weightings: list[str], results: list[dict[str, Any]], cell: Any) -> None:
    """Schemes down, objectives across."""
    print("| | " + " | ".join(f"`{w}`" for w in weightings) + " |")
    print("|---|" + "---:|" * len(weightings))
    for scheme in SCHEMES:
        print(f"| {scheme} | " + " | ".join(cell(results, scheme, w) for w in weightings) + " |")


def _variance_cell(results: list[dict[str, Any]], scheme: str, weighting: str) -> str:
    found = [r["variances"] for r in results if r["weighting"] == weighting]
    return _beside([v[scheme] for v in found], [v["independent t"] for v in found], ".3g")


def _curve_cell(results: list[dict[str, Any]], scheme: str, weighting: str) -> str:
    curves: dict[int, dict[str, list[tuple[int, float]]]] = {}  # seed → scheme → points
    for r in results:
        if r["weighting"] == weighting:
            curves.setdefault(r["seed"], {})[r["scheme"]] = r["points"]
    targets = [max(points[-1][1] for points in of_seed.values()) for of_seed in curves.values()]
    reached, final = (
        {
            name: [value(of_seed[name], target) for of_seed, target in zip(curves.values(), targets, strict=True)]
            for name in ("independent t", scheme)
        }
        for value in (steps_to, lambda points, _: points[-1][1])
    )
    return " · ".join(_beside(v[scheme], v["independent t"], form) for v, form in ((reached, ".0f"), (final, ".4f")))


def _beside(ours: list[float], baseline: list[float], form: str) -> str:
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    spread = stdev(ratios) if len(ratios) > 1 else 0.0
    return f"{mean(ours):{form}} ({mean(ratios):.2f} ± {spread:.2f})"


def _built(model: str) -> DreamModule:
    module = new_module(model, "independent t", "original", 0)
    module.configure_model()
    return module


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
