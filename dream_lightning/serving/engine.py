"""Continuous batching: one turn denoises one block of every active row; rows join and leave between turns.

A turn is the sampler's own loop over a single block. Of the turns before it needs the rows' tokens only, because a KV
cache is computed anew at the start of every block. So rows at different blocks share a turn.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.sampling import SamplingParams
from dream_lightning.sampling.canvas import Canvas, prepare
from dream_lightning.sampling.generate import denoise_canvas
from dream_lightning.sampling.unmasking import rule_of
from dream_lightning.viewer.page import token_text

Event = dict[str, Any]


@dataclass(eq=False)
class Row:
    """One answer: what was asked, and what there is of it."""

    owner: Any  # whose answer this is
    index: int  # among the answers to the request
    prompt: list[int]
    params: SamplingParams
    limit: int  # tokens of the answer to return; `params.max_new_tokens` are whole blocks
    sample_id: int = 0
    copy: int = 0
    stop: Sequence[str] = ()
    watched: bool = False  # report every change of the canvas

    ids: list[int] = field(default_factory=list)  # of the finished blocks
    forwards: int = 0
    sent: str = ""
    shown: set[int] = field(default_factory=set)  # positions of the current block whose tokens were reported
    _turn: SamplingParams | None = None  # the last one: to check new parameters takes half a millisecond

    @property
    def block(self) -> int:
        return self.params.block_length or self.params.max_new_tokens

    @property
    def turn(self) -> SamplingParams:
        """The parameters of the current block alone. Rows with equal ones share a turn."""
        p = self.params
        early = min(max(p.min_new_tokens - len(self.ids), 0), self.block)
        if self._turn is None or self._turn.min_new_tokens != early:
            self._turn = replace(p, max_new_tokens=self.block, steps=p.steps // p.blocks, min_new_tokens=early)
        return self._turn


def block_canvas(rows: Sequence[Row], config: DreamConfig, device: torch.device) -> Canvas:
    """The rows with their current blocks in the same columns, the last ones.

    Attention knows positions, not columns. So a row is laid out as the masks after its block, what is before the block,
    and the block. All rows are padded on the left to the longest one, at whatever block they are.
    """
    length, block = max(len(row.prompt) + row.params.max_new_tokens for row in rows), rows[0].block
    compiled = rows[0].params.compile
    if compiled:  # few shapes: 256, 384, 512, 768, … columns
        half = 1 << max(length - 1, 2).bit_length() - 2
        length = min(-(-length // half) * half, max(length, config.max_position_embeddings))
    ids = torch.full((len(rows), length - block), config.pad_token_id or 0)
    positions, real = torch.ones(len(rows), length, dtype=torch.int64), torch.zeros_like(ids)  # [B, L], [B, L - block]
    for b, row in enumerate(rows):
        known, whole = [*row.prompt, *row.ids], len(row.prompt) + row.params.max_new_tokens
        after = whole - block - len(known)
        ids[b, length - whole :] = torch.tensor([config.mask_token_id] * after + known)
        positions[b, length - whole :] = torch.arange(whole).roll(after)
        real[b, length - whole :] = 1
    numbers = [[row.sample_id, row.copy, len(row.ids) // block * row.turn.steps] for row in rows]
    sample_ids, copies, earlier_steps = torch.tensor(numbers).unbind(1)
    canvas = prepare(config, ids, real, SamplingParams(max_new_tokens=block, steps=1), sample_ids, infill=True)
    numbers = {"positions": positions, "copies": copies, "earlier_steps": earlier_steps}
    canvas = replace(canvas, **numbers, padded=canvas.padded or compiled)  # one graph with and without padding
    return replace(canvas, **{name: x.to(device) for name, x in vars(canvas).items() if isinstance(x, torch.Tensor)})


class Engine:
    """The rows that a model answers.

    Args:
        most_rows: that are active at a time.
        is_cancelled: whether nobody waits for the answers of this owner any more.
    """

    def __init__(
        self,
        model: DreamModel,
        tokenizer: PreTrainedTokenizerBase,
        most_rows: int,
        is_cancelled: Callable[[Any], bool] = lambda owner: False,
    ) -> None:
        self.model, self.tokenizer, self.most_rows, self.is_cancelled = model, tokenizer, most_rows, is_cancelled
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []

    @property
    def room(self) -> int:
        """Rows that could join now."""
        return self.most_rows - len(self.active) - len(self.waiting)

    def warm_up(self, length: int, params: SamplingParams) -> None:
        """One block for each power of two of rows of `length` tokens, prompt and answer: graphs have these shapes."""
        block = Row(None, 0, [], params, 0).turn
        prompt = [self.tokenizer.eos_token_id] * (length - block.max_new_tokens)
        for power in reversed(range((self.most_rows - 1).bit_length() + 1)):
            rows = min(1 << power, self.most_rows)
            self.waiting.extend(Row(None, 0, prompt, block, block.max_new_tokens) for _ in range(rows))
            self.finish()

    def finish(self) -> None:
        """Turns until every row has its answer; UserError if one fails."""
        while self.waiting or self.active:
            for _, event in self.turn():
                if "error" in event:
                    raise UserError(event["error"])

    def turn(self) -> Iterator[tuple[Row, Event]]:
        """One block for the rows that have waited longest, and all others with the same parameters.

        Yields:
            A row and what has happened to it: it has joined (`prompt_tokens`), its canvas changed (`changes`: position
            in the answer, text, None for eos), a block is finished (`text`, what is new of the answer, and at its end
            `finish`, `tokens` and `forwards`), or it failed (`error`).
        """
        self.waiting = deque(row for row in self.waiting if not self.is_cancelled(row.owner))
        self.active = [row for row in self.active if not self.is_cancelled(row.owner)]
        while self.waiting and len(self.active) < self.most_rows:
            self.active.append(row := self.waiting.popleft())
            yield row, {"prompt_tokens": len(row.prompt)}
        if not self.active:
            return
        params = self.active[0].turn
        rows = [row for row in self.active if row.turn == params]
        self.active = [row for row in self.active if row not in rows]
        try:
            start = block_canvas(rows, self.model.config, self.model.device)
            for canvas in denoise_canvas(self.model, start, params, rule_of(params)):
                if any(row.watched for row in rows):
                    yield from self._changes(rows, canvas.x[:, canvas.prompt_length :].tolist())
                if all(self.is_cancelled(row.owner) for row in rows):
                    return
        except (UserError, torch.OutOfMemoryError) as error:
            for row in rows:
                yield row, {"error": str(error)}
            return
        blocks = zip(rows, canvas.x[:, canvas.prompt_length :].tolist(), canvas.forwards.tolist(), strict=True)
        for row, ids, forwards in blocks:
            event = self._finish_block(row, ids, forwards)
            if "finish" not in event:
                self.active.append(row)
            yield row, event

    def _changes(self, rows: Sequence[Row], blocks: list[list[int]]) -> Iterator[tuple[Row, Event]]:
        mask, eos = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        for row, ids in zip(rows, blocks, strict=True):
            new = [j for j, token in enumerate(ids) if token != mask and j not in row.shown] if row.watched else []
            row.shown.update(new)
            texts = [None if ids[j] == eos else token_text(ids[j], self.tokenizer) for j in new]
            if new:
                yield row, {"changes": [[len(row.ids) + j, text] for j, text in zip(new, texts, strict=True)]}

    def _finish_block(self, row: Row, ids: list[int], forwards: int) -> Event:
        """The block's event. The text ends before the first eos or stop string, or at the row's limit."""
        row.ids, row.forwards, row.shown = row.ids + ids, row.forwards + forwards, set()
        kept, eos = row.ids[: row.limit], self.tokenizer.eos_token_id
        is_over = eos in kept
        kept = kept[: kept.index(eos)] if is_over else kept
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        if stops := [at for word in row.stop if (at := text.find(word)) >= 0]:
            text, is_over = text[: min(stops)], True
        is_cut = not is_over and len(row.ids) >= row.limit
        if not (is_over or is_cut):  # hold back half a character, and what may become a stop string
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            text = text[: max(len(text) + 1 - max(map(len, row.stop), default=1), 0)]
        event = {"text": text[len(row.sent) :]}
        row.sent = text
        if is_over or is_cut:
            event |= {"finish": "stop" if is_over else "length", "tokens": len(kept), "forwards": row.forwards}
        return event
