"""Records → chats → token ids → batches."""

from dream_lightning.data.datamodule import S1KDataModule
from dream_lightning.data.document_cache import tokenize
from dream_lightning.data.schemas import read_examples

__all__ = ["S1KDataModule", "read_examples", "tokenize"]
