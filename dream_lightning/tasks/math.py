"""From a response to its answer, and from two answers to "the same or not".

`is_equivalent` decides most pairs by text and exact fractions. The rest goes to Math-Verify in a helper process:
Math-Verify's own limit is `signal.alarm`, which fails outside the main thread, takes SIGALRM from the trainer, and
cannot interrupt one long C call such as 9**9**9**9. A process can be killed, in any thread. The helper is this very
file run as a script (standard library and Math-Verify only: 0.6 s to start, 60 MB), started on first use.
"""

import atexit
import importlib.util
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache

logger = logging.getLogger(__name__)

MAX_SYMBOLIC_CHARS = 400  # the longest of the 500 MATH-500 answers has 53
CHECK_SECONDS = 5.0  # of the processor's time, so that no verdict hangs on what else runs; a usual check takes 5-50 ms
WAIT_SECONDS = 120.0  # of the clock, for a check on a busy machine or importing sympy from a cold network disk

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])-\s?)?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|\\?\$?(?<![\w.])(?:{NUMBER})(?:\s?/\s?\d+)?)(?:\s?\\?%)?"
)
ANCHOR = re.compile(
    r"(?:\bthe\s+(?:final\s+|correct\s+)?answer\s+is|\bfinal\s+answer\s+is|^[^\w\n]{0,8}answer\s+is|####(?!#)|"
    r"^[^\w\n]{0,8}(?:the\s+)?(?:final\s+)?answer(?:\s*\*\*)?\s*:(?:[^\w\n]{0,8}the\s+(?:final\s+)?answer\s+is)?)"
    r"(?:[ :*]{0,8}\b(?:thus|therefore|simply|equal to)\b)?[ \t:=]*\n?(?P<text>[^\n]{1,200}?)(?=\.?[ \t]*$|\.\s)",
    re.IGNORECASE | re.MULTILINE,
)
TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
UNIT = re.compile(  # words of three letters and more are units, unless they carry a value
    r"(?:\s*\^?\s*\{?\\circ\}?|°|\s*(?:cm|mm|km|kg|mg|ml|ft|lb|mi)(?:/[a-z]{1,3})?(?:\^\{?\d\}?)?|"
    r"\s+(?!pi|sqrt|sin|cos|tan|log|exp|mod|hundred|thousand|[mbtr]+illion|dozen|alpha|beta|gamma|delta|theta|lambda|omega)"
    r"[A-Za-z]{3}[A-Za-z /]*(?:\^\{?\d\}?)?)$"
)
RATIONAL = re.compile(
    r"([+-]?)(?:(\d+)(?: (?=\d+/)|(?=\\frac)))?(?:\\frac\{(\d+)\}\{(\d+)\}|(\d*\.?\d+(?:[eE][+-]?\d{1,3})?)(?:/(\d+))?)"
)
POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|\*|×|x) ?10\^(?:\{([+-]?\d{1,3})\}|(\d{1,3}))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
TRUTH = {"yes": "true", "no": "false"}


def split_thinking(text: str) -> tuple[str | None, str]:
    """Splits "<think>…</think>…" into (thinking, rest), both stripped; without tags: (None, text unchanged).

    The last `</think>` divides; its opening tag may be missing. A `<think>` left open means that the model never
    finished: everything is thinking and the rest is "".
    """
    head, closing, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return text.replace("<think>", "").strip(), ""
    if not closing:
        return None, text
    return head.replace("<think>", "").strip(), rest.strip()


