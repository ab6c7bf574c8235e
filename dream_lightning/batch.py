"""Plain typed containers that the parts of the package exchange.

Axis letters, used in every shape comment of the package: B rows · L positions · V vocabulary · D hidden size · H heads
M masked positions of a batch · P prompt positions · N new (generated) positions · S denoising steps
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor


class Message(TypedDict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]  # of the assistant: {"function": {"name": …, "arguments": {…}}}
    name: NotRequired[str]  # of a tool, as is the next one; the chat template may use them
    tool_call_id: NotRequired[str]


@dataclass  # not frozen: for precisions such as bf16-true Lightning rebuilds every dataclass in a batch
class Example:
    """One record as text, whatever file it came from."""

    id: str
    prompt: tuple[Message, ...]  # every message before the response; the last one is the user's or a tool's
    thinking: str | None  # the reasoning trace, without tags
    answer: str  # what follows the thinking; "" if a record has only a question
    reference: str | None  # what a prediction is scored against
    origin: str  # for error messages: "train.jsonl, row 17"
    task: str | None = None  # name of the task that grades the answer; None = the default task
    record: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # the raw row, for graders
    filled_at: list[int] | None = None  # the step at which a teacher filled each token of the response
    tools: list[dict[str, Any]] | None = None  # JSON schemas of what the assistant may call
    tool_calls: list[dict[str, Any]] | None = None  # of the response, after the answer; as in Message


@dataclass(frozen=True)
class Document:
    """One example as token ids. The response ends with eos unless `truncate_right` removed it."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_weight: list[float]  # extra loss weight of every response token, 1.0 = none
    trajectory: list[float] | None = None  # share of the response that a teacher filled after each of its tokens

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class SampleKey(NamedTuple):
    """One use of one sample in one epoch. Its noise is a function of this key and the seed."""

    epoch: int
    order: int  # position in the epoch's order, the same on any number of ranks
    index: int  # number of the sample in the data set
    counted: bool = True  # False for the copies that pad the last batch to the number of ranks


