"""The rows of a batch as they are filled, and those among them that are still at work."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dream_lightning.sampling.canvas import Canvas


@dataclass(frozen=True)
class State:
    """The rows between two steps; tensors of a State are never changed."""

    x: Tensor  # [B, L] int64
    filled_at: Tensor  # [B, L] int64, the step; -1 = not filled by a prediction
    confidence: Tensor  # [B, L] float32, the certainty then; 0 = not filled by a prediction
    forwards: Tensor  # [B] int64, those that filled something

    @classmethod
    def of(cls, x: Tensor, *, forwards: int = 0) -> "State":
        """Nothing filled yet, after so many forwards."""
        nothing = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return cls(x, torch.full_like(x, -1), nothing, x.new_full((len(x),), forwards))

    def fill(
        self, chosen: Tensor, tokens: Tensor, certainty: Tensor, *, step: int, mask_token_id: int | None
    ) -> "State":
        """With the `tokens` [B, L] where `chosen` [B, L]; a mask token, if one may be there, fills nothing."""
        filled = chosen if mask_token_id is None else chosen & (tokens != mask_token_id)
        return State(
            torch.where(chosen, tokens, self.x),
            self.filled_at.masked_fill(filled, step),
            torch.where(filled, certainty, self.confidence),
            self.forwards + filled.any(1),
        )

    def select(self, rows: Tensor) -> "State":
        """These rows [b] int64 only."""
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def put(self, rows: Tensor, other: "State") -> "State":
        """The same with `other` in these rows."""
        return State(*(getattr(self, f.name).index_copy(0, rows, getattr(other, f.name)) for f in fields(self)))


class Rows:
    """A batch of which some rows may have left.

    Attributes:
        state: of the rows at work.
        canvas: of the rows at work.
    """

    def __init__(self, canvas: Canvas, forwards: int) -> None:
        self.canvas, self.state = canvas, State.of(canvas.x, forwards=forwards)
        self._batch, self._alive, self._merged = self.state, None, self.state

    @property
    def batch(self) -> State:
        """The state of the whole batch."""
        if self._alive is None:
            return self.state
        if self._merged is not self.state:
            self._batch, self._merged = self._batch.put(self._alive, self.state), self.state
        return self._batch

    def keep(self, rows: Tensor) -> None:
        """Only these of the rows at work [b] int64 go on."""
        self._batch = self.batch
        self._alive = rows if self._alive is None else self._alive[rows]
        self.state, self.canvas = self.state.select(rows), self.canvas.select(rows)
        self._merged = self.state

    def fill_after_eos(self, mask_token_id: int, eos_token_id: int) -> None:
        """Fill the masks of rows whose text is decided with eos."""
        x = self.state.x
        ended = has_ended(x[:, self.canvas.prompt_length :], mask_token_id, eos_token_id)  # [b]
        self.state = replace(self.state, x=x.masked_fill(ended[:, None] & (x == mask_token_id), eos_token_id))


def has_ended(new: Tensor, mask_token_id: int, eos_token_id: int) -> Tensor:
    """Rows whose text up to the first eos is decided: no mask stands left of it. [B, N] → [B] bool."""
    ends = (new == eos_token_id).long().cumsum(1) > 0  # [B, N], from the first eos on
    return ends[:, -1] & ~((new == mask_token_id) & ~ends).any(1)


def locate(where: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The True positions in reading order, without waiting for the device as `nonzero` does.

    Args:
        where: [B, L] bool.
        number: at least that of the True positions.

    Returns:
        Their rows and columns, [number] each, (0, 0) where there are no more; and the place of every True position in
        this order, [B, L], −1 … number − 1 also elsewhere.
    """
    flat = where.flatten()
    place = flat.cumsum(0) - 1  # [B · L]
    # masked_fill, because torch.where copies a number to the device, and waits.
    target = place.masked_fill(~flat, number)  # the others go behind the end
    found = flat.new_zeros(number + 1, dtype=torch.int64)
    found = found.scatter(0, target, torch.arange(len(flat), device=flat.device))[:number]
    return found // where.shape[1], found % where.shape[1], place.view(where.shape)
