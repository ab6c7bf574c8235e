"""Mathematics: the answer that a response states, and whether two answers mean the same."""

import logging
import re
from fractions import Fraction

from dream_lightning.tasks.registry import TASKS, Task
from dream_lightning.tasks.statement import fold, last_answer, stated_answer
from dream_lightning.tasks.symbolic import checker

MAX_SYMBOLIC_CHARS = 400  # the longest of the 500 MATH-500 answers has 53
MAX_NESTING = 14  # the parser is slow in deep brackets

TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
UNIT = re.compile(  # words of three letters and more are units, unless they carry a value
    r"(?:\s*\^\s*\{?\\circ\}?|\s*(?:cm|mm|km|kg|mg|ml|ft|lb|mi|(?<=\s)m/s)(?:/[a-z]{1,3})?(?:\^\{?\d\}?)?|"
    r"(?:(?<=e-\d)|(?<=e-\d\d)|(?<=e\d)|(?<=e\d\d)) ?[msgJNCWKAV](?:/s)?|"
    r"(?:\s+|(?=\())\(?(?!pi|sqrt|sin|cos|tan|log|exp|mod|half|third|quarter|dozen|hundred|thousand|[mbtr]+illion|alpha|"
    r"beta|gamma|delta|theta|lambda|omega|for|if|all|when|where|even|odd|otherwise)[A-Za-z]{3}[A-Za-z /]*\)?"
    r"(?:\^\{?\d\}?)?)$"
)
RATIONAL = re.compile(
    r"([+-]?)(?:(\d+)(?: (?=\d+/)|(?=\\frac)))?(?:\\frac\{(\d+)\}\{(\d+)\}|(\d*\.?\d+(?:[eE][+-]?\d{1,3})?)(?:/(\d+))?)"
)
POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|\*|×|x) ?10\^(?:\{([+-]?\d{1,3})\}|(\d{1,3}))")
THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])|(?<![\d _])\d{1,3}(?:[ _]\d{3})+(?![\d _])")
DECIMAL_COMMA = re.compile(r"(-?\d{1,3}(?:\.\d{3})*),(\d{1,2})")
SAME = re.compile(r"(?<!\d) |\{(\w)\}")  # spaces and braces that mean nothing
BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
TIME = re.compile(r"(\d{1,2}:\d\d) ?([ap])\.? ?m\.?", re.IGNORECASE)
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
NAMES = "pi|exp|ln|log|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|theta|alpha|beta|gamma|lambda|infty|infinity|inf"
ARGUMENT = r"(\{[^{}]*\}|\\[A-Za-z]+|\w)"
SIGNS = {"½": r"\frac{1}{2}", "π": r"\pi", "∞": r"\infty", "∪": r"\cup", "∩": r"\cap", "∈": r"\in", "≤": r"\le"}
SIGNS |= {"≥": r"\ge", "≠": r"\ne", "±": r"\pm", "×": r"\times", "·": r"\cdot", "÷": "/", "√": r"\sqrt", "°": r"^\circ"}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
REWRITES = [  # plain text → the LaTeX that means it
    (re.compile(r"\*\*|\^\^"), "^"),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+"), lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}"),
    (re.compile("|".join(SIGNS)), lambda match: SIGNS[match[0]] + " "),
    (re.compile(r"(?<=[\w\s])(?:或|和)(?=[\w\s])"), " or "),
    (
        re.compile(rf"(?<![\\A-Za-z])(?:{NAMES})(?![A-Za-z])"),
        lambda match: "\\infty" if match[0][:3] == "inf" else "\\" + match[0] + " ",
    ),
    (re.compile(r"\^(-?\d{2,}|-\d)"), r"^{\1}"),
    (re.compile(r"\\!\s*|\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\[()\[\],;: ]|\\q?quad(?![A-Za-z])|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[cdt]frac"), r"\\frac"),
    (
        re.compile(rf"\\frac\s*{ARGUMENT}\s*{ARGUMENT}"),
        lambda m: "\\frac" + "".join(f"{{{a.strip('{}')}}}" for a in m.groups()),
    ),
    (re.compile(r"\\?sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:text|mathrm)\{([ei])\}"), r"\1"),
    (re.compile(r"(?<=\d)\.(?=/)"), ""),
    (re.compile(r"(?<=\d)i\b"), " i"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"_(\w) "), r"_{\1}"),
    (re.compile(r"(?<!\w) | (?!\w)"), ""),
    (re.compile(TEXT_MACRO.pattern + r"(\^\{?\d\}?)?$"), r" \1\2"),
]


def extract_answer(text: str) -> str | None:
    r"""The answer in a text (a response without its thinking), or None. The last one of the first kind that is there:

    1. `<answer>…</answer>`.
    2. `\boxed{…}`, `\fbox{…}` or `\boxed 5`, with balanced braces; boxes that "and", "or" or a comma connects are one
       answer. A box that is empty or cut off is skipped.
    3. What follows "the answer is", "Answer:", "####", "答案是" or "Option": a formula, else the line or sentence.
    4. A response that is short and mathematics, as a whole; else the formula or number at the end of the last sentence
       that has one; else a line of up to 25 words.
    """
    return stated_answer(text) or last_answer(text)


def reference_answer(solution: str) -> str | None:
    """What a data set's solution field can be scored against, or None.

    A plain answer (one line, up to 200 characters and 12 words) is returned unmodified. In a worked solution only rules
    1 to 3 of `extract_answer` apply; a proof gives None. Idempotent on plain answers.
    """
    solution = solution.strip()
    stated = stated_answer(solution)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", solution)
    if stated is None:
        plain = solution and len(solution) <= 200 and len(words) <= 12 and ("\n" not in solution or not words)
        return solution if plain else None
    if r"\boxed" not in solution and not re.search(r"[\dA-Z\\]", stated):
        return None  # prose: "which means the final answer is exact."
    left, _, right = stated.rpartition("=")  # "so the answer is 8+1=9"
    return stated if re.search(r"(?<![\\A-Za-z])[A-Za-z]", left) else right.strip()


