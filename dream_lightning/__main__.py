"""The program `dream-lightning`, the same as `python -m dream_lightning`."""

import os
import sys

from dream_lightning.commands import check_command, program_help
from dream_lightning.errors import UserError


def main() -> None:
    # OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores of other programs, and on a
    # busy machine each waits for one that does not run: training becomes many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "win32":  # whose code pages, the encoding of files and pipes, lack most signs
        for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
            stream.reconfigure(encoding="utf-8", errors="replace")
    command = (sys.argv[1:] or ["--help"])[0]
    if command in ("-h", "--help"):
        print(program_help())
        return
    try:
        check_command(command)
    except UserError as error:
        sys.exit(f"error: {error}")
    from dream_lightning.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
