"""Print the CPU time to import the package and to print help, as ratios to the import of torch and lightning.

    python scripts/benchmark_startup.py --repeats 3

Every line is the least of several new processes, which take turns: other programs disturb all lines alike.
"""

import argparse
import subprocess
import sys
import time

WORK = {
    "import torch, lightning": ["-c", "import torch, lightning"],
    "from dream_lightning import *": ["-c", "from dream_lightning import *"],
    "dream-lightning --help": ["-m", "dream_lightning", "--help"],
    "dream-lightning fit --help": ["-m", "dream_lightning", "fit", "--help"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """CPU and wall-clock seconds of a new Python."""
    program = "import os, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
    program += "times = os.times(); print(times.children_user + times.children_system)"
    started = time.perf_counter()
    command = [sys.executable, "-c", program, sys.executable, *arguments]
    cpu = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return cpu, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes a line")
    repeats = parser.parse_args().repeats
    measured = [{name: seconds(arguments) for name, arguments in WORK.items()} for _ in range(repeats)]
    least = {name: [min(run[name][kind] for run in measured) for kind in (0, 1)] for name in WORK}
    base = least["import torch, lightning"][0]
    print(f"{'':32}{'CPU s':>8}{'ratio':>8}{'wall s':>8}")
    for name, (cpu, wall) in least.items():
        print(f"{name:32}{cpu:8.2f}{cpu / base:8.2f}{wall:8.2f}")


if __name__ == "__main__":
    main()