def extract_answer(text: str) -> str | None:
    r"""The answer that a response states, or None where it states none ("unparsed").

    Only what follows the thinking is read (nothing, if `<think>` stays open). In this order, the last one of a kind:

    1. `\boxed{…}` or `\fbox{…}` with balanced braces, or `\boxed 5`; any content. A box cut off midway is skipped.
    2. The text up to the end of the sentence or line after "(the) final answer is", "the answer is", "Answer:" at the
       start of a line, or GSM8K's "####"; at most 100 characters, any content (letters, crossword words).
    3. The last number: sign, thousands separators, decimals, 3/4, \frac{3}{4}, percent.
    """
    _, text = split_thinking(text)
    stated = _stated_answer(text)
    if stated is not None:
        return stated
    numbers = LAST_NUMBER.findall(text.replace("−", "-"))
    return re.sub(r"\\?\$|\\(?=%)|\s", "", numbers[-1]) if numbers else None


def reference_answer(solution: str) -> str | None:
    """What a data set's solution field can be scored against, or None.

    A plain answer stays as it is (one line, up to 200 characters and 8 words). A worked solution counts only through
    rules 1 and 2 of `extract_answer`, never through its last number; a proof gives None. Idempotent on plain answers.
    """
    solution = solution.strip()
    stated = _stated_answer(solution)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", solution)
    if stated is None:
        return solution if solution and "\n" not in solution and len(solution) <= 200 and len(words) <= 8 else None
    if r"\boxed" not in solution and not re.search(r"[\dA-Z\\]", stated):
        return None  # prose: "which means the final answer is exact."
    left, _, right = stated.rpartition("=")  # "so the answer is 8+1=9"
    return stated if re.search(r"(?<![\\A-Za-z])[A-Za-z]", left) else right.strip()


@lru_cache(maxsize=4096)  # the metric and the predictions file ask about the same pairs
def is_equivalent(prediction: str, reference: str) -> bool:
    """Whether two extracted answers mean the same. Not symmetric: Math-Verify follows the form of the reference.

    1. The same text, after LaTeX spacing and dollar signs; words without case and punctuation; choices "(C)" = "C",
       "A, B" = "AB"; yes = true, no = false.
    2. Two rational numbers: exactly, without thousands separators, currency and units; 50 % is 50 or 0.5. A decimal of
       at least 6 significant digits may also be the other one rounded. Nothing else is asked.
    3. Math-Verify (`verify(gold, target)`). Over 400 characters, or undecided after 5 seconds of computing: False, with
       a warning.

    Raises:
        ImportError: step 3 is reached and math-verify is not installed.
    """
    ours, gold = _clean(prediction), _clean(reference)
    if not ours or not gold:
        return False
    if ours == gold:
        return True
    ours_words, gold_words = _words(ours, gold), _words(gold, ours)
    if ours_words is not None and gold_words is not None:
        return ours_words == gold_words
    ours_number, gold_number = _rational(ours), _rational(gold)
    if ours_number is not None and gold_number is not None:
        return _same_number(ours, ours_number, gold, gold_number)
    if max(len(ours), len(gold)) > MAX_SYMBOLIC_CHARS:
        logger.warning("an answer of %d characters is not compared symbolically", max(len(ours), len(gold)))
        return False
    return _checker.equal(gold, ours)


