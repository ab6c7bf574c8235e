"""Launches of processes: a port for their group, and forks, which share the imports."""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed import TCPStore

from dream_lightning import cli

HOST = "127.0.0.1"
# For the server of forks, which does not get `sys.path` before Python 3.13 and would leave out imports silently.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


class MeetingPoint:
    """A store that holds a port open; processes with `environment` use it. A free port might be taken first."""

    def __init__(self) -> None:
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)

    @property
    def environment(self) -> dict[str, str]:
        """As torchrun sets it, whose agent holds the port too."""
        return {"MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def print_to(log: str | Path) -> None:
    """Print to the end of this file from now on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def fork(work: Callable[[], None], log: Path | None = None) -> int:
    """Fork a process that does `work` and prints to the end of `log`, or where this one does; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    if log:
        print_to(log)
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


def ranks(work: Callable[[], None], log: Path | None = None) -> list[int]:
    """The exit statuses of two processes that do `work`, as torchrun starts them."""
    pids = []
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        pids.append(fork(work, log))
    return [end(pid) for pid in pids]


def _begin(work: Callable, arguments: tuple, environment: dict[str, str], output: str) -> None:
    os.setsid()
    print_to(output)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test, when the server started: DDP would seed with it
    os.environ |= environment
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers of a DataLoader would each import torch again
    work(*arguments)


class Program:
    """`work(*arguments)` in a process of its own, a fork of a server that has the imports and has computed nothing.

    It leads a session, which ends with it. Its variables are those of the server and `environment`.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["material", "meeting"])

    def __init__(self, work: Callable, *arguments: object, **environment: str) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._output = Path(file.name)
        self._process = self._context.Process(target=_begin, args=(work, arguments, environment, file.name))
        self._process.start()

    def end(self, status: int = 0) -> str:
        """What it printed, once it has ended with this exit status."""
        try:
            self._process.join()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        printed = self._output.read_text()
        self._output.unlink()
        assert self._process.exitcode == status, printed[-6000:]
        return printed


def _command_of_ranks(arguments: list[str]) -> None:
    assert ranks(lambda: cli.run(arguments)) == [0, 0]


class CommandOfRanks(Program):
    """A command of dream-lightning in two processes, as torchrun starts them."""

    def __init__(self, *arguments: str) -> None:
        self._meeting = MeetingPoint()
        super().__init__(_command_of_ranks, arguments, **self._meeting.environment, TORCHELASTIC_RUN_ID="test")
