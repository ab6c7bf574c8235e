"""From text to reasoning in four stages, each from the model of the one before: pretrain, sft, sft_long, distill.

python scripts/stages.py                                        # a small model on additions, a minute on a CPU
python scripts/stages.py --pretrain text.jsonl --sft chats.jsonl --sft_long long.jsonl --distill r1.jsonl    # one GPU

Options of `fit` may follow and go to all stages, such as --trainer.max_steps=1000. Started again, it keeps the stages
whose model is complete and resumes the one that was killed.
"""

import argparse
import json
from pathlib import Path

from dream_lightning import cli
from dream_lightning.data.additions import sample_rows
from dream_lightning.experiments.runs import find_runs
from dream_lightning.export import export_checkpoint

STAGES = ("pretrain", "sft", "sft_long", "distill")
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_steps": 80,
    "trainer.val_check_interval": 40,
    "model.compile_layers": "false",
    "model.optimizer.lr": 3e-3,
    "model.sampling.max_new_tokens": 40,
    "model.sampling.steps": 10,
    "data.eos_fill_to": 40,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "data.validation_questions": 4,
}
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"rope_theta": 100.0, "max_position_embeddings": 2048, "initializer_range": 0.08}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_additions(folder: Path) -> None:
    """STAGE.jsonl and STAGE_validation.jsonl: the bundled additions as text, short and long chats, and reasoning."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, ending, count in (("train", "", 800), ("validation", "_validation", 24)):
        rows = sample_rows(split)[:count]
        sums = [(r["question"], r["thinking_trajectories"][0], r["solution"]) for r in rows]
        response = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
        written = {stage: [] for stage in STAGES}
        for i, (question, trace, answer) in enumerate(sums):
            if i % 8 == 0:  # of several sums; the longer conversations have about 700 tokens
                several = [sums[k % count] for k in range(i, i + 22)]
                written["pretrain"].append({"text": " ".join(" ".join(one) for one in several[:8])})
                texts = [text for asked, _, answered in several for text in (asked, answered)]
                written["sft_long"].append({"conversations": chat(*texts), "answer": texts[-1]})
            written["sft"].append({"conversations": chat(question, answer), "answer": answer})
            written["distill"].append({"messages": chat(question, response.format(trace, answer)), "answer": answer})
        for stage, records in written.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{stage}{ending}.jsonl").write_text(lines, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage in STAGES:
        parser.add_argument(f"--{stage}", help="a file or folder: docs/data.md. Default: additions, for all stages")
    parser.add_argument("--out", default="lightning_logs/stages", help="folder of models, checkpoints and logs")
    parser.add_argument("--vocab_size", type=int, default=6400, help="entries of the tokenizer; 320 for additions")
    known, options = parser.parse_known_args(arguments)
    sources, out = [getattr(known, stage) for stage in STAGES], Path(known.out)
    is_small = not any(sources)
    if is_small:
        write_additions(out / "data")
        sources = [str(out / "data" / f"{stage}.jsonl") for stage in STAGES]
        options = [*(f"--{name}={value}" for name, value in SMALL.items()), *options]
    elif not all(sources):
        parser.error("name the data of all four stages, or of none")
    if not (out / "tokenizer").exists():
        size = 320 if is_small else known.vocab_size
        learned = ["--folder", str(out / "tokenizer"), "--vocab_size", str(size), "--tags", "true"]
        cli.run(["train-tokenizer", *sources, *learned])
    start = [f"--model.tokenizer={out / 'tokenizer'}"] + [f"--model.new_model={json.dumps(SIZES)}"] * is_small
    for stage, source in zip(STAGES, sources, strict=True):
        model, checkpoints = out / stage / "model", out / stage / "checkpoints"
        if not model.exists():
            words = ["fit", "--config", f"stages/{stage}", *options, *start, f"--data.source={source}"]
            words += [f"--{part}.dirpath={checkpoints}" for part in ("checkpoint", "autosave")]
            words += [f"--trainer.logger.init_args.save_dir={out}"]
            if is_small:
                words += [f"--data.validation_source={out / 'data' / stage}_validation.jsonl"]
            if (checkpoints / "last.ckpt").exists():
                words += ["--ckpt_path=last"]
            print(f"\n{stage}: dream-lightning {' '.join(words)}", flush=True)
            cli.run(words)
            export_checkpoint(checkpoints / "last.ckpt", model)
        start = [f"--model.pretrained={model}"]
    for stage in STAGES:
        for run in find_runs(out / stage):
            steps = sorted(run.curves.get("val/nll", {}).items())
            print(f"{stage:10}", "   ".join(f"step {step + 1:,}: val/nll {value:.3f}" for step, value in steps))
    print(f"a page of all stages: dream-lightning report {out}\ntalk to it: dream-lightning chat --model {model}")


if __name__ == "__main__":
    with cli.readable_errors():
        main()
