"""A function of numbers, computed in other processes and in order. Whole sets and streams are tokenized with it."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dream_lightning.errors import UserError

T = TypeVar("T")


def map_in_processes(
    function: Callable[[int], T], numbers: Sequence[int], num_proc: int, *, ahead: int = 0
) -> Iterator[T]:
    """The results, in the order of the numbers. `ahead` of them, and two a process at least, are computed before they
    are asked for; with 0 processes, this one computes each when it is asked for. Raises the UserError of the function.
    """
    results = DataLoader(
        _Results(function),
        batch_size=None,
        sampler=numbers,
        num_workers=num_proc,
        prefetch_factor=max(2, -(-ahead // num_proc)) if num_proc else None,
        worker_init_fn=_start_worker,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # its default would advance the global one
    )
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


class _Results(Dataset):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, number: int) -> Any:
        try:
            return self.function(number)
        except UserError as error:  # a DataLoader would wrap it into a traceback
            return error


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


def _unchanged(result: Any) -> Any:
    return result
