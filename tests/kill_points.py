"""Kills right before the n-th change of the files in a folder: every moment that differs, but the middle of a write."""

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class Watch:
    """Calls `before_change(what)` before this process changes anything in `folder`."""

    _active: "Watch | None" = None
    _hooked = False  # an audit hook cannot be removed, so all instances share one

    def __init__(self, folder: Path, before_change: Callable[[str], None]) -> None:
        self.folder, self.before_change = os.path.join(os.path.abspath(folder), ""), before_change

    def __enter__(self) -> "Watch":
        if not Watch._hooked:
            sys.addaudithook(lambda event, arguments: Watch._active and Watch._active._hear(event, arguments))
            Watch._hooked = True
        Watch._active = self
        return self

    def __exit__(self, *_: object) -> None:
        Watch._active = None

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in _NAMES and not (event == "open" and arguments[2] & _WRITING):
            return
        path = arguments[0]
        if isinstance(path, int):  # a file that is open already
            return
        path = os.path.abspath(os.fsdecode(path))
        in_a_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # rmtree names its entries alone
        if in_a_tree or path.startswith(self.folder):
            self.before_change(f"{event} {os.path.basename(path)}")


class Killed(BaseException):
    """Takes the place of the end of a process."""


def killed_before(change: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do `work` up to its n-th change of the folder, from 0; False if it ends before."""
    numbers = count()

    def refuse(what: str) -> None:  # all later ones too: no `finally` removes what a kill leaves
        if next(numbers) >= change:
            raise Killed(what)

    try:
        with Watch(folder, refuse):
            work()
    except Killed:
        return True
    return False
