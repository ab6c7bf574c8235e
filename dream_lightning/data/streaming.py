"""Training data that does not fit in memory: windows of shards, tokenized in parallel while the model trains.

An epoch is a new order of all shards, cut into windows. The documents of a window are shuffled and packed together, as
those of a whole set are, and every rank takes its rows of them. Everything is a function of (seed, epoch), so a run
resumes at the window where it stopped. Tokenized shards stay in the cache, memory-mapped, and ranks share them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dream_lightning.atomic import lock_file
from dream_lightning.batch import Document, Example, SampleKey
from dream_lightning.data.document_cache import TokenizedSet, encode_arrays, settings_hash
from dream_lightning.data.epoch_order import KeyRow, RowSampler, mark_copies
from dream_lightning.data.packing import pack
from dream_lightning.data.processes import map_in_processes
from dream_lightning.data.schemas import choose_reader
from dream_lightning.data.sources import find_shards, no_rows, read_shard
from dream_lightning.data.splits import passes
from dream_lightning.errors import UserError

_PARTS = 16  # shards of a window
_BITS = 20  # of the number of a document in its shard, and of a shard, in the number of a sample


class ShardStream(Dataset):
    """The documents of weighted sources by number: the use of a shard, the shard, and the document in it.

    Args:
        sources: file or folder → weight, its share of the bytes of an epoch; one source is read once an epoch.
        reading: how records are read, arguments of `read_examples`; the columns of the first shard decide.
        encoding: arguments of `encode`.
        shuffle_mib: MiB of text in a window, that is shuffled and packed together.
        held_fraction: of the shards, chosen by `seed`, to validate with: at least one, at most a window.
    """

    def __init__(
        self,
        sources: dict[str, float],
        tokenizer: PreTrainedTokenizerBase,
        *,
        reading: dict[str, Any],
        encoding: dict[str, Any],
        cache_dir: str | Path,
        shuffle_mib: float,
        num_workers: int,
        held_fraction: float | None,
        seed: int,
    ) -> None:
        reading = {name: value for name, value in reading.items() if name != "subset"}
        self.filters = reading.pop("filters") or {}
        self.tokenizer, self.encoding, self.num_workers = tokenizer, encoding, num_workers
        self.cache_dir = Path(cache_dir).expanduser()
        self.shards, self.readers, self.groups, self.weights = [], [], [], list(sources.values())
        for source in sources:
            shards = find_shards(source, max(1, int(shuffle_mib * 2**20 / _PARTS)))
            first = next(filter(None, (list(read_shard(shard)) for shard in shards)), None)
            if first is None:
                raise no_rows(source)
            self.groups.append(list(range(len(self.shards), len(self.shards) + len(shards))))
            self.readers += [choose_reader(first, **reading)] * len(shards)
            self.shards += shards
        if len(self.shards) >> _BITS:
            raise UserError(f"the sources have {len(self.shards):,} shards, at most {1 << _BITS:,}: raise shuffle_mib")
        self.held: list[int] = []
        if held_fraction is not None:
            order = torch.randperm(len(self.shards), generator=torch.Generator().manual_seed(seed)).tolist()
            self.held = sorted(order[: min(max(1, round(held_fraction * len(order))), _PARTS)])
            self.groups = [[number for number in group if number not in self.held] for group in self.groups]
        if not all(self.groups):
            raise UserError("a source is too short to hold a part of it out: set validation_source")
        self.size = sum(self.shards[number].size for group in self.groups for number in group)
        self.settings = settings_hash(tokenizer, encoding)
        self._open: dict[int, TokenizedSet] = {}

    def examples(self, number: int) -> Iterator[Example]:
        for row in read_shard(self.shards[number]):
            if passes(row.record, self.filters):
                yield self.readers[number].read(row)

    def read(self) -> tuple[list[Example], list[Example]]:
        """Examples of the first shard, and those that are held out."""
        held = [example for number in self.held for example in self.examples(number)]
        return list(self.examples(self.groups[0][0])), held

    def summary(self) -> str:
        count, size = sum(map(len, self.groups)), self.size / 2**20
        held = f", {len(self.held)} others held out for validation" if self.held else ""
        return (
            f"a stream of {count:,} shards, {size:,.1f} MiB of {len(self.groups)} sources{held}. "
            "Not known before it is read: its number of documents and tokens, overlap with the validation data, and "
            "what the rows after the first shard hold"
        )

    def tokenize(self, number: int) -> None:
        """Tokenize a shard into the cache, unless it is there or another process does so."""
        folder = self._folder(number)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with (self.cache_dir / "streaming.lock").open("ab") as lock:
            lock_file(lock, wait=True, byte=int(folder.name[-7:], 16))  # released when this process ends
            if not folder.exists():
                arrays = encode_arrays(self.examples(number), self.tokenizer, **self.encoding)
                TokenizedSet.of([arrays]).save(folder)

    def __getitem__(self, index: int) -> Document:
        return self.opened(index >> _BITS & (1 << _BITS) - 1)[index & (1 << _BITS) - 1]

    def opened(self, number: int) -> TokenizedSet:
        if number not in self._open:
            while len(self._open) > 2 * _PARTS:
                del self._open[next(iter(self._open))]
            self._open[number] = TokenizedSet.load(self._folder(number))
        return self._open[number]

    def _folder(self, number: int) -> Path:
        key = [self.settings, self.shards[number], self.readers[number], sorted(self.filters.items())]
        return self.cache_dir / f"documents-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"

    def order(self, epoch: int, seed: int) -> list[tuple[int, int]]:
        """The shards of an epoch and how often each was used before. Sources are spread evenly, by their weights.

        An epoch has the bytes of all sources. A source that gets more than its own begins again, in a new order; one
        that gets less continues in the next epoch.
        """
        placed, orders = [], {}
        for source, (numbers, weight) in enumerate(zip(self.groups, self.weights, strict=True)):
            own = sum(self.shards[number].size for number in numbers)
            count = max(1, round(len(numbers) * self.size * weight / sum(self.weights) / own))
            for k in range(count):
                use, place = divmod(epoch * count + k, len(numbers))
                if (source, use) not in orders:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + source * 7_919 + use)
                    orders[source, use] = torch.randperm(len(numbers), generator=generator).tolist()
                placed.append(((k + 0.5) / count, use, numbers[orders[source, use][place]]))
        return [(use, number) for _, use, number in sorted(placed)]

    def fingerprint(self) -> str:
        parts = [[Path(s.file).name, *s[2:]] for s in self.shards]
        return hashlib.sha256(json.dumps([parts, self.held, self.weights]).encode()).hexdigest()[:16]


class StreamSampler(RowSampler):
    """Rows of a stream, window after window, distributed over ranks as RowSampler distributes those of a set."""

    def __init__(self, stream: ShardStream, *, budget: int | None, read_ahead: bool, **options: Any) -> None:
        super().__init__([], **options)
        self.read_ahead, self.start_window = read_ahead, (0, 0, 0)
        self.stream, self.budget = stream, budget  # of a packed row; None = one document a row
        self.windows: list[tuple[int, int, int]] = []  # row, window and document with which each one began

    def __len__(self) -> int:
        raise TypeError("the length of a stream is not known")

    def identity(self) -> dict[str, Any]:
        return {"stream": self.stream.fingerprint(), "seed": self.seed}

    def place(self, rows: int) -> dict[str, Any]:
        return {"rows": rows, "window": list(max((w for w in self.windows if w[0] <= rows), default=(0, 0, 0)))}

    def start_at(self, place: dict[str, Any]) -> None:
        super().start_at(place)
        self.start_window = tuple(place.get("window", (0, 0, 0)))

    def __iter__(self) -> Iterator[KeyRow]:
        for rows, counted in self.micro_batches(self._from_start()):
            yield from mark_copies(rows, counted)

    def _from_start(self) -> Iterator[KeyRow]:
        order = self.stream.order(self.epoch, self.seed)
        # The first windows have 1, 2, 4 and 8 shards: training starts when one shard is tokenized.
        starts = [start for start in (0, 1, 3, 7, *range(_PARTS - 1, len(order), _PARTS)) if start < len(order)]
        windows = [order[a:b] for a, b in itertools.pairwise([*starts, len(order)])]
        row, first, document = self.start_window
        ready = self._prepare(windows[first:])
        self.windows, counts = [], np.zeros(4, np.int64)
        for number in range(first, len(windows)):
            next(ready)
            self.windows.append((row, number, document))
            sets = [self.stream.opened(shard) for _, shard in windows[number]]
            lengths = np.concatenate([documents.lengths for documents in sets]).tolist()
            if max(map(len, sets)) >> _BITS:
                raise UserError(f"a shard has more than {1 << _BITS:,} documents: lower shuffle_mib")
            firsts = [(use << _BITS | shard) << _BITS for use, shard in windows[number]]
            samples = [first + i for first, s in zip(firsts, sets, strict=True) for i in range(len(s))]
            rows = pack(lengths, self.budget)
            shuffled = RowSampler(rows, batch_size=1, seed=self.seed * 1_000_003 + number)
            shuffled.epoch = self.epoch
            row_at, place = (array.tolist() for array in shuffled.shuffled())
            for row_number in row_at[max(self.start_row - row, 0) :]:
                yield tuple(SampleKey(self.epoch, document + place[d], samples[d]) for d in rows[row_number])
            row, document = row + len(rows), document + len(lengths)
            counts += [len(lengths), sum(lengths), sum(s.cut_tokens.sum() for s in sets), sum(s.dropped for s in sets)]
            if number + 1 == len(windows) or number & (number + 1) == 0:
                rank_zero_info(
                    "stream: window {:,} of {:,}; {:,} documents, {:,} tokens, {:,} tokens cut, {:,} documents dropped "
                    "since it began or resumed".format(number + 1, len(windows), *counts)
                )
        if not row:
            raise UserError("overflow or filters drop every document of the stream: raise max_length, or change them")

    def _prepare(self, windows: Sequence[Sequence[tuple[int, int]]]) -> Iterator[None]:
        """Yield once for each window that is tokenized; with workers, those after it are tokenized meanwhile."""
        shards = [[shard for _, shard in window] for window in windows]
        turned = [part[i:] + part[:i] for part in shards for i in [len(part) * self.rank // self.num_replicas]]
        numbers = list(itertools.chain.from_iterable(turned))  # ranks begin with different shards
        tokenized = map_in_processes(self.stream.tokenize, numbers, self.stream.num_workers, ahead=_PARTS)
        for part in shards:
            list(itertools.islice(tokenized, len(part)))  # waits for them
            yield
