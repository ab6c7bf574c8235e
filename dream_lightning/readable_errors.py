"""What a user sees of an error: one message for what she can mend, the traceback for what only we can."""

import errno
import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonargparse
import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

# Whose deliberate ValueErrors are for users: ours, Lightning's of options that do not go together, and optimisers'.
_SPEAKING = (
    Path(__file__).parent,
    Path(L.__file__).parent / "pytorch" / "trainer",
    Path(torch.optim.__file__).parent,
)
_PARSER = Path(jsonargparse.__file__).parent
TRACEBACK = "DREAM_TRACEBACK"  # environment variable: 1 shows the traceback always


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with status 1 and the message alone on errors for users; all others go on unchanged.

    Those for users are the `ValueError`s that this package raises on purpose, those of Lightning, torch's optimisers
    and the parser about options, and disks that are full or may not be written. DREAM_TRACEBACK=1 in the environment
    shows the traceback of these too.
    """
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        told = _about_disk(error) if isinstance(error, OSError) else _for_users(error)
        if os.environ.get(TRACEBACK) == "1" or told is None:
            raise
        print(f"error: {told}\n({TRACEBACK}=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from error


def _about_disk(error: OSError) -> str | None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return None
    return (
        f"{error}: make room or choose other folders, for logs trainer.logger.init_args.save_dir, for tokenised data "
        "data.cache_dir. Checkpoints that were written stay good: --ckpt_path last goes on from the newest"
    )


def _for_users(error: BaseException) -> BaseException | None:
    """The error to tell of, among this one and those it was raised from: the parser wraps what classes say."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    speaking = [e for e in chain if isinstance(e, MisconfigurationException) or _raised_by(e, _SPEAKING)]
    return next(iter(speaking or [e for e in reversed(chain) if _raised_by(e, (_PARSER,))]), None)


def _raised_by(error: BaseException, folders: tuple[Path, ...]) -> bool:
    """Whether a ValueError comes from a `raise` in one of the folders, or in the script that runs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, ValueError):
        return False
    file = trace.tb_frame.f_code.co_filename
    raised = linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise ")
    script = getattr(sys.modules["__main__"], "__file__", None)  # one of scripts/, under this same protection
    return raised and (file == script or any(Path(file).is_relative_to(folder) for folder in folders))
