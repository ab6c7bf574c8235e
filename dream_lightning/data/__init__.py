"""Records → examples → documents of token ids → batches.

`records` and `sources` read rows, `schemas` makes examples of them, `splits` chooses among these, `prompt_format` and
`tokenization` give ids, in several `processes`, `document_cache` keeps them, `packing` and `epoch_order` make batches
and their order.

Training is fed in one of three ways, of which `S1KDataModule.train_dataloader` picks one: documents in memory
(`epoch_order`), documents on the model's device (`preloaded`), or a stream of shards (`streaming`).
"""

from dream_lightning.data.datamodule import S1KDataModule
from dream_lightning.data.document_cache import tokenize
from dream_lightning.data.schemas import read_examples

__all__ = ["S1KDataModule", "read_examples", "tokenize"]
