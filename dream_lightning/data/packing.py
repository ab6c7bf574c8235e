"""Documents → rows → one rectangular batch. Pure functions."""

import itertools
import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from dream_lightning.batch import Batch, Document, Example, PromptBatch, SampleKey
from dream_lightning.errors import UserError

_BOUNDS = 32  # document_bounds are padded to a multiple of this, so that compiled code meets few shapes

KeyedRow = Sequence[tuple[SampleKey, Document]]  # the documents of one row


def pack(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Put whole documents into rows of at most `budget` tokens, None = one a row; the numbers of each row's documents.

    Best-fit decreasing: longest first, each into the fullest row that fits. At most 22 % more rows than the optimum
    (Johnson 1974), in practice none. Raises UserError if a document is longer than a row.
    """
    if budget is None:
        return [[i] for i in range(len(lengths))]
    if lengths and max(lengths) > budget:
        raise UserError(f"a document has {max(lengths)} tokens and a packed row {budget}: raise max_length")
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(budget + 1)]  # room left → rows
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = next((room for room in range(lengths[document], budget + 1) if rows_by_room[room]), None)
        if room is None:
            room = budget
            rows_by_room[room].append(len(rows))
            rows.append([])
        row = rows_by_room[room].pop()
        rows[row].append(document)
        rows_by_room[room - lengths[document]].append(row)
    return rows


def collate(rows: Sequence[KeyedRow], *, pad_token_id: int) -> Batch:
    """Concatenate the documents of each row, and pad the rows on the right to the longest.

    Padding is not attended, not maskable and in no loss. Documents whose key is not counted have nothing maskable.
    """
    lengths = [[len(document) for _, document in row] for row in rows]
    length = max(map(sum, lengths))
    batch = _padding(len(rows), length, pad_token_id)
    batch.padded = min(map(sum, lengths)) < length
    if batch.padded or any(len(row) > 1 for row in rows):
        batch.document_bounds = _bounds(lengths, length)
    if rows[0][0][1].trajectory is not None:
        batch.trajectory = torch.zeros(len(rows), length)
    for b, row in enumerate(rows):
        start = 0
        for key, document in row:
            _write(batch, b, start, key, document)
            start += len(document)
    return batch


def collate_with_cutoff(
    rows: Sequence[KeyedRow], *, pad_token_id: int, eos_token_id: int, seed: int, kept: int | None = None
) -> Batch:
    """The authors' `random_with_input_pad`: all responses get the length of one of them, without its eos.

    Longer responses are truncated, shorter ones filled with eos, prompts padded on the left. `kept` is that length; by
    default it is drawn as a function of the seed and the first document's key.
    """
    keyed = [row[0] for row in rows]
    bare = []  # response lengths without eos
    for _, document in keyed:
        final_eos = itertools.takewhile(lambda token: token == eos_token_id, reversed(document.response_ids))
        bare.append(len(document.response_ids) - len(list(final_eos)))
    if kept is None:
        first = keyed[0][0]
        kept = max(1, random.Random(f"cutoff {seed} {first.epoch} {first.order}").choice(bare))
    longest_prompt = max(len(document.prompt_ids) for _, document in keyed)
    batch = _padding(len(rows), longest_prompt + kept, pad_token_id)
    batch.padded = any(len(document.prompt_ids) < longest_prompt for _, document in keyed)
    batch.position_ids.fill_(1)  # the authors' position of left padding; nothing attends to it
    for b, (key, document) in enumerate(keyed):
        end = min(bare[b], kept)
        response = document.response_ids[:end] + [eos_token_id] * (kept - end)
        of_eos = document.response_weight[-1] if bare[b] < len(document.response_ids) else 1.0
        weight = document.response_weight[:end] + [of_eos] * (kept - end)
        cut = Document(document.id, document.prompt_ids, response, weight)
        _write(batch, b, longest_prompt - len(document.prompt_ids), key, cut)
    return batch


def collate_prompts(
    rows: Sequence[Sequence[tuple[SampleKey, tuple[Example, list[int]]]]], *, pad_token_id: int
) -> PromptBatch:
    """One question a row with the ids of its prompt, padded on the left to the longest."""
    keys, items = zip(*(row[0] for row in rows), strict=True)
    examples, prompts = zip(*items, strict=True)
    length = max(1, *map(len, prompts))  # prompts of questions that are too long are empty
    padding = [length - len(ids) for ids in prompts]
    return PromptBatch(
        input_ids=torch.tensor([[pad_token_id] * n + ids for n, ids in zip(padding, prompts, strict=True)]),
        attention_mask=torch.arange(length) >= torch.tensor(padding)[:, None],
        sample_ids=torch.tensor([key.index for key in keys]),
        counted=torch.tensor([key.counted for key in keys]),
        examples=list(examples),
    )


def _bounds(lengths: list[list[int]], length: int) -> torch.Tensor:
    starts = [0]
    for b, row in enumerate(lengths, 1):
        starts += itertools.accumulate(row[1:], initial=starts[-1] + row[0])
        if starts[-1] < b * length:
            starts.append(b * length)
    starts += [starts[-1]] * (-(len(starts) - 1) % _BOUNDS)
    return torch.tensor(starts, dtype=torch.int32)


def _padding(rows: int, length: int, pad_token_id: int) -> Batch:
    full = partial(torch.full, (rows, length))
    return Batch(
        input_ids=full(pad_token_id),
        maskable=full(False),
        position_ids=full(0),
        document_ids=full(-1),
        sample_ids=full(-1),
        epochs=full(0),
        extra_weight=full(1.0),
    )


def _write(batch: Batch, b: int, start: int, key: SampleKey, document: Document) -> None:
    # Dream predicts a token from the position before it, which for a row's later documents belongs to another document.
    assert document.prompt_ids, f"document {document.id} has no prompt: its first token must not be maskable"
    response, end = start + len(document.prompt_ids), start + len(document)
    # torch.tensor of a list takes ten times as long.
    batch.input_ids[b, start:end] = torch.from_numpy(np.array(document.prompt_ids + document.response_ids, np.int64))
    batch.maskable[b, response:end] = key.counted
    batch.position_ids[b, start:end] = torch.arange(end - start)
    batch.document_ids[b, start:end] = key.order
    batch.sample_ids[b, start:end] = key.index
    batch.epochs[b, start:end] = key.epoch
    batch.extra_weight[b, response:end] = torch.from_numpy(np.array(document.response_weight, np.float32))
    if batch.trajectory is not None:
        batch.trajectory[b, response:end] = torch.from_numpy(np.array(document.trajectory, np.float32))
