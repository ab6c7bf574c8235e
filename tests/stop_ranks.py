"""`python stop_ranks.py FOLDER`: two processes as torchrun starts them; SIGTERM to the second alone; then all again.

Prints the exit statuses of both attempts as JSON. Started by test_kills.py.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from kill_runs import attempt, written
from material import addition_rows, write_jsonl


def start(folder: Path) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    pids = []
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        pids.append(attempt(folder, devices=2, steps=40))
    return pids


def end(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    write_jsonl(folder.parent / "sums.jsonl", addition_rows(40))
    pids = start(folder)
    while not written(folder):
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    print(json.dumps({"stopped": end(pids)}))
    print(json.dumps({"whole": end(start(folder))}))
