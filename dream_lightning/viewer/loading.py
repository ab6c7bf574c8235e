"""A model to talk to, from wherever it lies."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError
from dream_lightning.export import base_of, model_from_checkpoint
from dream_lightning.model import DreamModel, load_tokenizer
from dream_lightning.model_factory import check_tokenizer


def open_model(
    model: str, *, tokenizer: str | None = None, pretrained: str | None = None, device: str = "auto"
) -> tuple[DreamModel, PreTrainedTokenizerBase]:
    """The network, ready to answer, and its tokenizer. On a GPU it computes in bfloat16, on a CPU as it is stored.

    Args:
        model: a folder in the official format, a hub id, or a checkpoint (.ckpt) of training.
        tokenizer: a folder, hub id or `bytes`; None takes the folder's own.
        pretrained: what the training of a checkpoint started from; a checkpoint of adapters knows it.
        device: cpu, cuda, cuda:1, …; auto takes a GPU if there is one.

    Raises:
        UserError: nothing there; a checkpoint without a tokenizer; they do not belong together.
    """
    path = Path(model).expanduser()
    if path.is_file() or path.suffix == ".ckpt":
        if not path.exists():
            raise UserError(f"{path} does not exist: name a checkpoint, a folder in the official format or a hub id")
        network = model_from_checkpoint(path, pretrained=pretrained)
        pretrained = pretrained or base_of(path)
        if (tokenizer or pretrained) is None:
            raise UserError(
                f"{path} holds no tokenizer: set tokenizer to the one of its training, such as bytes for "
                "configs/tiny.yaml, or pretrained to the folder or hub id that training started from"
            )
    else:
        network = DreamModel.from_pretrained(model)
    words = load_tokenizer(tokenizer or pretrained or model)
    check_tokenizer(words, network.config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device, torch.bfloat16 if device.startswith("cuda") else None).eval(), words
