"""Upload a model to the Hugging Face hub: the official folder, its adapters as PEFT reads them, and a model card."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jsonargparse import ArgumentParser

from dream_lightning.errors import UserError
from dream_lightning.evaluation.compare import read_run
from dream_lightning.evaluation.pages import model_card
from dream_lightning.export import base_of, export_adapter, export_checkpoint
from dream_lightning.locate import find_model, read_rest_of

_LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token that may write"


def push_to_hub(parser: ArgumentParser, arguments: list[str]) -> None:
    """Upload a model, its adapters and a card to the Hugging Face hub."""
    parser.add_function_arguments(upload, as_positional=False)
    print(upload(**parser.parse_args(arguments)))


def upload(
    model: str,
    repo: str,
    *,
    evaluation: str | None = None,
    private: bool = False,
    adapter: bool = False,
    license: str | None = None,
    pretrained: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """Upload what `export` writes, and a card with scores, settings, data and license; returns its address.

    The model is in bfloat16. If it was trained with adapters, these are in `adapter/`, too, for PEFT.

    Args:
        model: folder of a run or in the official format, checkpoint, hub id, or folder of adapters from PEFT.
        repo: owner/name; it is created unless it exists.
        evaluation: a folder of `evaluate`; its scores and its card.json are part of the model card.
        private: nobody else sees the repository. An existing public one is refused.
        adapter: upload the adapters alone, without the merged weights.
        license: identifier of the hub, such as apache-2.0, the default for what was trained from a Dream-org model.
        pretrained: what the training started from; by default as the checkpoint says.
        tokenizer: folder, hub id or `bytes`. Default: the model's own.

    Raises:
        UserError: no token; the hub refuses or cannot be reached; as `export_checkpoint` and `export_adapter`.
    """
    if get_token() is None:
        raise UserError(f"there is no token of the Hugging Face hub here: {_LOGIN}")
    found, api = find_model(model), HfApi(library_name="dream_lightning")
    base = pretrained or (found.name if found.kind == "hub" else base_of(model))
    rest = read_rest_of(found.path) if found.kind == "checkpoint" else {}
    adapted = found.kind == "adapters" or "lora" in rest
    if adapter and _hub_id(base) is None:
        raise UserError(f"the adapters' base is {base}, which nobody else can load: set pretrained to its hub id")
    card = read_run(evaluation)[0] if evaluation else {"tasks": {}}
    card["model"] = card.get("model", {}) | {"name": repo}
    with _hub(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"{repo} exists and is public: make it private on the hub, or name another one")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        if adapter:
            export_adapter(model, folder, pretrained=pretrained)
        else:
            export_checkpoint(model, folder, pretrained=pretrained, tokenizer=tokenizer, dtype="bfloat16")
            if adapted and _hub_id(base):
                export_adapter(model, folder / "adapter", pretrained=pretrained)
        text = _card(card, repo, base, rest, license, alone=adapter)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if evaluation:
            (folder / "card.json").write_text(json.dumps(_public(card), indent=2) + "\n", encoding="utf-8")
        with _hub(repo):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with dream_lightning")
    return str(url)


def _card(
    card: dict[str, Any], repo: str, base: str | None, rest: dict[str, Any], license: str | None, *, alone: bool
) -> str:
    """README.md: metadata that the hub reads, how to use the model, scores, and what it was trained with."""
    settings, start = rest.get("settings", {}), _hub_id(base)
    source = settings.get("data.source") or ()
    data = [name for name in ([source] if isinstance(source, str) else source) if _hub_id(name)]
    about = {"base_model": start and start.partition("@")[0], "datasets": data or None}
    about["license"] = license or ("apache-2.0" if start and start.startswith("Dream-org/") else None)
    if start:
        about["base_model_relation"] = "adapter" if alone else "finetune"
    use = f'PeftModel.from_pretrained(base, "{repo}")' if alone else f"dream-lightning chat --model {repo}"
    sections = [f"A Dream, a masked diffusion language model{f', trained from {start}' if start else ''}.\n"]
    sections += [f"```{'python' if alone else 'bash'}\n{use}\n```\n"]
    sections += [f"License: {about['license'] or 'not stated; the one of the base applies'}.\n"]
    if settings:
        rows = [f"| {name} | `{json.dumps(_public(value))}` |" for name, value in settings.items() if value is not None]
        sampling = json.dumps(_public(rest.get("hyper_parameters", {}).get("sampling") or {}))
        sections += ["## Training\n", "| setting | value |", "|---|---|", *rows, f"\nSampling: `{sampling}`\n"]
    return model_card(card, sections=sections, **about)


def _hub_id(name: str | None) -> str | None:
    """The name, if it is one that others can load: `owner/name` or `owner/name@revision`, and no folder here."""
    known = name and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not Path(name).exists()
    return name if known else None


def _public(value: Any) -> Any:
    """The same without the folders of this machine."""
    if isinstance(value, dict):
        return {_public(name): _public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    local = path.is_absolute() or value.startswith(("~", ".")) or (path.name != value and os.path.exists(value))
    return path.name if local else value


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Turn what the hub answers, and errors of the network, into one UserError."""
    try:
        yield
    except (*HfHubHTTPError.__bases__, HFValidationError) as error:  # OSError, and those of its library for HTTP
        why = " ".join(str(error).split())[:300]
        raise UserError(f"the hub did not take {repo} ({type(error).__name__}: {why}): {_LOGIN} to it") from error
