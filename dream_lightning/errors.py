"""What a user sees of an error: one message for what she can mend, the traceback for what only we can."""

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

# Whose deliberate ValueErrors are for users: ours, Lightning's of options that do not go together, and optimisers'.
_SPEAKING = (
    Path(__file__).parent,
    Path(L.__file__).parent / "pytorch" / "trainer",
    Path(torch.optim.__file__).parent,
)
TRACEBACK = "DREAM_TRACEBACK"  # environment variable: 1 shows the traceback always


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with status 1 and the message alone on errors for users; all others go on unchanged.

    Those for users are the `ValueError`s that this package raises on purpose, and those of Lightning and torch's
    optimisers about their options; also where another error was raised from them, as jsonargparse does.
    DREAM_TRACEBACK=1 in the environment shows the traceback of these too.
    """
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        told: BaseException | None = error
        while told is not None and not is_for_users(told):
            told = told.__cause__
        if os.environ.get(TRACEBACK) == "1" or told is None:
            raise
        print(f"error: {told}\n({TRACEBACK}=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from error


def is_for_users(error: BaseException) -> bool:
    """Whether a `raise` of this package, of the script that runs, of Lightning over its options or of an optimiser."""
    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    raised = linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise ")
    script = getattr(sys.modules["__main__"], "__file__", None)  # one of scripts/, under this same protection
    return raised and (file == script or any(Path(file).is_relative_to(folder) for folder in _SPEAKING))