def _stated_answer(text: str) -> str | None:
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\.,]+))", text))):
        content = box["bare"] or _balanced(text, box.end())
        if content is not None and content.strip():
            return content.strip()
    for anchor in reversed(list(ANCHOR.finditer(text))):
        marked = re.match(r"\s*\*\*(.+?)\*\*|[A-Za-z ,]*\$([^$]+)\$[\s*]*$", anchor["text"])
        stated = (marked[1] or marked[2] if marked else anchor["text"]).strip(" \t*$.,;:`")
        if 0 < len(stated) <= 100:
            return stated
    return None


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; None if none does within 1,000."""
    depth = 1
    for brace in BRACE.finditer(text, start, start + 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _clean(answer: str) -> str:
    """Without dollar signs and LaTeX spacing; spaces stay only between words and between digits ("1 1/2")."""
    answer = answer.strip().strip("*`").replace("−", "-").replace("\\$", "").replace("$", "").replace("\\%", "%")
    answer = re.sub(r"\\!\s*", "", answer)
    answer = re.sub(r"(?<!\\)\\[()\[\],;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|~", " ", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", answer)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"\s+", " ", answer)).rstrip(".")


def _words(answer: str, other: str) -> str | None:
    """Words or choice letters without case and punctuation; None if `answer` is mathematics."""
    text = TEXT_MACRO.sub(r"\1", answer)
    choice = re.match(r"\(?([A-Ja-j])(?:\)|[.:](?=\s))", text)
    if choice and re.fullmatch(r"\W*[A-J]\W*", TEXT_MACRO.sub(r"\1", other)):
        return choice[1].casefold()  # "(B) 3.719 Bq" where "B" is asked
    if re.search(r"[\d\\^_=+*/<>|{}]|(?<![A-Za-z]{2})-|-(?![A-Za-z]{2})", text) or not re.search("[A-Za-z]", text):
        return None
    if re.fullmatch(r"\W*[A-J]\b(?:\W|\b(?:and|[A-J])\b)*", text):
        text = text.replace("and", "")
    plain = "".join(c for c in text.casefold() if c.isalnum())
    return TRUTH.get(plain, plain)


def _rational(answer: str) -> Fraction | None:
    if len(answer) > 200:  # the patterns below are quadratic
        return None
    text = TEXT_MACRO.sub(r" \1", answer).rstrip("% ")
    text = POWER_OF_TEN.sub(lambda match: "e" + (match[1] or match[2]), text)
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    number = RATIONAL.fullmatch(UNIT.sub("", text))
    if number is None:
        return None
    sign, whole, top, bottom, decimal, under = number.groups()
    if int(bottom or under or 1) == 0:
        return None
    value = int(whole or 0) + Fraction(top or decimal) / int(bottom or under or 1)
    return -value if sign == "-" else value


def _same_number(ours: str, ours_value: Fraction, gold: str, gold_value: Fraction) -> bool:
    if ours_value == gold_value:
        return True
    if ("%" in ours) != ("%" in gold):
        return ours_value / 100 == gold_value if "%" in ours else ours_value == gold_value / 100
    for text in (ours, gold):
        places = re.search(r"(\d*)\.(\d+)", text)
        if places and "/" not in text and len((places[1] + places[2]).lstrip("0")) >= 6:
            error = abs(ours_value - gold_value)
            return error <= Fraction(1, 2 * 10 ** len(places[2])) and error <= abs(gold_value) / 100_000
    return False


class _SymbolicChecker:
    """The helper process: one line of JSON in, one line "1" or "0" out. Out of time it ends, and is started again."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked data worker must not talk into its parent's pipe
        self._lock = threading.Lock()

    def equal(self, gold: str, target: str) -> bool:
        with self._lock:
            process = self._running()
            process.stdin.write(json.dumps([CHECK_SECONDS, gold, target]).encode() + b"\n")
            in_time = select.select([process.stdout], [], [], WAIT_SECONDS)[0]
            reply = process.stdout.readline() if in_time else b""
            if not reply:  # out of time, or out of memory and gone
                self.stop()
                logger.warning(
                    "no verdict after computing %g s, counted as different: %.80r %.80r", CHECK_SECONDS, target, gold
                )
            return reply == b"1\n"

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing mathematical answers needs math-verify: pip install 'math-verify>=0.9'")
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._process, self._owner = process, os.getpid()
        if not select.select([process.stdout], [], [], WAIT_SECONDS)[0] or process.stdout.readline() != b"ready\n":
            self.stop()
            raise RuntimeError(f"Math-Verify did not start in {command}: see its error above")
        return process

    def stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_checker = _SymbolicChecker()
atexit.register(_checker.stop)


def _serve() -> None:
    import resource

    from math_verify import parse, verify

    logging.disable()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    sys.stdout = sys.stderr  # whatever sympy prints is not a reply
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
