"""Questions per second of `evaluate` at the shapes of a checkpoint, beside the authors' loop.

python scripts/random_checkpoint.py --folder /tmp/dream7b --tokenizer bytes --mask_token_id 260 --eos_token_id 256
python scripts/benchmark_evaluate.py --pretrained /tmp/dream7b
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from benchmark_generate import authors_loop
from jsonargparse import auto_cli

from dream_lightning import DreamModel, SamplingParams, load_tokenizer
from dream_lightning.cli import readable_errors
from dream_lightning.evaluation.evaluate import evaluate


def main(pretrained: str, sizes: list[int] = [1, 32, 128], new_tokens: int = 256, authors_steps: int = 16) -> None:  # noqa: B006
    """Print a table; the second of two runs counts, and moving the model to the GPU is in neither.

    Args:
        pretrained: an official-format folder; weights may be random.
        sizes: numbers of questions, answered in one batch.
        new_tokens: of an answer.
        authors_steps: of the authors' loop that are measured, of one step a token.
    """
    gpu = torch.cuda.is_available()
    model = DreamModel.from_pretrained(pretrained).to("cuda" if gpu else "cpu").eval()
    tokenizer = load_tokenizer(pretrained)
    options = {"max_new_tokens": new_tokens, "steps": new_tokens, "forbid_mask": True, "compile": gpu}
    sampling = SamplingParams(block_length=min(32, new_tokens), cache="dual", tokens_per_step=2, **options)
    print(
        "| questions at once | evaluate, questions/s | tokens/s | authors' loop, questions/s |\n|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": f"What is {n} plus {n}? Explain it.", "answer": str(2 * n)} for n in range(max(sizes))]
        source = Path(folder, "sums.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for size in sizes:
            for repeat in range(2):
                out, start = Path(folder, f"{size}-{repeat}"), time.perf_counter()
                asked = {"out": out, "sampling": sampling, "questions": size, "batch_size": size}
                evaluate(model, tokenizer, [str(source)], name="benchmark", **asked)
                seconds = time.perf_counter() - start
            speed = json.loads((out / "timing.json").read_text())["tasks"]["sums"]["tokens_per_second"]
            ids = torch.randint(0, 100, (min(size, 32), 200), device=model.device)  # more rows do not fit
            for _ in range(2):
                start = time.perf_counter()
                for _ in authors_loop(model, ids, new_tokens, authors_steps):
                    pass
                if gpu:
                    torch.cuda.synchronize()
                theirs = (time.perf_counter() - start) * new_tokens / authors_steps
            print(f"| {size} | {size / seconds:.3g} | {speed:,.0f} | {len(ids) / theirs:.3g} |", flush=True)


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
