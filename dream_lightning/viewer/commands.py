"""The commands of `dream-lightning` that load a model or data to look at them, or to export it."""

import argparse
import json
from collections.abc import Callable, Set
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example, Message
from dream_lightning.data import read_examples, tokenize
from dream_lightning.data.prompt_format import Style, encode_prompt
from dream_lightning.data.report import report
from dream_lightning.data.tokenization import TrainOn, encode, encode_documents
from dream_lightning.diffusion import corrupt
from dream_lightning.errors import UserError, check_range, reading, visible
from dream_lightning.export import AUTHORS_CODE, export_adapter, export_checkpoint, model_from_checkpoint
from dream_lightning.locate import trained
from dream_lightning.model import DreamModel, check_tokenizer, load_tokenizer
from dream_lightning.sampling import SamplingParams, diffusion_generate
from dream_lightning.viewer.conversation import Conversation
from dream_lightning.viewer.page import denoising_page
from dream_lightning.viewer.terminal import LEGEND, SINGLE, Chat, render_row, render_tokens


def open_model(
    model: str, *, tokenizer: str | None = None, pretrained: str | None = None, device: str = "auto"
) -> tuple[DreamModel, PreTrainedTokenizerBase]:
    """The network in eval mode, bfloat16 on a GPU and in its stored dtype on a CPU, and its tokenizer.

    Args:
        model: folder of a run or in the official format, checkpoint, hub id, or folder of adapters from PEFT.
        tokenizer: folder, hub id or `bytes`. Default: the model's own.
        pretrained: what the training of a checkpoint or of adapters started from; by default as it says.
        device: cpu, cuda, cuda:1, …; auto uses a GPU if there is one.

    Raises:
        UserError: the file does not exist or is no checkpoint; no tokenizer; the tokenizer does not fit the model.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).tolist()  # a meta tensor has no numbers
    except (RuntimeError, AssertionError) as error:  # an assertion: torch without CUDA
        raise UserError(f"device is {device} ({str(error).splitlines()[0]}): set cpu, cuda, cuda:1, …") from error
    network, source = model_from_checkpoint(model, pretrained=pretrained)
    if (tokenizer or source) is None:
        raise UserError(f"{model} holds no tokenizer: set tokenizer, or pretrained to what training started from")
    tokenizer = load_tokenizer(tokenizer or source)
    check_tokenizer(tokenizer, network.config)
    return network.to(device, torch.bfloat16 if device.startswith("cuda") else None).eval(), tokenizer


_GIVEN = {"example", "tokenizer"}  # arguments of `encode` that are no options


def parse(
    parser: ArgumentParser, arguments: list[str], *functions: Callable[..., Any], skip: Set[str] = frozenset()
) -> list[Any]:
    """The parsed options, then those that are the keyword arguments of each function; of the last without `skip`.

    The defaults of sampling and prompts are those that the model was trained with, if it is a checkpoint.
    """
    names = [
        parser.add_function_arguments(f, as_positional=False, skip=set(skip) if f is functions[-1] else set())
        for f in functions
    ]
    given = parser.parse_args(arguments)
    if open_model in functions and (how := trained(given.model)).sampling:
        groups = [name for name, value in vars(given).items() if hasattr(value, "max_new_tokens")]
        defaults = {f"{group}.{name}": value for group in groups for name, value in how.sampling.items()}
        prompting = {"style": how.style, "system_prompt": how.system_prompt}
        parser.set_defaults(defaults | {name: value for name, value in prompting.items() if name in given})
        given = parser.parse_args(arguments)
    options = parser.instantiate(given)
    return [options, *({name: options[name] for name in group} for group in names)]


def _parse_sampling(parser: ArgumentParser, arguments: list[str]) -> tuple[Any, DreamModel, PreTrainedTokenizerBase]:
    """The parsed options, and the model and the tokenizer that they name."""
    parser.add_argument("--system_prompt", type=str | None, default=None, help="replaces the one of the chat template")
    parser.add_argument("--params", type=SamplingParams, default=SamplingParams(forbid_mask=True), help="sampling")
    options, opened = parse(parser, arguments, open_model)
    return options, *open_model(**opened)


def chat(parser: ArgumentParser, arguments: list[str]) -> None:
    """Talk to a model in the terminal."""
    parser.add_argument(
        *("--history",),
        type=bool | None,
        default=None,
        help="give the model the earlier messages, too; by default unless it was trained on single questions",
    )
    options, model, tokenizer = _parse_sampling(parser, arguments)
    how = trained(options.model)
    history = how.history if options.history is None else options.history
    prompting = {"style": how.style, "system_prompt": options.system_prompt, "history": history}
    note = "" if history or options.history is not None else SINGLE
    Chat(Conversation(model, tokenizer, options.params, **prompting), note=note).run()


def show_denoising(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write a page that steps through the denoising of an answer."""
    parser.add_argument("--question", type=str, required=True, help="the question to answer")
    parser.add_argument("--out", type=str, default="denoising.html", help="the page")
    parser.add_argument(
        "--style", type=Style | None, default=None, help="style of the prompt; by default as in training"
    )
    options, model, tokenizer = _parse_sampling(parser, arguments)
    prompting = {"style": options.style or "chat", "system_prompt": options.system_prompt}
    params, question, out = options.params, options.question, Path(options.out)
    example = Example("shown", (Message(role="user", content=question),), None, "", None, "the question")
    prompt = torch.tensor(encode_prompt(example, tokenizer, **prompting))
    output = diffusion_generate(model, prompt[None].to(model.device), params=params, return_history=True)
    default = asdict(SamplingParams())
    changed = {name: value for name, value in asdict(params).items() if value != default[name]}
    notes = {"model": Path(options.model).name, "alg": params.alg, "steps": params.steps, **changed}
    out.write_text(denoising_page(output, prompt, tokenizer, title=question, notes=notes), encoding="utf-8")
    print(f"{out.resolve()}: {params.steps} steps, {output.sequences.shape[1] - len(prompt)} new tokens")


