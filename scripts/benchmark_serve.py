"""Load test of `serve` with OpenAI's client, beside generation at the same batch in the same run.

python scripts/random_checkpoint.py --folder /tmp/dream7b --tokenizer bytes --mask_token_id 260 --eos_token_id 256
python scripts/benchmark_serve.py --pretrained /tmp/dream7b

Every client asks again as soon as it has its answer. Weights may be random: answers have all `new_tokens`. Each is
compared with that of `diffusion_generate` to its prompt alone: equal in float32 on a CPU. On a GPU rounding depends on
the shape of a batch, and an answer counts as mixed up if it is more like that to another prompt.
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

import openai
import torch
from benchmark_generate import Bench
from jsonargparse import auto_cli

from dream_lightning import DreamModel, SamplingParams, load_tokenizer
from dream_lightning.answering import answer_ids
from dream_lightning.cli import readable_errors
from dream_lightning.errors import UserError
from dream_lightning.kernels.cuda_graphs import CompiledDenoiser
from dream_lightning.sampling import denoising_steps


@contextmanager
def running_server(pretrained: str, tokenizer: str, max_batch_size: int, length: int, log: str) -> Iterator[str]:
    """The URL of a server in processes of its own, which end with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": pretrained, "tokenizer": tokenizer, "port": port, "max_batch_size": max_batch_size}
    options |= {"params.compile": torch.cuda.is_available(), "warm_up_length": length}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "dream_lightning", "serve", *words]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_healthy(url):
            if process.poll() is not None:
                raise UserError(f"the server has ended: see {log}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        return urlopen(f"{url}/health").status == 200
    except URLError:  # also of other statuses
        return False


async def load(
    url: str, prompts: list[list[int]], params: SamplingParams, clients: int, rounds: int
) -> tuple[float, list[tuple]]:
    """Seconds, and of every request: number of the prompt, answer or error, its tokens, seconds."""
    key = os.environ.get("DREAM_API_KEY", "none")
    sampling = {n: x for n, x in asdict(params).items() if n not in ("compile", "max_new_tokens", "seed")}
    options = {"max_tokens": params.max_new_tokens, "extra_body": {"sampling": sampling}}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=3600) as client:
        model = (await client.models.list()).data[0].id

        async def ask(number: int) -> tuple:
            began = time.perf_counter()
            try:
                answer = await client.completions.create(model=model, prompt=prompts[number], **options)
                result = answer.choices[0].text, answer.usage.completion_tokens
            except openai.APIError as error:
                result = error, 0
            return number, *result, time.perf_counter() - began

        async def ask_again(first: int) -> list[tuple]:
            return [await ask((first + i * clients) % len(prompts)) for i in range(rounds)]

        began = time.perf_counter()
        answers = await asyncio.gather(*map(ask_again, range(clients)))
    return time.perf_counter() - began, [answer for some in answers for answer in some]


def main(
    pretrained: str,
    clients: list[int] = [1, 8, 32, 128],  # noqa: B006
    rounds: int = 4,
    prompt: int = 256,
    new_tokens: int = 256,
    block: int = 32,
    tokens_per_step: int = 2,
    max_batch_size: int = 32,
    prompts: int = 16,
    url: str | None = None,
    log: str = "benchmark_serve.log",
) -> None:
    """Print a table; exit with status 1 if an answer is lost or mixed up, or on a CPU not equal.

    Args:
        pretrained: an official-format folder; weights may be random.
        clients: that ask at a time.
        rounds: requests of every client; one more before these is not measured.
        prompt: tokens of a prompt.
        new_tokens: of an answer.
        block: block_length.
        tokens_per_step: filled by every forward.
        max_batch_size: of the server.
        prompts: different ones.
        url: of a server that runs already, with this model and `max_batch_size`.
        log: what the server prints.
    """
    gpu = torch.cuda.is_available()
    steps = new_tokens // block * -(-block // tokens_per_step)
    params = SamplingParams(
        **{"max_new_tokens": new_tokens, "steps": steps, "block_length": block, "tokens_per_step": tokens_per_step},
        **{"cache": "dual", "forbid_mask": True, "min_new_tokens": new_tokens, "compile": gpu},
    )
    device = "cuda" if gpu else "cpu"
    model = DreamModel.from_pretrained(pretrained).to(device).eval()
    tokenizer, bench = load_tokenizer(pretrained), Bench(device, prompt, new_tokens, block)
    if not url:  # a text for every token, so that answers can be compared
        tokenizer.add_tokens([f" t{i}" for i in range(len(tokenizer), model.config.vocab_size)])
    fast, alone = CompiledDenoiser(model) if gpu else model, {}
    for rows in sorted({min(number, max_batch_size) for number in clients}):
        times, _ = bench.milliseconds(partial(denoising_steps, fast, bench.ids(rows), params=params))
        alone[rows] = 1000 * rows * new_tokens / sum(times)
        print(f"generation, {rows} rows: {alone[rows]:,.0f} tokens/s", flush=True)
    dice = torch.Generator().manual_seed(0)
    asked = torch.randint(0, 100, (prompts, prompt), generator=dice).tolist()
    texts = [tokenizer.decode(answer_ids(fast, [ids], params)[0], skip_special_tokens=True) for ids in asked]
    lines, failed = [], False
    with ExitStack() as stack:
        if not url:
            words = stack.enter_context(TemporaryDirectory())
            tokenizer.save_pretrained(words)
            url = stack.enter_context(running_server(pretrained, words, max_batch_size, prompt + new_tokens, log))
        for number in clients:
            asyncio.run(load(url, asked, params, number, 1))
            seconds, answers = asyncio.run(load(url, asked, params, number, rounds))
            lost = [text for _, text, _, _ in answers if not isinstance(text, str)]
            got = [(n, text) for n, text, _, _ in answers if isinstance(text, str)]
            equal = sum(text == texts[n] for n, text in got)
            mixed = sum(is_mixed_up(text, n, texts) for n, text in got)
            speed, rows = sum(tokens for *_, tokens, _ in answers) / seconds, min(number, max_batch_size)
            latency = statistics.quantiles([s for *_, s in answers] * 2, n=20, method="inclusive")
            lines.append(
                f"| {number} | {len(answers)} | {speed:,.0f} | {alone[rows]:,.0f} | {speed / alone[rows]:.0%} | "
                f"{latency[9]:.2f} | {latency[18]:.2f} | {len(lost)} | {equal} | {mixed} |"
            )
            failed |= bool(lost or mixed or (not gpu and equal < len(answers)))
            print(lines[-1], *lost[:1], flush=True)
    name = torch.cuda.get_device_name() if gpu else "CPU"
    print(
        f"\n{name} · torch {torch.__version__} · {prompt} + {new_tokens} tokens · batch of at most {max_batch_size}\n"
    )
    print("| clients | requests | tokens/s | generation, tokens/s | ratio | p50 s | p95 s | lost | equal | mixed up |")
    print("|" + "---:|" * 10, *lines, sep="\n")
    if failed:
        raise UserError("answers are lost, mixed up or, on a CPU, not equal to those of diffusion_generate")


def is_mixed_up(text: str, number: int, texts: list[str]) -> bool:
    """Whether a fifth more words are those of the answer to another prompt than of its own."""
    words = text.split()
    same = [sum(a == b for a, b in zip(words, other.split())) for other in texts]  # noqa: B905
    return max(same) > same[number] + len(words) / 5


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
