"""Documents → rows → one rectangular batch. Pure functions."""

import random
from collections.abc import Sequence

import torch

from dream_lightning.batch import Batch, Document, SampleKey
from dream_lightning.errors import UserError

_BOUNDS = 32  # the number of documents in a batch is filled up to a multiple of this with empty ones

KeyedRow = Sequence[tuple[SampleKey, Document]]  # the documents of one row


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put whole documents into rows of at most `budget` tokens, longest first, each where it leaves least room.

    Best-fit decreasing: at most 22 % more rows than the optimum (Johnson 1974), in practice none.

    Returns:
        For each row the numbers of its documents.

    Raises:
        UserError: a document is longer than a row.
    """
    if lengths and max(lengths) > budget:
        raise UserError(f"a document has {max(lengths)} tokens and a packed row {budget}: raise max_length")
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(budget + 1)]  # room left → rows
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        room = next((r for r in range(length, budget + 1) if rows_by_room[r]), None)
        if room is None:
            rows.append([document])
            rows_by_room[budget - length].append(len(rows) - 1)
        else:
            row = rows_by_room[room].pop()
            rows[row].append(document)
            rows_by_room[room - length].append(row)
    return rows


def collate(rows: Sequence[KeyedRow], *, pad_token_id: int) -> Batch:
    """Lay documents out in rows, each row padded on the right to the longest.

    The padding is not attended, not maskable and in no loss; eos that a response is to be filled with belongs to the
    document (`eos_fill_to`). Draws that are not counted have nothing maskable.
    """
    filled = [sum(len(document) for _, document in row) for row in rows]
    length = max(filled)
    batch = _empty(len(rows), length, pad_token_id)
    batch.padded = min(filled) < length
    if batch.padded or any(len(row) > 1 for row in rows):
        batch.document_bounds = _bounds([[len(document) for _, document in row] for row in rows], length)
    for b, row in enumerate(rows):
        start = 0
        for draw, document in row:
            _place(batch, b, start, draw, document)
            start += len(document)
    return batch


def collate_with_cutoff(
    rows: Sequence[KeyedRow], *, pad_token_id: int, eos_token_id: int, seed: int, kept: int | None = None
) -> Batch:
    """The authors' `random_with_input_pad`: all responses get the length of one of them.

    One row is drawn; its response length without eos becomes everybody's: longer responses are cut, shorter ones are
    filled with eos, prompts are padded on the left. With one row a batch the response therefore loses its eos.

    Args:
        kept: the response length; drawn if not given, as a function of (seed, the first document's draw).
    """
    drawn = [row[0] for row in rows]
    bare = [_without_final_eos(document.response_ids, eos_token_id) for _, document in drawn]
    if kept is None:
        first = drawn[0][0]
        kept = max(1, len(random.Random(f"cutoff {seed} {first.epoch} {first.order}").choice(bare)))
    longest_prompt = max(len(document.prompt_ids) for _, document in drawn)
    batch = _empty(len(rows), longest_prompt + kept, pad_token_id)
    batch.padded = any(len(document.prompt_ids) < longest_prompt for _, document in drawn)
    batch.position_ids.fill_(1)  # the authors' position of left padding; nothing attends to it
    for b, (draw, document) in enumerate(drawn):
        fill = max(0, kept - len(bare[b]))
        cut = Document(
            document.id,
            document.prompt_ids,
            bare[b][:kept] + [eos_token_id] * fill,
            (document.response_weight[: len(bare[b])] + [1.0] * fill)[:kept],
        )
        _place(batch, b, longest_prompt - len(document.prompt_ids), draw, cut)
    return batch


def _bounds(rows: list[list[int]], length: int) -> torch.Tensor:
    """Where documents begin, for DocumentBounds; in dozens of one size, so that compiled code meets few shapes."""
    starts = [0]
    for b, lengths in enumerate(rows):
        for n in lengths:
            starts.append(starts[-1] + n)
        if starts[-1] < (b + 1) * length:
            starts.append((b + 1) * length)
    starts += [starts[-1]] * (-(len(starts) - 1) % _BOUNDS)
    return torch.tensor(starts, dtype=torch.int32)


def _empty(rows: int, length: int, pad_token_id: int) -> Batch:
    def integers(value: int) -> torch.Tensor:
        return torch.full((rows, length), value, dtype=torch.int64)

    return Batch(
        input_ids=integers(pad_token_id),
        maskable=torch.zeros(rows, length, dtype=torch.bool),
        position_ids=integers(0),
        document_ids=integers(-1),
        sample_ids=integers(-1),
        epochs=integers(0),
        extra_weight=torch.ones(rows, length),
    )


def _place(batch: Batch, b: int, start: int, draw: SampleKey, document: Document) -> None:
    # Dream predicts a token from the position before it: in a packed row the first token's is the neighbour's last.
    assert document.prompt_ids, f"document {document.id} has no prompt: its first token must not be maskable"
    response, end = start + len(document.prompt_ids), start + len(document)
    batch.input_ids[b, start:end] = torch.tensor(document.prompt_ids + document.response_ids)
    batch.maskable[b, response:end] = draw.counted
    batch.position_ids[b, start:end] = torch.arange(end - start)
    batch.document_ids[b, start:end] = draw.order
    batch.sample_ids[b, start:end] = draw.index
    batch.epochs[b, start:end] = draw.epoch
    batch.extra_weight[b, response:end] = torch.tensor(document.response_weight)


def _without_final_eos(ids: list[int], eos_token_id: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == eos_token_id:
        end -= 1
    return ids[:end]
