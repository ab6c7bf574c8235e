"""Math-Verify in a process that can be killed.

Its own time limit is `signal.alarm`, which fails outside the main thread and cannot interrupt one long C call such as
9**9**9**9. The subprocess is this file run as a script (0.6 s to start, 60 MB). It starts on first use.
"""

import atexit
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial

CHECK_SECONDS = 5.0  # CPU time, so that no verdict depends on the machine's load; a usual check takes 5-50 ms
TOTAL_SECONDS = 600.0  # CPU time of all checks of a validation
WAIT_SECONDS = 120.0  # wall-clock time, on a busy machine or to import sympy from a cold network disk


class SymbolicChecker:
    """Client of the subprocess: a line of JSON in, the verdict and its CPU seconds out. Started again when it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.restart_clock(math.inf)

    def restart_clock(self, seconds: float | None = None) -> None:
        """Allow so much CPU time from here on, by default `TOTAL_SECONDS` for a validation."""
        self._seconds_left, self.skipped = TOTAL_SECONDS if seconds is None else seconds, 0

    def warn_skipped(self) -> None:
        if self.skipped:
            logging.getLogger(__name__).warning(
                "%d answers were not graded and not scored: grading took %g s of CPU time", self.skipped, TOTAL_SECONDS
            )

    def equal(self, gold: str, target: str) -> bool | None:
        """Whether Math-Verify's `verify(gold, target)` holds; False with a warning if it exceeds the CPU time.

        None, counted in `skipped`, where nothing was decided: `TOTAL_SECONDS` are used up, the machine gave the
        subprocess no time in `WAIT_SECONDS`, or something else killed it three times.
        """
        with self._lock:
            for _ in range(3):
                if self._seconds_left <= 0:
                    break
                reply, ended = self._ask(gold, target)
                if reply:
                    verdict, seconds = reply.split()
                    self._seconds_left -= float(seconds)
                    return verdict == b"1"
                if ended not in (None, -9, -signal.SIGTERM):  # its CPU time, or out of memory
                    self._seconds_left -= CHECK_SECONDS
                    logging.getLogger(__name__).warning(
                        "no verdict after computing %g s, so False: %.80r %.80r", CHECK_SECONDS, target, gold
                    )
                    return False
            self.skipped += 1
            return None

    def _ask(self, gold: str, target: str) -> tuple[bytes, int | None]:
        """The reply, or b"" and the exit status, None if the subprocess was too slow."""
        self._start()
        with suppress(OSError):  # it was killed: its output ends, too
            self._process.stdin.write(json.dumps([CHECK_SECONDS, gold, target]).encode() + b"\n")
        if (reply := self._reply(CHECK_SECONDS)) is None:
            self.stop()
            return b"", None
        return reply, None if reply else self.stop()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._reply() != b"ready\n":
            self.stop()
            from dream_lightning.errors import UserError  # the subprocess must not import the package

            raise UserError("Math-Verify did not start, see its error above: pip install 'math-verify>=0.9'")

    def _reply(self, cpu_seconds: float = math.inf) -> bytes | None:
        """A line, b"" if the subprocess has ended, None if it was too slow."""
        process, lines, end = self._process, [], time.monotonic() + WAIT_SECONDS
        reader = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)
        reader.start()
        if not hasattr(signal, "setitimer"):  # on Windows no timer ends the subprocess
            import psutil

            with suppress(psutil.NoSuchProcess):
                usage = psutil.Process(process.pid).cpu_times
                most = sum(usage()[:2]) + cpu_seconds
                while reader.is_alive() and time.monotonic() < end:
                    reader.join(0.1)
                    if sum(usage()[:2]) > most:
                        process.kill()
        reader.join(max(end - time.monotonic(), 0))
        return lines[0] if lines else None

    def stop(self) -> int | None:
        """End the subprocess; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # does not change the status of one that has ended
        process.communicate()
        return process.returncode


checker = SymbolicChecker()
atexit.register(checker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=checker.__init__)  # a child must not write into its parent's pipe


def _serve() -> None:
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, grader, parse, verify

    logging.disable()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    sys.stdout = sys.stderr  # what sympy prints must not be read as a reply
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # 10^(10^10) asks for 4 GB
    # No units: they take letters for units. No fallback: it takes a number out of a formula that does not parse.
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)]
    compare_numbers = grader.sympy_numeric_eq

    def numeric_eq(a, b, float_rounding, numeric_precision):
        """Math-Verify's absolute tolerance, but no two numbers are equal that differ by more than 1e-6 of them."""
        if not compare_numbers(a, b, float_rounding, numeric_precision):
            return False
        if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
            return True
        a, b = (sympy.N(number.doit(), 20) for number in (a, b))
        return a == b or bool(abs(a - b) <= 1e-6 * max(abs(a), abs(b)) or {a, 100 * a} & {b, 100 * b})

    grader.sympy_numeric_eq = numeric_eq

    def read(text: str) -> list:
        options = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
        return [meaning(value) for value in parse(f"${text}$", config, **options)]

    def meaning(value):
        """`i` as the imaginary unit; "x < 2 or x > 5" as a union of intervals."""
        if isinstance(value, sympy.FiniteSet) and value.args and all(map(grader.is_relation, value.args)):
            parts = [grader.unwrap_fcs(part) for part in value.args]
            if not any(isinstance(part, sympy.Eq) for part in parts) and len(value.free_symbols) == 1:
                return sympy.Union(*(part.as_set() for part in parts))
        units = [symbol for symbol in getattr(value, "free_symbols", ()) if symbol.name == "i"]
        return value.subs({symbol: sympy.I for symbol in units}) if units else value

    read(r"\frac{1}{2}")  # builds the grammar's tables
    set_timer = partial(signal.setitimer, signal.ITIMER_PROF) if hasattr(signal, "setitimer") else lambda seconds: None
    replies.write(b"ready\n")
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        start = time.process_time()
        set_timer(seconds)  # ends the process, also in the middle of a long C call
        gold, target = map(read, texts)
        verdict = verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None)
        set_timer(0)
        replies.write(b"%d %.4f\n" % (verdict, time.process_time() - start))


if __name__ == "__main__":
    _serve()
