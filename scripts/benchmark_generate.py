"""Time of a denoising step at the shapes of a checkpoint, beside a plain loop that computes all logits.

python scripts/benchmark_generate.py --pretrained /tmp/dream7b --rows 8
"""

import time

import torch
from jsonargparse import auto_cli

from dream_lightning import DreamModel, SamplingParams, diffusion_generate
from dream_lightning.diffusion.denoiser import align


@torch.no_grad()
def plain_loop(model: DreamModel, prompt: torch.Tensor, new_tokens: int, steps: int) -> None:
    """Masks filled by entropy over the logits of every position: the sampler without its savings."""
    mask = model.config.mask_token_id
    x = torch.nn.functional.pad(prompt, (0, new_tokens), value=mask)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        where = x == mask
        probs = align(model(x).logits)[where].softmax(-1)
        confidence = torch.full(x.shape, -torch.inf, device=x.device, dtype=probs.dtype)
        confidence[where] = (probs * (probs + 1e-10).log()).sum(-1)
        left = where.sum() / len(x)
        count = int(left * (1 - times[step + 1] / times[step])) if step < steps - 1 else int(left)
        filled = torch.full_like(x, mask).masked_scatter_(where, probs.argmax(-1))
        chosen = confidence.topk(count).indices
        x.scatter_(1, chosen, filled.gather(1, chosen))


def main(pretrained: str, rows: int = 1, prompt: int = 256, new_tokens: int = 256, steps: int = 32) -> None:
    """Print milliseconds a step of both.

    Args:
        pretrained: an official-format folder.
        rows: prompts at once.
        prompt: tokens of each.
        new_tokens: to generate.
        steps: denoising steps.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DreamModel.from_pretrained(pretrained).to(device).eval()
    ids = torch.randint(0, 1000, (rows, prompt), device=device)
    params = SamplingParams(max_new_tokens=new_tokens, steps=steps, alg="entropy", forbid_mask=True)
    ours = milliseconds(lambda: diffusion_generate(model, ids, params=params), steps)
    plain = milliseconds(lambda: plain_loop(model, ids, new_tokens, steps), steps)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"{name} · {model.dtype} {rows} × {prompt}+{new_tokens}, {steps} steps: {ours:.1f} ms a step, plain {plain:.1f}"
    )


def milliseconds(work, steps: int) -> float:
    """The second of two runs."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / steps


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
