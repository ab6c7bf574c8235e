"""Launches of processes: a port for their group, and forks, which load the imports once."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

HOST = "127.0.0.1"


class MeetingPoint:
    """A store that holds a port open; processes with `environment` use it. A free port might be taken first."""

    def __init__(self) -> None:
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)

    @property
    def environment(self) -> dict[str, str]:
        """As torchrun sets it, whose agent holds the port too."""
        return {"MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def fork(work: Callable[[], None], log: Path) -> int:
    """Fork a process that does `work` and prints to the end of `log`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """The exit status of a process, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
