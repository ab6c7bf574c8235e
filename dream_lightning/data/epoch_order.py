"""The order of documents in an epoch, cut into rows and distributed over ranks; the order of questions by length."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dream_lightning.batch import SampleKey

T = TypeVar("T")
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
        self._first = np.array([row[0] for row in self.rows], np.int64)  # the longest document of each row
        self._documents = sum(map(len, self.rows))
        self.batch_size, self.seed, self.shuffle, self.repeats = batch_size, seed, shuffle, repeats
        self.lengths, self.rank, self.num_replicas = lengths, rank, world_size
        self.block = batch_size * world_size  # rows of one micro-batch over all ranks
        self.epoch = 0  # Lightning calls `set_epoch`
        self.read_ahead = False  # whether a batch is read while the one before it is trained on
        self.start_row = 0  # of the epoch, over all ranks: where this pass begins

    def identity(self) -> dict[str, Any]:
        """What must not change for a run to resume in the middle of an epoch."""
        return {"rows_per_epoch": len(self.rows), "seed": self.seed}

    def place(self, rows: int) -> dict[str, Any]:
        """What a pass needs to begin after so many rows."""
        return {"rows": rows}

    def start_at(self, place: dict[str, Any]) -> None:
        """Begin the next pass there, by default at the first row."""
        self.start_row = place.get("rows", 0)

    def __len__(self) -> int:
        return -(-len(self.rows) * self.repeats // self.num_replicas)

    def __iter__(self) -> Iterator[KeyRow]:
        keys = self._shuffled_keys() if self.shuffle else self._repeated_keys
        for places, counted in self.micro_batches(self.places()):
            yield from mark_copies(list(map(keys, places)), counted)

    def places(self) -> range:
        """What is left of the epoch over all ranks, as places in its order."""
        return range(self.start_row, len(self.rows) * self.repeats)

    def micro_batches(self, rows: Iterable[T]) -> Iterator[tuple[list[T], int]]:
        """This rank's micro-batches of the rows of all ranks, and how many of each count: the others are copies."""
        rows = iter(rows)
        while block := list(itertools.islice(rows, self.block)):
            share = -(-len(block) // self.num_replicas)
            own = block[self.rank * share : (self.rank + 1) * share]
            yield own + block[:1] * (share - len(own)), len(own)

    def _repeated_keys(self, place: int) -> KeyRow:
        """The same noise at every pass: epochs −1, −2, …, whose orders are one sequence."""
        row, repeat = divmod(place, self.repeats)
        return tuple(SampleKey(-1 - repeat, d * self.repeats + repeat, d) for d in self.rows[row])

    def _shuffled_keys(self) -> Callable[[int], KeyRow]:
        row_at, order = self.shuffled()
        rows, order, epoch = [self.rows[row] for row in row_at.tolist()], order.tolist(), self.epoch
        return lambda place: tuple(SampleKey(epoch, order[document], document) for document in rows[place])

    def shuffled(self) -> tuple[np.ndarray, np.ndarray]:
        """The row at each place of this epoch [rows], and each document's number in its order [documents]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # The order of documents is a permutation of documents, not of rows: packing does not change their noise.
        order = torch.randperm(self._documents, generator=generator).numpy()
        if self.lengths is not None:  # documents of one length keep the shuffled order
            order = np.argsort(np.lexsort((order, self.lengths)))  # the inverse permutation
            return np.argsort(order[self._first]), order
        # Consecutive rows spread t of their first, longest documents evenly: the row with the j-th smallest t goes
        # where the j-th smallest t of 0, 1, 2, … is.
        row_at = np.empty(len(self.rows), np.int64)
        row_at[np.argsort(_t(np.arange(len(self.rows))))] = np.argsort(_t(order[self._first]))
        return row_at, order


def mark_copies(rows: list[KeyRow], counted: int) -> list[KeyRow]:
    """Rows of which those after the first `counted` do not count."""
    copies = [tuple(SampleKey(*key[:3], counted=False) for key in row) for row in rows[counted:]]
    return rows[:counted] + copies


def _t(order: np.ndarray) -> np.ndarray:  # without the epoch's offset: see `diffusion.schedule.stratified_t`
    return order * _GOLDEN_RATIO % 1


class KeyedItems(Dataset):
    """Maps a row of sample keys to pairs of key and item, of documents or questions by number."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __getitem__(self, row: KeyRow) -> list[tuple[SampleKey, Any]]:
        return [(key, self.items[key.index]) for key in row]


class ResumableLoader(DataLoader):
    """A DataLoader that resumes in the middle of an epoch after Lightning restored its state.

    Rows are counted over all ranks: a run resumes at the same row with another number of ranks or batch size. Of a
    stream, whose length it does not know, Lightning reads one batch ahead, and the first one before it sets the epoch.
    """

    rows_used = 0  # by the batches that training asked for
    waited = 0.0  # seconds that the training loop waited for batches; `training.Throughput` reads it
    epoch = 0
    resume_at: dict[str, Any] | None = None  # a state

    def __iter__(self) -> Iterator[Any]:
        # A generator: this runs at the first batch, after Lightning has set the sampler's epoch.
        state, self.resume_at = self.resume_at or {}, None
        if state.get("epoch") != self.sampler.epoch:
            state = {}
        self.sampler.start_at(state)
        self.epoch, self.rows_used = self.sampler.epoch, self.sampler.start_row
        asked, read = time.perf_counter(), self.rows_used
        for batch in self._batches():
            self.waited += time.perf_counter() - asked
            read += self.sampler.block
            if not self.sampler.read_ahead:
                self.rows_used = read
            yield batch
            asked, self.rows_used = time.perf_counter(), read
        if self.sampler.read_ahead:  # the state while the last batch is trained on: Lightning resumes in the next epoch
            self.epoch, self.rows_used = self.epoch + 1, 0

    def _batches(self) -> Iterator[Any]:
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, **self.sampler.identity(), **self.sampler.place(self.rows_used)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume there at the first batch; warn if the rows or their order differ from the checkpoint's."""
        self.resume_at, now = state, self.sampler.identity()
        self.sampler.set_epoch(state["epoch"])
        if 0 < state["rows"] < state.get("rows_per_epoch", math.inf) and any(state.get(n) != now[n] for n in now):
            was, of = state.get("rows_per_epoch", "streamed"), now.get("rows_per_epoch", "streamed")
            rank_zero_warn(
                f"the checkpoint's epoch has {was} rows (data.seed {state['seed']}), this run's {of} "
                f"(data.seed {now['seed']}), or the sources have changed: the rest of this epoch repeats some "
                "documents and omits others"
            )


def bucket_by_length(numbers: Sequence[int], length: Callable[[int], int], *, window: int) -> list[int]:
    """Sort by length, longest first, within consecutive windows: little padding, and first questions come first."""
    windows = (numbers[start : start + window] for start in range(0, len(numbers), window))
    return [number for part in windows for number in sorted(part, key=length, reverse=True)]
