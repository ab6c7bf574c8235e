"""The order of documents in an epoch, cut into rows and distributed over ranks; the order of questions by length."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from dream_lightning.batch import SampleKey

KeyRow = tuple[SampleKey, ...]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class RowSampler(DistributedSampler):
    """Yields this rank's rows of sample keys.

    The order is a function of (seed, epoch). Micro-batch j of rank r among W takes rows (j·W + r)·b … of it, so an
    optimizer step has the same rows for any number of micro-batches and ranks. If the last rows cannot be distributed
    evenly, the remaining ranks get copies that are not counted, so that all ranks make the same number of forwards.
    `rows` has the documents of every row, `repeats` the uses of each row in an unshuffled pass. With the documents'
    `lengths`, an epoch goes from short to long documents instead of being shuffled; rows go by their first document.

    It subclasses DistributedSampler so that Lightning does not replace it.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows = [tuple(row) for row in rows]
        self.batch_size, self.seed, self.shuffle, self.repeats = batch_size, seed, shuffle, repeats
        self.lengths, self.rank, self.num_replicas = lengths, rank, world_size
        self.block = batch_size * world_size  # rows of one micro-batch over all ranks
        self.epoch = 0  # Lightning calls `set_epoch`
        self.start_row = 0  # of the epoch, over all ranks: where this pass begins

    def __len__(self) -> int:
        return -(-len(self.rows) * self.repeats // self.num_replicas)

    def __iter__(self) -> Iterator[KeyRow]:
        rows = self._rows_in_order()
        uncounted = [tuple(replace(key, counted=False) for key in row) for row in rows[:1]]
        start = min(self.start_row, len(rows))
        rows += uncounted * ((start - len(rows)) % self.num_replicas)
        full = start + (len(rows) - start) // self.block * self.block
        for first in range(start + self.rank * self.batch_size, full, self.block):
            yield from rows[first : first + self.batch_size]
        share = (len(rows) - full) // self.num_replicas
        yield from rows[full + self.rank * share : full + (self.rank + 1) * share]

    def _rows_in_order(self) -> list[KeyRow]:
        if not self.shuffle:  # the same noise at every pass: epochs −1, −2, …, whose orders are one sequence
            return [
                tuple(SampleKey(-1 - repeat, document * self.repeats + repeat, document) for document in row)
                for row in self.rows
                for repeat in range(self.repeats)
            ]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # The order of documents is a permutation of documents, not of rows: packing does not change their noise.
        order = torch.randperm(sum(map(len, self.rows)), generator=generator).tolist()
        if self.lengths is not None:  # documents of one length keep the shuffled order
            by_length = sorted(range(len(order)), key=lambda document: (self.lengths[document], order[document]))
            order = sorted(range(len(order)), key=by_length.__getitem__)  # the inverse permutation
            ordered = sorted(self.rows, key=lambda row: order[row[0]])
        else:
            # Consecutive rows spread t of their first, longest documents evenly: the row with the j-th smallest t goes
            # where the j-th smallest t of 0, 1, 2, … is.
            by_t = sorted(self.rows, key=lambda row: _t(order[row[0]]))
            positions = sorted(range(len(self.rows)), key=_t)
            ordered = [row for _, row in sorted(zip(positions, by_t, strict=True))]
        return [tuple(SampleKey(self.epoch, order[document], document) for document in row) for row in ordered]


def _t(order: int) -> float:  # without the epoch's offset: see `diffusion.schedule.stratified_t`
    return order * _GOLDEN_RATIO % 1


class ResumableLoader(DataLoader):
    """A DataLoader that resumes in the middle of an epoch after Lightning restored its state.

    Rows are counted over all ranks: a run resumes at the same row with another number of ranks or batch size.
    """

    rows_used = 0
    waited = 0.0  # seconds that the training loop waited for batches; `training.Throughput` reads it
    resume_at: tuple[int | None, int] = (None, 0)  # epoch, rows already used

    def __iter__(self) -> Iterator[Any]:
        # A generator: this runs at the first batch, after Lightning has set the sampler's epoch.
        epoch, used = self.resume_at
        self.resume_at = (None, 0)
        self.rows_used = self.sampler.start_row = used if epoch == self.sampler.epoch else 0
        asked = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - asked
            self.rows_used += self.sampler.block
            yield batch
            asked = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        order = {"rows_per_epoch": len(self.sampler.rows), "seed": self.sampler.seed}
        return {"epoch": self.sampler.epoch, "rows": self.rows_used, **order}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume there at the first batch; warn if the rows or their order differ from the checkpoint's."""
        self.resume_at = (state["epoch"], state["rows"])
        now, rows, seed = self.state_dict(), state["rows_per_epoch"], state["seed"]
        if 0 < state["rows"] < rows and (now["rows_per_epoch"], now["seed"]) != (rows, seed):
            rank_zero_warn(
                f"the checkpoint's epoch has {rows:,} rows (data.seed {seed}), this run's {now['rows_per_epoch']:,} "
                f"(data.seed {now['seed']}): the rest of this epoch repeats some documents and omits others"
            )


def bucket_by_length(numbers: Sequence[int], lengths: Sequence[int], *, window: int) -> list[int]:
    """Sort by length, longest first, within consecutive windows: little padding, and first questions come first."""
    length = dict(zip(numbers, lengths, strict=True))
    windows = (numbers[start : start + window] for start in range(0, len(numbers), window))
    return [number for part in windows for number in sorted(part, key=lambda n: -length[n])]
