"""Plain typed containers that the parts of the house hand to each other.

Axis letters, used in every shape comment of the package:

    B rows · L positions · V vocabulary · D hidden size · H heads · M masked positions of a batch
    P prompt positions · N new (generated) positions · S denoising steps
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass  # not frozen: for precisions such as bf16-true Lightning rebuilds every dataclass in a batch
class Example:
    """One record in words, whatever file it came from."""

    id: str
    prompt: tuple[Message, ...]  # every turn before the response; the last one is the user's
    thinking: str | None  # the reasoning trace, without tags
    answer: str  # what follows the thinking; "" where a record has only a question
    reference: str | None  # what a prediction is scored against
    origin: str  # for messages to users: "train.jsonl, row 17"


@dataclass(frozen=True)
class Document:
    """One example as token ids. The response ends with eos, unless `truncate_right` cut it off."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_weight: list[float]  # extra loss weight of every response token, 1.0 = none

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class SampleKey:
    """One turn of one sample in one epoch: the whole address of its noise."""

    epoch: int
    order: int  # place in the epoch's order, the same on any number of ranks
    index: int  # number of the sample in the data set
    counted: bool = True  # False for the copies that even out the last batch over the ranks


@dataclass
class Batch:
    """Rows of whole documents, clean. Padding has place -1, is not attended and never maskable."""

    input_ids: Tensor  # [B, L] int64, x_0
    maskable: Tensor  # [B, L] bool, the response positions
    position_ids: Tensor  # [B, L] int64, restart at 0 in every document
    document_ids: Tensor  # [B, L] int64, SampleKey.order of the document at this position, -1 = padding
    sample_ids: Tensor  # [B, L] int64, SampleKey.index
    epochs: Tensor  # [B, L] int64, SampleKey.epoch
    extra_weight: Tensor  # [B, L] float32, Document.response_weight, 1.0 elsewhere
    padded: bool = False  # some position is padding; said here because asking a tensor would make the GPU wait
    # see DocumentBounds, stays on the host; None = one document a row, and no padding on the right
    document_bounds: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Lightning moves a batch to its device through this; nobody waits for a GPU."""
        device = torch.device(device)
        with torch.inference_mode(False):  # tensors made in it do not count their changes
            moved = {n: send(x, device) for n, x in self._tensors().items() if n != "document_bounds"}
        batch = replace(self, **moved)
        if self.input_ids.is_cpu and not batch.input_ids.is_cpu:
            batch._origin = self, {name: (x, x._version) for name, x in moved.items()}
        return batch

    @property
    def on_host(self) -> "Batch":
        """The same rows on the host where they came from there; these, if a tensor was exchanged or changed since."""
        origin, moved = getattr(self, "_origin", (self, {}))
        same = all(getattr(self, name) is x and x._version == version for name, (x, version) in moved.items())
        return origin if same else self

    def __getstate__(self) -> dict[str, Any]:
        """From a worker to the trainer numbers go through a pipe: torch would share a file for each tensor."""
        return {n: x.numpy() if isinstance(x, Tensor) and _as_array(x) else x for n, x in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other end."""
        vars(self).update({n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in state.items()})

    def pin_memory(self) -> "Batch":
        """A DataLoader with `pin_memory` asks for this."""
        return replace(self, **{name: x.pin_memory() for name, x in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def twice(self) -> "Batch":
        """The rows, and the same rows again below them: [2B, L]."""
        doubled = {name: torch.cat([x, x]) for name, x in self._tensors().items()}
        if self.document_bounds is not None:
            doubled["document_bounds"] = torch.cat(
                [self.document_bounds, self.document_bounds[1:] + self.input_ids.numel()]
            )
        return replace(self, **doubled)


def _as_array(x: Tensor) -> bool:
    return x.is_cpu and x.dtype != torch.bfloat16


def send(x: Tensor, device: torch.device) -> Tensor:
    """The tensor there. On its way from the host to a GPU nobody waits for it, which takes pinned memory.

    torch lets go of pinned memory only once the copy is made, whoever drops the tensor.
    """
    goes_up = x.is_cpu and device.type == "cuda"
    return (x.pin_memory() if goes_up else x).to(device, non_blocking=goes_up)


@dataclass
class DocumentBounds:
    """Rows of several documents, for attention that stays inside each; padding at a row's end is one more document.

    Stands where an attention mask may stand. Some kernels take it as it is; elsewhere it becomes a mask.
    """

    # [C+1] int32, where documents begin in all rows laid end to end, then B·L; the last may repeat. On the host,
    # until a layer's kernel wants them on its device (`model.documents.for_kernel`).
    starts: Tensor

    def to_mask(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Bool [B, 1, L, L], True = may attend."""
        place = torch.arange(batch * length, device=device)
        document = torch.bucketize(place, send(self.starts, device), right=True).view(batch, length)
        return (document[:, :, None] == document[:, None, :])[:, None]


@dataclass
class NoisedBatch:
    """x_0 with some maskable positions replaced by the mask token."""

    x_t: Tensor  # [B, L] int64
    is_masked: Tensor  # [B, L] bool
    t: Tensor  # [B, L] float32, the masking probability at each position

    @cached_property
    def where(self) -> tuple[Tensor, Tensor]:
        """Rows and columns [M] of what is masked. Counting them makes the process wait for a GPU, see `to`."""
        return self.is_masked.nonzero(as_tuple=True)

    def to(self, device: torch.device) -> "NoisedBatch":
        """The same there. From the host to a GPU nobody waits, and what is masked is counted already."""
        if self.x_t.device == device:
            return self
        x_t, is_masked, t, *where = (send(x, device) for x in (self.x_t, self.is_masked, self.t, *self.where))
        moved = NoisedBatch(x_t, is_masked, t)
        moved.where = tuple(where)
        return moved


@dataclass
class PromptBatch:
    """Left-padded prompts to answer."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, False = padding
    sample_ids: Tensor  # [B] int64, keys of the sampling noise
    counted: Tensor  # [B] bool, False for rows that only keep the ranks in step
    examples: list[Example]

    def to(self, *args: Any, **kwargs: Any) -> "PromptBatch":
        """Lightning moves a batch to its device through this."""
        moved = {
            n: getattr(self, n).to(*args, **kwargs) for n in ("input_ids", "attention_mask", "sample_ids", "counted")
        }
        return replace(self, **moved)


@dataclass
class LossTerms:
    """A loss before its one division: `sum / count`, both summed over an optimiser step first."""

    sum: Tensor  # [] float32
    count: Tensor  # [] float32

    @property
    def mean(self) -> Tensor:
        """The loss of what was summed, 0 where nothing counted."""
        return self.sum / torch.clamp(self.count, min=1)


@dataclass(frozen=True)
class Prediction:
    """One answered question, as a line of predictions.jsonl."""

    id: str
    prompt: str
    prediction: str  # the whole response, thinking included, cut at the first eos
    thinking: str | None
    answer: str | None  # what was extracted; None = unparsed
    reference: str | None
    correct: bool | None  # None without a reference
    tokens: int  # of the response, without eos
    seconds: float  # of the batch, divided by its rows
    forwards: int = 0  # of the model, those that filled something in this response
    filled: int = 0  # positions that they filled, eos included


@dataclass
class Answers:
    """A batch of answered questions."""

    predictions: list[Prediction]
    counted: list[bool]
    history: Tensor | None = None  # [S, B, P+N] int64, the states of denoising
    prompt_length: int = 0  # P

    def to(self, *args: Any, **kwargs: Any) -> "Answers":
        """Lightning moves what predict returns to the CPU through this."""
        return self if self.history is None else replace(self, history=self.history.to(*args, **kwargs))
