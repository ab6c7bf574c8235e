"""`python kill_runs.py FOLDER KILLS SEED ARGUMENT…`: run the command line until it has been killed KILLS times, then whole.

Python and its imports are loaded once; every attempt is a fork of this process. Prints a line of JSON an attempt: the
moment that was chosen for the kill, and whether it left a file half written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from dream_lightning.cli import main

MOMENTS = ("any time", "after a save", "in a save")


def attempt(arguments: list[str], log: Path) -> int:
    """Fork a process that runs the command line; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["dream_lightning", *arguments]
    code = 1
    try:
        main()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def written(folder: Path) -> int:
    """When last.ckpt was put there, 0 for never."""
    try:
        return (folder / "last.ckpt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_at(moment: str, pid: int, folder: Path, chance: random.Random) -> bool:
    """Kill the process at such a moment; False if it ended before."""

    def wait_for(what) -> bool:
        while not what():
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
        return True

    before, started = written(folder), time.monotonic()
    if moment == "any time":
        delay = chance.uniform(0, 1.5)
        alive = wait_for(lambda: time.monotonic() > started + delay)
    else:
        until = []
        delay = chance.uniform(0, 0.2)
        alive = wait_for(lambda: written(folder) != before and not until.append(time.monotonic()))
        alive = alive and wait_for(lambda: time.monotonic() > until[0] + delay)
        if moment == "in a save":
            alive = alive and wait_for((folder / "last.ckpt.partial").exists)
    if alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return alive


def run(folder: Path, kills: int, seed: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    chance, checkpoints, log = random.Random(seed), folder / "checkpoints", folder / "log.txt"
    folder.mkdir(parents=True)
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        killed = kill_at(moment, attempt(arguments, log), checkpoints, chance)
        partial = sorted(path.name for path in checkpoints.glob("*.partial"))
        print(json.dumps({"moment": moment, "killed": killed, "partial": partial}), flush=True)
        if not killed:
            break
    _, status = os.waitpid(attempt(arguments, log), 0)
    print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
