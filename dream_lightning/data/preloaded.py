"""Documents of one length as a single tensor on the model's device: a batch of a small model is made in a few kernels.

For a model of 15 M parameters, collating 1,024 documents on the host takes longer than training on them.
"""

from collections.abc import Iterator

import numpy as np
import torch

from dream_lightning.batch import Batch, send
from dream_lightning.data.document_cache import TokenizedSet
from dream_lightning.data.epoch_order import ResumableLoader
from dream_lightning.errors import UserError

_SHARE = 0.25  # of a GPU's free memory that the documents may take


class PreloadedSet:
    """All documents of a set as tensors: `ids` [N, L] int32, `prompt_length` [N].

    `weights` and `trajectory` are [N, L], or None if the documents have none.

    Raises UserError if their lengths differ, or if they take more than a quarter of the GPU's free memory.
    """

    def __init__(self, documents: TokenizedSet, device: torch.device) -> None:
        shortest, longest = int(documents.lengths.min()), int(documents.lengths.max())
        if shortest < longest:
            raise UserError(
                f"data.preload needs documents of one length, these have {shortest:,} to {longest:,} tokens: set "
                f"data.max_length and data.eos_fill_to both to {longest}, or data.preload to false"
            )
        arrays = [documents.arrays[name].reshape(-1, longest) for name in ("ids", "weights", "trajectory")]
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
        if (needed := sum(array.nbytes for array in arrays)) > _SHARE * free:
            raise UserError(
                f"data.preload needs {needed / 2**30:.1f} GiB on the GPU, of which {free / 2**30:.1f} GiB are free and "
                f"a quarter may be taken: set it to false"
            )
        self.ids, self.weights, self.trajectory = (
            torch.from_numpy(np.array(array)).to(device) if len(array) else None for array in arrays
        )
        self.prompt_length = torch.from_numpy(documents.prompt_length[documents.kept]).to(device)

    def batch(self, documents: np.ndarray, order: np.ndarray, epoch: int, counted: np.ndarray) -> Batch:
        """The batch that `collate` makes of these documents [B], with their numbers in the epoch's order."""
        device, length = self.ids.device, self.ids.shape[1]
        index, number, is_counted = send(torch.from_numpy(np.stack([documents, order, counted])), device)
        shape, column = (len(documents), length), torch.arange(length, device=device)
        return Batch(
            input_ids=self.ids[index].long(),
            maskable=(column >= self.prompt_length[index, None]) & (is_counted[:, None] > 0),
            position_ids=column.expand(shape).contiguous(),
            document_ids=number[:, None].expand(shape).contiguous(),
            sample_ids=index[:, None].expand(shape).contiguous(),
            epochs=torch.full(shape, epoch, device=device),
            extra_weight=torch.ones(shape, device=device) if self.weights is None else self.weights[index],
            trajectory=None if self.trajectory is None else self.trajectory[index],
        )


class PreloadedLoader(ResumableLoader):
    """The batches of a ResumableLoader, made of a PreloadedSet, which is its data set."""

    dataset: PreloadedSet

    def _batches(self) -> Iterator[Batch]:
        sampler = self.sampler
        row_at, order = sampler.shuffled()
        for places, counted in sampler.micro_batches(sampler.places()):
            documents = row_at[places]  # one a row
            yield self.dataset.batch(documents, order[documents], sampler.epoch, np.arange(len(places)) < counted)
