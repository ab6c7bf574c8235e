"""Try a multi-GPU config on this machine: speed, memory, loading, resuming after kill -9, scaling from one GPU.

python scripts/random_checkpoint.py --folder /tmp/dream7b --tokenizer bytes --mask_token_id 260 --eos_token_id 256
python scripts/check_multi_gpu.py --recipe configs/fsdp_full.yaml --pretrained /tmp/dream7b --folder /tmp/check
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import torch
from jsonargparse import auto_cli

from dream_lightning.cli import readable_errors

CALIBRATION = 2  # first steps, left out of speeds: compilation, first allocations


class Probe(L.Callback):
    """Writes a line an optimizer step, and one when training starts, into the file that DREAM_PROBE names."""

    def _write(self, trainer: L.Trainer, **line) -> None:
        cuda = torch.cuda.is_available()
        line |= {
            "seconds": time.time() - float(os.environ["DREAM_STARTED"]),
            "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        with Path(f"{os.environ['DREAM_PROBE']}-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_start(self, trainer, pl_module) -> None:
        self._tokens, self._seen = 0, trainer.global_step
        self._write(trainer, step=trainer.global_step, trainable=sum(p.requires_grad for p in pl_module.parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._tokens += int((batch.on_host.document_ids >= 0).sum())
        if trainer.global_step > self._seen:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seen = trainer.global_step
            logged = {n: trainer.callback_metrics[f"train/{n}"].item() for n in ("loss", "gradient_norm")}
            self._write(trainer, step=self._seen, tokens=self._tokens, **logged)
            self._tokens = 0


def main(
    recipe: str,
    pretrained: str,
    folder: str,
    devices: int = 2,
    steps: int = 8,
    accumulate: int = 2,
    length: int = 8192,
    resume: bool = True,
    alone: bool = True,
    accelerator: str = "gpu",
    options: list[str] = [],  # noqa: B006 (jsonargparse wants a list)
) -> None:
    """Train and kill on all GPUs, resume, then train on one, and print the measurements.

    Args:
        recipe: a shipped config with a strategy.
        pretrained: folder with the bytes tokenizer, as above.
        folder: for data, logs and checkpoints; new. With `resume` a checkpoint stays there.
        devices: GPUs.
        steps: of a run; saved once, after half of them and one more.
        accumulate: micro-batches a step.
        length: tokens of a row.
        resume: save, and resume from the checkpoint in a second run.
        alone: also train on one GPU, which must hold everything.
        accelerator: gpu or cpu.
        options: more options for fit, such as [--model.compile_layers=false].
    """
    if steps < 8:
        raise ValueError(
            f"steps is {steps}: wanted at least 8, half of them and one to save and {CALIBRATION} to warm up"
        )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # runs `finally`, as Ctrl-C does
    root, name = Path(folder), Path(recipe).stem
    root.mkdir(parents=True, exist_ok=True)
    write_rows(root / "rows.jsonl", length)
    common = [
        *(f"--config={recipe}", f"--model.pretrained={pretrained}", f"--data.source={root / 'rows.jsonl'}"),
        *("--data.schema=prompt-response", f"--data.max_length={length}", f"--data.cache_dir={root / 'cache'}"),
        *("--data.validation_questions=4", "--model.sampling={max_new_tokens: 32, steps: 8, forbid_mask: true}"),
        *(f"--{saver}.dirpath={root / name}" for saver in ("checkpoint", "autosave")),
        *("--checkpoint.save_top_k=0", f"--trainer.accelerator={accelerator}", "--trainer.max_steps=1000"),
        *(
            "--trainer.num_sanity_val_steps=0",
            "--trainer.limit_val_batches=1",
            "--trainer.check_val_every_n_epoch=null",
        ),
        *("--trainer.val_check_interval=1000000", "--autosave.save_top_k=0", f"--trainer.default_root_dir={root}"),
        *("--trainer.log_every_n_steps=1", f"--trainer.accumulate_grad_batches={accumulate}", "--trainer.logger=false"),
        "--trainer.callbacks=[{class_path: check_multi_gpu.Probe}]",
        "--trainer.enable_progress_bar=false",
        *options,
    ]
    save_at = steps // 2 + 1
    never = 10**9  # full states are 91 GB, which take longer to save than the steps
    several = [f"--trainer.devices={devices}", f"--autosave.every_n_train_steps={save_at if resume else never}"]
    validation = f"--trainer.val_check_interval={(steps - 1) * accumulate}"  # once, with generation

    first = fit(root / f"{name}-first", [*common, *several, validation], until=steps)
    print(f"{name}, {devices} × {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    report("first run", first, skip=(save_at + 1, steps))
    if resume:
        saving = first["lines"][save_at + 1]["seconds"] - first["lines"][save_at]["seconds"] - first["step_seconds"]
        print(f"  saving after step {save_at}: {saving:.0f} s, {size_gb(root / name):.1f} GB", flush=True)
        again = fit(root / f"{name}-again", [*common, *several, "--ckpt_path=last"], until=steps)
        report("killed, resumed", again)
        for step in range(save_at + 1, steps + 1):
            before, after = first["lines"][step], again["lines"][step]
            print(f"  step {step}: loss {before['loss']:.5f}, resumed {after['loss']:.5f}", flush=True)
    if alone:
        one = fit(root / f"{name}-one", [*common, "--trainer.devices=1"], until=steps // 2 + CALIBRATION)
        report("one GPU", one)
        print(f"  scaling: {first['speed'] / one['speed']:.1%} of one GPU's tokens/s on each")


def fit(probe: Path, arguments: list[str], *, until: int) -> dict:
    """Run fit, kill it with all its processes after a step, and read what its first process wrote."""
    print(f"running {probe.name} …", flush=True)
    for old in probe.parent.glob(f"{probe.name}-*.jsonl"):
        old.unlink()
    log = probe.with_suffix(".txt")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "fit", *arguments],
            env=os.environ | {"DREAM_PROBE": str(probe), "DREAM_STARTED": str(time.time())},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and (not (lines := read(probe)) or lines[-1]["step"] < until):
                time.sleep(0.1)
            ended = process.returncode
        finally:  # also when this script is stopped: fit has a session of its own and would continue
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if ended is not None:
        raise SystemExit(f"fit ended by itself ({ended}):\n{log.read_text()[-4000:]}")
    lines = read(probe)
    return {"lines": {line["step"]: line for line in lines}, "start": lines[0]}


def read(probe: Path) -> list[dict]:
    """Whole lines of the first process."""
    file = Path(f"{probe}-0.jsonl")
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def report(title: str, seen: dict, skip: tuple[int, ...] = ()) -> None:
    """Print a run; adds its seconds a step and tokens per second to what was seen."""
    lines, start = seen["lines"], seen["start"]
    used = [s for s in lines if s > start["step"] + CALIBRATION and s not in skip and s - 1 in lines]
    durations = [lines[s]["seconds"] - lines[s - 1]["seconds"] for s in used]
    seen["step_seconds"] = statistics.median(durations)
    tokens = statistics.mean(lines[s]["tokens"] for s in used)  # of the first process
    seen["speed"] = tokens / seen["step_seconds"]
    print(
        f"  {title}: {start['seconds']:.0f} s to the start of training, first step after "
        f"{lines[start['step'] + 1]['seconds']:.0f} s, then {seen['step_seconds']:.2f} s a step of "
        f"{tokens:,.0f} tokens on each GPU, {seen['speed']:,.0f} tok/s on each; peak "
        f"{max(line['gpu_gib'] for line in lines.values()):.1f} GiB a GPU, {start['host_gib']:.1f} GiB of host memory "
        "a process until training starts"
    )


def write_rows(file: Path, length: int) -> None:
    """Rows that fill the length with one token a byte."""
    with file.open("w") as rows:
        for i in range(400):
            answer = f"{i:05d} " * (length // 6 - 20)
            rows.write(json.dumps({"prompt": f"Write {i} again and again.", "response": answer}) + "\n")


def size_gb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e9


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        from dream_lightning.cli import main as command_line

        command_line()
    else:
        with readable_errors():
            auto_cli(main, as_positional=False)