def _parse_data(parser: ArgumentParser, arguments: list[str]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The parsed options, and those of `read_examples` and of `encode_documents`; a config of `fit` sets defaults."""
    parser.add_argument("--tokenizer", type=str, required=True, help="folder or hub id, or bytes")
    parser.add_argument("--train_on", type=TrainOn, default="last", help="the last response of a chat, or all")
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    configs.add_argument("-c", "--config", action="append", default=[])
    known, given = configs.parse_known_args(arguments)
    own = {*signature(read_examples).parameters, *signature(encode).parameters, "train_on"}
    words = []
    for file in known.config:
        with reading(Path(file), "a config of fit, with the sections data and model", "name one"):
            config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            model, values = config.get("model") or {}, dict(config["data"])
        if isinstance(source := values.get("source"), dict):
            values["source"] = next(iter(source))
        values = {name: value for name, value in values.items() if name in own}
        values["tokenizer"] = model.get("tokenizer") or model.get("pretrained")
        words += [f"--{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in values.items() if v is not None]
    options, reads, encoding = parse(parser, words + given, read_examples, encode, skip=_GIVEN)
    return options, reads, encoding | {"train_on": options.train_on}


def data_report(parser: ArgumentParser, arguments: list[str]) -> None:
    """Lengths of a data set, and what a length limit does to it."""
    options, reads, encoding = _parse_data(parser, arguments)
    documents = tokenize(read_examples(**reads), load_tokenizer(options.tokenizer), **encoding)
    print(report(documents, max_length=options.max_length, overflow=options.overflow))


def show(parser: ArgumentParser, arguments: list[str]) -> None:
    """Print one row as the model sees it: what is trained and masked."""
    parser.add_argument("--row", type=int, default=1, help="number of the record, from 1")
    parser.add_argument("--t", type=float, default=0.5, help="probability of a mask in the response, 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mask")
    parser.add_argument("--tokens", type=bool, default=False, help="one line a token: id, loss weight, text")
    options, reads, encoding = _parse_data(parser, arguments)
    check_range("t", options.t, least=0, most=1)
    check_range("seed", options.seed, least=0)
    examples, row, tokenizer = read_examples(**reads), options.row, load_tokenizer(options.tokenizer)
    check_range(f"row of {options.source}", row, least=1, most=len(examples))
    generator, console = torch.Generator().manual_seed(options.seed), Console(highlight=False)
    console.print(Text(visible(f"{examples[row - 1].origin} · {examples[row - 1].id} · ")) + LEGEND)
    for document, *_ in encode_documents(examples[row - 1], tokenizer, **encoding):
        if document is None:
            raise UserError(f"row {row} is longer than max_length {options.max_length} and dropped: raise max_length")
        weights = [None] * len(document.prompt_ids) + document.response_weight
        ids = document.prompt_ids + document.response_ids
        x_0 = torch.tensor([ids])  # [1, L]
        maskable = torch.tensor([[weight is not None for weight in weights]])  # [1, L]
        t = torch.tensor([options.t])
        noised = corrupt(x_0, maskable, mask_token_id=tokenizer.mask_token_id, t=t, generator=generator)
        flags = maskable[0].tolist(), noised.is_masked[0].tolist()
        if options.tokens:
            console.print(render_tokens(ids, weights, noised.is_masked[0].tolist(), tokenizer), soft_wrap=True)
        else:
            console.print(render_row(ids, *flags, tokenizer), soft_wrap=True)


def export(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write a checkpoint as a model folder, or its adapters."""
    parser.add_argument(
        *("--checkpoint", "--model"), type=str, required=True, help="a run, a checkpoint, adapters or a model folder"
    )
    parser.add_argument("--folder", type=str, required=True, help="the folder to write; new or empty")
    parser.add_argument("--pretrained", type=str | None, default=None, help="what training started from")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="folder, hub id or bytes; of pretrained")
    parser.add_argument("--dtype", type=Literal["keep", "bfloat16"], default="bfloat16", help="dtype of the weights")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="largest size of one file")
    parser.add_argument("--adapter", type=bool, default=False, help="write the adapters alone, for PEFT")
    o = parser.parse_args(arguments)
    if o.adapter:
        written = export_adapter(o.checkpoint, o.folder, pretrained=o.pretrained)
    else:
        options = {name: o[name] for name in ("pretrained", "tokenizer", "dtype", "max_shard_size")}
        written = export_checkpoint(o.checkpoint, o.folder, **options)
    print(f"wrote {written}: {', '.join(sorted(file.name for file in written.iterdir()))}")
    missing = [name for name in AUTHORS_CODE if not (written / name).exists()]
    if missing and not o.adapter:
        print(f"to load it with trust_remote_code, copy {', '.join(missing)} there from the official model folder")
