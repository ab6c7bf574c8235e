"""Where the time of a training loop goes: the share of the model's forward and backward, and of everything else.

OMP_NUM_THREADS=2 python scripts/profile_fit.py --config configs/tiny.yaml --trainer.max_steps 200
"""

import sys
import tempfile

from dream_lightning import DreamModule
from dream_lightning.cli import DreamCLI

ACTIONS = {  # part → the end of its name in Lightning's profiler
    "model forward, head and loss included": "model forward",
    "backward": ".backward",
    "clipping": ".configure_gradient_clipping",
    "waiting for the next batch": ".train_dataloader_next",
}


def on_the_clock(masked_nll):
    """`DreamModule.masked_nll` as an action of its own; Lightning times the rest already."""

    def timed(self: DreamModule, *arguments):
        with self.trainer.profiler.profile("model forward"):
            return masked_nll(self, *arguments)

    return timed


def main() -> None:
    """Run `fit` with the options of the command line, without validation and checkpoints, and print the shares."""
    options = sys.argv[1:]
    folder = tempfile.mkdtemp(prefix="dream-profile-")
    quiet = ["--trainer.profiler=simple", "--trainer.limit_val_batches=0"]
    folders = [f"--{name}.dirpath={folder}" for name in ("checkpoint", "autosave")] + [
        f"--trainer.logger.init_args.save_dir={folder}"
    ]
    sys.argv[1:] = ["fit", *options, *quiet, *folders, "--autosave.every_n_train_steps=1000000000"]
    DreamModule.masked_nll = on_the_clock(DreamModule.masked_nll)
    profiler = DreamCLI().trainer.profiler
    spent = {name: sum(seconds) for name, seconds in profiler.recorded_durations.items()}
    loop = spent["run_training_epoch"]
    parts = {part: sum(s for n, s in spent.items() if n.endswith(end)) for part, end in ACTIONS.items()}
    parts["everything else: noise, optimiser, logging, Lightning"] = loop - sum(parts.values())
    print(f"\n| part of the training loop ({loop:.1f} s) | share |\n|---|---:|")
    for part, seconds in parts.items():
        print(f"| {part} | {100 * seconds / loop:.1f} % |")
    model = sum(list(parts.values())[:2])
    print(f"| **model forward and backward** | **{100 * model / loop:.1f} %** |")


if __name__ == "__main__":
    main()
