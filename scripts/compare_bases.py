"""Does the loss stay equal if the frozen base is in 8-bit floats, in 4 bits or in both? Adapters learn a new task.

bash scripts/quickstart.sh
dream-lightning export --checkpoint lightning_logs/tiny/checkpoints/last.ckpt --folder tiny --tokenizer bytes
python scripts/compare_bases.py --pretrained tiny
"""

import json
import random
import statistics
import tempfile
from pathlib import Path

import lightning as L
import torch
from jsonargparse import auto_cli

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning.adapters import LoraParams
from dream_lightning.cli import readable_errors


def subtraction(rng: random.Random) -> dict[str, str]:
    """Three-digit differences, with what every column gives before borrowing: the model has learned additions only."""
    a, b = sorted((rng.randint(100, 999), rng.randint(100, 999)), reverse=True)
    columns = " ".join(f"{int(x) - int(y):+d}" for x, y in zip(str(a), str(b), strict=True))
    return {"prompt": f"{a}-{b}=?", "response": rf"{columns} \boxed{{{a - b}}}"}


def write(path: Path, count: int, seed: int) -> str:
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(subtraction(rng)) + "\n" for _ in range(count)))
    return str(path)


def train(pretrained: str, base: str, seed: int, steps: int, folder: Path) -> tuple[float, float]:
    """The validation NLL before and after."""
    module = DreamModule(
        pretrained,
        dtype="bfloat16",
        lora=LoraParams(rank=16, alpha=32, targets="all-linear"),
        quantize=None if base == "bfloat16" else base,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
        weighting="none",
        seed=seed,
    )
    data = S1KDataModule(
        write(folder / "train.jsonl", 4000, seed),
        tokenizer=module.tokenizer,
        validation_source=write(folder / "validation.jsonl", 500, 1000),
        schema="prompt-response",
        max_length=128,
        eos_fill_to=30,
        batch_size=32,
        validation_questions=0,
        cache_dir=str(folder / "cache"),
        seed=seed,
    )
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        **dict.fromkeys(quiet, False),
    )
    before = trainer.validate(module, data, verbose=False)[0]["val/nll"]
    trainer.fit(module, data)
    return before, trainer.callback_metrics["val/nll"].item()


def main(
    pretrained: str,
    bases: tuple[str, ...] = ("bfloat16", "float8", "nf4", "nf4_float8"),
    seeds: int = 3,
    steps: int = 300,
) -> None:
    """Print a table.

    Args:
        pretrained: the exported model of the quickstart.
        bases: among bfloat16, float8, nf4 and nf4_float8.
        seeds: runs of each; a seed fixes adapters, data and noise.
        steps: optimizer steps of a run.
    """
    table = ["| frozen base | validation NLL before | after, each seed | mean |", "|---|---:|---|---:|"]
    for base in bases:
        results = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                results.append(train(pretrained, base, seed, steps, Path(folder)))
            print(base, seed, results[-1], flush=True)
        before, after = zip(*results, strict=True)
        each = [", ".join(f"{nll:.4f}" for nll in nlls) for nlls in (before, after)]
        table.append(f"| {base} | {each[0]} | {each[1]} | {statistics.mean(after):.4f} |")
    print("\n".join(table))


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