@dataclass
class Batch:
    """Rows of whole documents without noise. Padded positions are not attended and never maskable."""

    input_ids: Tensor  # [B, L] int64, x_0
    maskable: Tensor  # [B, L] bool, the response positions
    position_ids: Tensor  # [B, L] int64, restart at 0 in every document
    document_ids: Tensor  # [B, L] int64, SampleKey.order of the document at this position, -1 = padding
    sample_ids: Tensor  # [B, L] int64, SampleKey.index
    epochs: Tensor  # [B, L] int64, SampleKey.epoch
    extra_weight: Tensor  # [B, L] float32, Document.response_weight, 1.0 elsewhere
    padded: bool = False  # some position is padding; a flag, because reading a tensor synchronizes with the GPU
    document_bounds: Tensor | None = None  # DocumentBounds.starts, on the CPU; None = one document a row, not padded
    trajectory: Tensor | None = None  # [B, L] float32, Document.trajectory; masked where t is larger. None = at random
    # (the CPU batch that this was copied from, name → tensor and version at that time); init=False: `replace` clears it
    host: tuple[Any, dict[str, tuple[Tensor, int]]] | None = field(default=None, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str) -> "Batch":
        device = torch.device(device)
        with torch.inference_mode(False):  # tensors made in inference mode have no version
            moved = {name: send(x, device) for name, x in self.tensors().items() if name != "document_bounds"}
        batch = replace(self, **moved)
        if self.input_ids.is_cpu and device.type != "cpu":
            batch.host = self, {name: (x, x._version) for name, x in moved.items()}
        return batch

    @property
    def on_host(self) -> "Batch":
        """The CPU batch that this is an unchanged copy of, else this; noise from it needs no GPU synchronization."""
        host, copies = self.host or (self, {})
        return host if all(getattr(self, n) is x and x._version == v for n, (x, v) in copies.items()) else self

    @property
    def attention_mask(self) -> "Tensor | DocumentBounds | None":
        """Who may attend to whom: everyone, all but the padding [B, L], or each document to itself."""
        if self.document_bounds is not None:
            return DocumentBounds(self.document_bounds)
        return self.document_ids >= 0 if self.padded else None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def twice(self) -> "Batch":
        """The rows, followed by the same rows: [2B, L]."""
        doubled = {name: torch.cat([x, x]) for name, x in self.tensors().items()}
        if (starts := self.document_bounds) is not None:
            doubled["document_bounds"] = torch.cat([starts, starts[1:] + self.input_ids.numel()])
        return replace(self, **doubled)

    def pin_memory(self) -> "Batch":
        return replace(self, **{name: x.pin_memory() for name, x in self.tensors().items()})

    def __getstate__(self) -> dict[str, Any]:
        # CPU tensors are pickled as arrays: a worker would open a shared file for each tensor, 2 ms a batch.
        arrays = {n: x.numpy() for n, x in self.tensors().items() if x.is_cpu and x.dtype != torch.bfloat16}
        return vars(self) | arrays | {"host": None}  # a copy's tensors have versions of their own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in state.items()})


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, asynchronously from the CPU to a GPU; the caller may drop the tensor at once."""
    to_gpu = x.is_cpu and device.type == "cuda"
    return (x.pin_memory() if to_gpu else x).to(device, non_blocking=to_gpu)


@dataclass
class DocumentBounds:
    """An attention mask for rows of several documents: each attends to itself. A row's padding is one document."""

    starts: Tensor  # [C+1] int32: where documents begin in the concatenation of all rows, then B·L; the last may repeat

    def to_mask(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Bool [B, 1, L, L], True = may attend."""
        position = torch.arange(batch * length, device=device)
        document = torch.bucketize(position, send(self.starts, device), right=True).view(batch, length)
        return (document[:, :, None] == document[:, None, :])[:, None]


@dataclass
class NoisedBatch:
    """x_0 with some maskable positions replaced by the mask token."""

    x_t: Tensor  # [B, L] int64
    is_masked: Tensor  # [B, L] bool
    t: Tensor  # [B, L] float32, the masking probability at each position

    @cached_property
    def where(self) -> tuple[Tensor, Tensor]:
        """Rows and columns [M] of the masked positions; synchronizes with the GPU at the first use."""
        return self.is_masked.nonzero(as_tuple=True)

    def to(self, device: torch.device) -> "NoisedBatch":
        if self.x_t.device == device:
            return self
        moved = NoisedBatch(*(send(x, device) for x in (self.x_t, self.is_masked, self.t)))
        moved.where = tuple(send(x, device) for x in self.where)
        return moved


@dataclass
class PromptBatch:
    """Left-padded prompts to answer."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, False = padding; a row of padding is a question that is too long to answer
    sample_ids: Tensor  # [B] int64, keys of the sampling noise
    counted: Tensor  # [B] bool, False for the copies that pad the last batch to the number of ranks
    examples: list[Example]

    def to(self, *args: Any, **kwargs: Any) -> "PromptBatch":
        *tensors, examples = vars(self).values()
        return PromptBatch(*(x.to(*args, **kwargs) for x in tensors), examples)


@dataclass
class LossTerms:
    """A loss before its one division: `sum / count`, both [] float32 and summed over an optimizer step first."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / torch.clamp(self.count, min=1)


@dataclass(frozen=True)
class Prediction:
    """One answered question, as a line of predictions.jsonl."""

    id: str
    prompt: str
    prediction: str  # the whole response, thinking included, up to the first eos
    thinking: str | None
    answer: str | None  # what was extracted; None = unparsed
    reference: str | None  # of the record
    correct: bool | None  # None without a reference
    tokens: int  # of the response, without eos
    seconds: float  # of the batch, divided by its rows
    forwards: int = 0  # model forwards that unmasked at least one token of this response
    filled: int = 0  # positions that were unmasked, eos included
    too_long: bool = False  # the question leaves no room for an answer: none was generated
    target: str | None = None  # what was compared with the answer, such as the number in the reference


@dataclass
class Answers:
    """A batch of answered questions."""

    predictions: list[Prediction]
    counted: list[bool]
    history: Tensor | None = None  # [S, B, P+N] int64, the states of denoising
    prompt_length: int = 0  # P

    def to(self, *args: Any, **kwargs: Any) -> "Answers":
        return self if self.history is None else replace(self, history=self.history.to(*args, **kwargs))
