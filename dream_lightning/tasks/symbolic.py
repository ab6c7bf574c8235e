"""Math-Verify in a process that can be killed.

Its own time limit is `signal.alarm`, which fails outside the main thread and cannot interrupt one long C call such as
9**9**9**9. The subprocess is this file run as a script (0.6 s to start, 60 MB). It starts on first use.
"""

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading

CHECK_SECONDS = 5.0  # CPU time, so that no verdict depends on the machine's load; a usual check takes 5-50 ms
WAIT_SECONDS = 120.0  # wall-clock time, on a busy machine or to import sympy from a cold network disk


class SymbolicChecker:
    """Client of the subprocess: a line of JSON in, "1" or "0" out. After a timeout it is started again."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, target: str) -> bool:
        """Whether Math-Verify's `verify(gold, target)` holds; False with a warning if it exceeds the CPU time."""
        with self._lock:
            self._start()
            self._process.stdin.write(json.dumps([CHECK_SECONDS, gold, target]).encode() + b"\n")
            reply = self._reply()
            if not reply:  # timeout, or out of memory
                self.stop()
                logging.getLogger(__name__).warning(
                    "no verdict after computing %g s, so False: %.80r %.80r", CHECK_SECONDS, target, gold
                )
            return reply == b"1\n"

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._reply() != b"ready\n":
            self.stop()
            from dream_lightning.errors import UserError  # the subprocess must not import the package

            raise UserError("Math-Verify did not start, see its error above: pip install 'math-verify>=0.9'")

    def _reply(self) -> bytes:
        in_time = select.select([self._process.stdout], [], [], WAIT_SECONDS)[0]
        return self._process.stdout.readline() if in_time else b""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


checker = SymbolicChecker()
atexit.register(checker.stop)
os.register_at_fork(after_in_child=checker.__init__)  # a child must not write into its parent's pipe


def _serve() -> None:
    import resource

    from math_verify import parse, verify

    logging.disable()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    sys.stdout = sys.stderr  # what sympy prints must not be read as a reply
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # 10^(10^10) asks for 4 GB
    parse(r"$\frac{1}{2}$", parsing_timeout=None)  # builds the grammar's tables
    replies.write(b"ready\n")
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process, also in the middle of a long C call
        gold, target = (parse(f"${text}$", parsing_timeout=None) for text in texts)
        reply = b"1\n" if verify(gold, target, timeout_seconds=None) else b"0\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply)


if __name__ == "__main__":
    _serve()
