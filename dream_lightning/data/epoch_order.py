"""Which documents come when: the epoch's order, cut into rows and over ranks."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from dream_lightning.batch import SampleKey

Row = tuple[SampleKey, ...]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class RowSampler(DistributedSampler):
    """Yields this rank's rows of draws.

    The order is a function of (seed, epoch). Micro-batch j of rank r among W takes rows (j·W + r)·b … of it, so an
    optimiser step covers the same rows however it is cut into micro-batches and ranks. Where the last rows do not go
    round evenly, the ranks without one get a copy that does not count, so that all make the same number of forwards.

    A torch DistributedSampler in name, so that Lightning leaves it in place.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Args: `rows`: the documents of every row; `repeats`: draws of each row in an unshuffled pass."""
        self.rows = [tuple(row) for row in rows]
        self.batch_size, self.seed, self.shuffle, self.repeats = batch_size, seed, shuffle, repeats
        self.rank, self.num_replicas = rank, world_size
        self.epoch = 0
        self.start_row = 0  # of the epoch, over all ranks: where this pass begins

    @property
    def block(self) -> int:
        """Rows of one micro-batch over all ranks."""
        return self.batch_size * self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) * self.repeats // self.num_replicas)

    def __iter__(self) -> Iterator[Row]:
        rows = self._rows_in_order()
        uncounted = [tuple(SampleKey(d.epoch, d.order, d.index, counted=False) for d in row) for row in rows[:1]]
        start = min(self.start_row, len(rows))
        rows += uncounted * ((start - len(rows)) % self.num_replicas)
        full = start + (len(rows) - start) // self.block * self.block
        for first in range(start + self.rank * self.batch_size, full, self.block):
            yield from rows[first : first + self.batch_size]
        share = (len(rows) - full) // self.num_replicas
        yield from rows[full + self.rank * share : full + (self.rank + 1) * share]

    def _rows_in_order(self) -> list[Row]:
        documents = sum(map(len, self.rows))
        if not self.shuffle:  # the same noise at every pass: epochs −1, −2, …, whose document_ids are one sequence
            return [
                tuple(SampleKey(-1 - repeat, document * self.repeats + repeat, document) for document in row)
                for row in self.rows
                for repeat in range(self.repeats)
            ]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # A document's place comes from a permutation of documents, so that packing does not change its noise.
        document_ids = torch.randperm(documents, generator=generator).tolist()
        # Rows come so that the t of their first, longest documents is spread as evenly over any few of them as that
        # of consecutive places: the k-th row has the t of the rank that the k-th place's has.
        by_t = sorted(self.rows, key=lambda row: _turn(document_ids[row[0]]))
        by_turn = sorted(range(len(self.rows)), key=_turn)
        ordered = [row for _, row in sorted(zip(by_turn, by_t, strict=True))]
        return [tuple(SampleKey(self.epoch, document_ids[document], document) for document in row) for row in ordered]


def _turn(place: int) -> float:
    """Where a place's t lies, but for the epoch's offset: see `diffusion.schedule.stratified_t`."""
    return place * _GOLDEN_RATIO % 1


class ResumableLoader(DataLoader):
    """A DataLoader that goes on in the middle of an epoch after Lightning restored its state.

    The sampler's order is a pure function of the epoch, so two numbers say where it stands; two more, whose order it
    was. Rows are counted over all ranks, so that another number of ranks, or another batch size, goes on at the same.
    """

    rows_used = 0
    waited = 0.0  # seconds in which nothing but the next batch could go on; `callbacks.Throughput` reads it
    resume_at: tuple[int, int] | None = None  # epoch, rows already used

    def __iter__(self) -> Iterator[Any]:
        # A generator: what follows runs at the first batch, after Lightning has set the sampler's epoch.
        epoch, used = self.resume_at or (None, 0)
        self.resume_at = None
        self.rows_used = used if epoch == self.sampler.epoch else 0
        self.sampler.start_row = self.rows_used
        asked = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - asked
            self.rows_used += self.sampler.block
            yield batch
            asked = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        """Saved by Lightning into every checkpoint."""
        return {"epoch": self.sampler.epoch, "rows": self.rows_used, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restored by Lightning before the first batch.

        Warns:
            The rows or their order are others than those of the checkpoint.
        """
        self.resume_at = (state["epoch"], state["rows"])
        ours = self._order()
        if 0 < state["rows"] < state.get("of", 0) and any(state[name] != ours[name] for name in ours):
            rank_zero_warn(
                f"the checkpoint was saved {state['rows']:,} rows into an epoch of {state['of']:,} (data.seed "
                f"{state['seed']}), and an epoch now has {ours['of']:,} (data.seed {ours['seed']}): in what is left of "
                "it some documents come again and others never"
            )

    def _order(self) -> dict[str, int]:
        return {"of": len(self.sampler.rows), "seed": self.sampler.seed}
