"""Records → chats → token ids → batches."""

from dream_lightning.data.datamodule import S1KDataModule
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.tokenization import tokenize

__all__ = ["S1KDataModule", "read_examples", "tokenize"]
