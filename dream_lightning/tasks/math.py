"""Mathematics: the answer that a response states, and whether two answers mean the same."""

import logging
import re
from fractions import Fraction

from dream_lightning.tasks.registry import TASKS, Task
from dream_lightning.tasks.symbolic import checker

MAX_SYMBOLIC_CHARS = 400  # the longest of the 500 MATH-500 answers has 53

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


def extract_answer(text: str) -> str | None:
    r"""The answer in a text (a response without its thinking), or None. The last one of the first kind that is there:

    1. `\boxed{…}` or `\fbox{…}` with balanced braces, or `\boxed 5`; any content. A box cut off midway is skipped.
    2. The sentence or line after "(the) final answer is", "the answer is", "Answer:" at the start of a line, or GSM8K's
       "####"; at most 100 characters, any content.
    3. The last number: sign, thousands separators, decimals, 3/4, \frac{3}{4}, percent.
    """
    if (stated := stated_answer(text)) is not None:
        return stated
    numbers = LAST_NUMBER.findall(text.replace("−", "-"))
    return re.sub(r"\\?\$|\\(?=%)|\s", "", numbers[-1]) if numbers else None


def reference_answer(solution: str) -> str | None:
    """What a data set's solution field can be scored against, or None.

    A plain answer (one line, up to 200 characters and 8 words) is returned unmodified. In a worked solution only rules
    1 and 2 of `extract_answer` apply, never its last number; a proof gives None. Idempotent on plain answers.
    """
    solution = solution.strip()
    stated = stated_answer(solution)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", solution)
    if stated is None:
        return solution if solution and "\n" not in solution and len(solution) <= 200 and len(words) <= 8 else None
    if r"\boxed" not in solution and not re.search(r"[\dA-Z\\]", stated):
        return None  # prose: "which means the final answer is exact."
    left, _, right = stated.rpartition("=")  # "so the answer is 8+1=9"
    return stated if re.search(r"(?<![\\A-Za-z])[A-Za-z]", left) else right.strip()


def is_equivalent(prediction: str, reference: str) -> bool:
    """Whether two extracted answers mean the same. Not symmetric: Math-Verify follows the form of the reference.

    1. The same text without LaTeX spacing; words without case and punctuation; "(C)" = "C", "A, B" = "AB", yes = true.
    2. Rational numbers exactly, without thousands separators, currency and units; 50 % is 50 or 0.5. A decimal of 6
       significant digits or more may be the other one rounded. Decides alone if both are numbers.
    3. Math-Verify's `verify`, if installed (else UserError). Over 400 characters, or after 5 s of CPU time: False, with
       a warning.
    """
    ours, gold = _clean(prediction), _clean(reference)
    if ours == gold or not ours or not gold:
        return ours == gold != ""
    ours_words, gold_words = _words(ours, gold), _words(gold, ours)
    if ours_words is not None and gold_words is not None:
        return ours_words == gold_words
    ours_number, gold_number = _rational(ours), _rational(gold)
    if ours_number is not None and gold_number is not None:
        return _same_number(ours, ours_number, gold, gold_number)
    if (longest := max(len(ours), len(gold))) > MAX_SYMBOLIC_CHARS:
        logging.getLogger(__name__).warning("an answer of %d characters is not compared symbolically", longest)
        return False
    return checker.equal(gold, ours)


def stated_answer(text: str) -> str | None:
    """The last box, else the last "the answer is …", by rules 1 and 2 of `extract_answer`; None if there is none."""
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


def tagged_answer(text: str) -> str | None:
    """The last text in `<answer>` tags, as some puzzle prompts ask for, else the stated answer."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (tagged and tagged[-1].strip()) or stated_answer(text)


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; None if none does within 1,000."""
    depth = 1
    for brace in BRACE.finditer(text, start, start + 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _clean(answer: str) -> str:
    """Removes dollar signs and LaTeX spacing; keeps spaces only between words and between digits ("1 1/2")."""
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
    return {"yes": "true", "no": "false"}.get(plain, plain)


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


TASKS["math"] = Task(extract_answer, is_equivalent, lambda example: reference_answer(example.reference or ""))
