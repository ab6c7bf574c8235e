"""One HTML page in which you step through the denoising of an answer, without any other file or the network.

python scripts/show_denoising.py --model Dream-org/Dream-v0-Instruct-7B --question "Why is the sky blue?" --out sky.html
"""

from dataclasses import fields
from pathlib import Path

import torch
from jsonargparse import auto_cli

from dream_lightning import SamplingParams, diffusion_generate
from dream_lightning.batch import Example, Message
from dream_lightning.data.prompt_format import Style, encode_prompt
from dream_lightning.readable_errors import readable_errors
from dream_lightning.viewer import denoising_page, open_model


def main(
    model: str,
    question: str,
    out: str = "denoising.html",
    tokenizer: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    style: Style = "chat",
    system_prompt: str | None = None,
    params: SamplingParams = SamplingParams(forbid_mask=True),  # noqa: B008 (frozen)
) -> None:
    """Answer a question and write the page.

    Args:
        model: folder in the official format, hub id, or checkpoint (.ckpt) of training.
        question: to answer.
        out: the page.
        tokenizer: folder, hub id or bytes; by default the model's own.
        pretrained: what the training of a checkpoint started from.
        device: cpu, cuda, …; auto takes a GPU if there is one.
        style: chat or plain.
        system_prompt: replaces the template's.
        params: how the answer is sampled.
    """
    network, words = open_model(model, tokenizer=tokenizer, pretrained=pretrained, device=device)
    example = Example("shown", (Message(role="user", content=question),), None, "", None, "the question")
    prompt = torch.tensor(encode_prompt(example, words, style=style, system_prompt=system_prompt))
    output = diffusion_generate(network, prompt[None].to(network.device), params=params, return_history=True)
    usual = SamplingParams()
    changed = {
        f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != getattr(usual, f.name)
    }
    notes = {"model": Path(model).name, "alg": params.alg, "steps": params.steps, **changed}
    Path(out).write_text(denoising_page(output, prompt, words, title=question, notes=notes), encoding="utf-8")
    print(f"{Path(out).resolve()}: {params.steps} steps, {output.sequences.shape[1] - len(prompt)} new tokens")


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