def is_equivalent(prediction: str, reference: str) -> bool | None:
    """Whether two extracted answers mean the same. Not symmetric: Math-Verify follows the form of the reference.

    1. The same text without LaTeX spacing; words without case and punctuation; "(C)" = "C", "A, B" = "AB", yes = true.
    2. Rational numbers exactly, without thousands separators, currency and units; 50 % is 50 or 0.5. A decimal of 6
       significant digits or more may be the other one rounded. Decides alone if both are numbers.
    3. Math-Verify's `verify`, if installed (else UserError). Over 400 characters, or after 5 s of CPU time: False, with
       a warning.

    Returns:
        None if it was not decided: see `SymbolicChecker.equal`.
    """
    ours, gold = _clean(prediction), _clean(reference)
    if not ours or not gold or re.sub(SAME, r"\1", ours) == re.sub(SAME, r"\1", gold):
        return bool(ours and gold)
    if (our_base := BASE.fullmatch(ours)) and (gold_base := BASE.fullmatch(gold)):
        return our_base.groups() == gold_base.groups()
    times = [TIME.sub(lambda match: match[1] + match[2].lower(), text) for text in (ours, gold)]
    if TIME.fullmatch(ours) or TIME.fullmatch(gold):
        return times[0] == times[1]
    ours_words, gold_words = _words(ours, gold), _words(gold, ours)
    if ours_words is not None and gold_words is not None:
        return ours_words == gold_words
    ours_number, gold_number = _rational(ours), _rational(gold)
    if (comma := DECIMAL_COMMA.fullmatch(ours)) and gold_number is not None:
        ours_number = Fraction(comma[1].replace(".", "") + "." + comma[2])  # "1.250,00"
    if ours_number is not None and gold_number is not None:
        return _same_number(ours, ours_number, gold, gold_number)
    ours, gold = (UNIT.sub("", text).strip() or text for text in (ours, gold))
    if re.search(r"\d \d", ours + gold):
        return False  # "3 4" is no number
    longest, deepest = max(len(ours), len(gold)), max(_nesting(ours), _nesting(gold))
    if longest > MAX_SYMBOLIC_CHARS or deepest > MAX_NESTING:
        message = "an answer of %d characters, %d brackets deep, is not compared symbolically"
        logging.getLogger(__name__).warning(message, longest, deepest)
        return False
    return checker.equal(gold, ours)


def _clean(answer: str) -> str:
    """Removes dollar signs and LaTeX spacing; keeps spaces only between words and between digits ("1 1/2")."""
    answer = fold(answer).strip().strip("*`")
    answer = re.sub(r"\\?[$€£¥₹]", "", answer).replace("\\%", "%")
    if answer.count("}") > answer.count("{"):
        answer = answer.rstrip("\\}")
    if len(answer) <= 1000:
        for pattern, replacement in REWRITES:
            answer = pattern.sub(replacement, answer)
        while doubled := re.fullmatch(r"\{(\{.*\}|[^{},]*)\}|\(\((.*)\)\)", answer):
            answer = doubled[1] or f"({doubled[2]})"
    return re.sub(r"^(?:=>?|⇒)\s*", "", answer.rstrip(".\\")).strip()


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _words(answer: str, other: str) -> str | None:
    """Words or choice letters without case and punctuation; None if `answer` is mathematics."""
    text = TEXT_MACRO.sub(r"\1", answer)
    choice = re.match(r"\(?([A-Ja-j])(?:\)|[.:,](?!\s?[A-J]\b)|\s(?=because|since))", text)
    if choice and re.fullmatch(r"\W*[A-J]\W*", TEXT_MACRO.sub(r"\1", other)):
        return choice[1].casefold()  # "(B) 3.719 Bq" where "B" is asked
    if re.search(r"[\d\\^_=+*/<>|{}]|(?<![A-Za-z]{2})-|-(?![A-Za-z]{2})", text) or not re.search("[A-Za-z]", text):
        return None
    if re.fullmatch(r"\W*[A-J]\b(?:\W|\b(?:and|[A-J])\b)*", text):
        text = text.replace("and", "")
    plain = "".join(c for c in re.sub(r"^(?:the|an?) (?=\w\w)", "", text.casefold()) if c.isalnum())
    return {"yes": "true", "no": "false"}.get(plain, plain)


def _rational(answer: str) -> Fraction | None:
    if len(answer) > 200:  # the patterns below are quadratic
        return None
    text = TEXT_MACRO.sub(r" \1", answer).strip().rstrip("% ")
    text = POWER_OF_TEN.sub(lambda match: "e" + (match[1] or match[2]), text)
    text = THOUSANDS.sub(lambda match: re.sub(r"[,_ ]", "", match[0]), text)
    if base := BASE.fullmatch(text):
        text = base[1]
    if repeating := re.fullmatch(r"(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\((\d+)\))", text):
        whole, once, *again = repeating.groups("")
        again = "".join(again)
        return Fraction(int(whole + once + again) - int(whole + once or 0), 10 ** len(once) * (10 ** len(again) - 1))
    text = UNIT.sub("", text)
    if text in NUMBER_WORDS.split():
        return Fraction(NUMBER_WORDS.split().index(text))
    number = RATIONAL.fullmatch(text)
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
