"""The answer that a response states: tags, boxes, "the answer is …", the last formula or number."""

import re
from collections.abc import Iterator
from itertools import islice

# full-width ASCII and CJK punctuation; minus and en dash
FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3002: ". ", 0x3001: ", ", 0x2212: "-", 0x2013: "-"}
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>-?\d+(?:[.,/]\d+)*|[A-Z]\b))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
PLACEHOLDER = re.compile(r"(?:your |final |the )*(?:answer|result)|\.+|…|\\l?dots|\s*", re.IGNORECASE)
JOINT = re.compile(  # between the boxes of one answer: "and", "or", a comma, or next to nothing
    r"(?!.*\b(?:no|not|wait|but|so|thus|then|hence|therefore|actually|oops|gives|get)\b)"
    r"(?=.{0,9}$|.*(?:[,;]|\band\b|\bor\b))[^.!?\n]{0,70}",
    re.IGNORECASE,
)

FORMULA = re.compile(
    r"\$\$(?P<a>[^$]+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\\d])\$(?P<d>(?:\\\$|[^$\n])+?)(?<!\\)\$(?!\d)",
    re.DOTALL,
)
NUMBER = (
    r"(?:\d{1,3}(?:[ _]\d{3})+(?:\.\d+)?(?!\d)|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?(?!\d)|"
    r"\d+:\d+(?:\s?[AaPp]\.?[Mm]\b\.?)?|\d+(?:[.,]\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
)
LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])-\s?)?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|\\?[$€£¥₹]?(?<![A-Za-z\d_.])"
    rf"(?:\d+ \d+/\d+|(?:{NUMBER})(?:π|√\d+)?(?:\s?/\s?\d+)?)|[(\[]-?[\d./]+(?:, ?-?[\d./]+)+[)\]])"
    rf"(?:\s?(?:\*|×|x|\\times)\s?10\^\{{?-?\d+\}}?)?(?:\s?\\?%)?"
)
LETTER = r"\(?[A-J]\b\)?(?!['’]| [a-z])"
STRONG = re.compile(
    rf"####(?!#)|(?<![A-Za-z])(?:(?:answers?|ans)\b(?: to [^.\n]{{1,60}}?(?= is))?[\s*_\"']*"
    rf"(?:\b(?:is|are|was|would be|should be)\b|[:=]|(?=\$|\\[\[(])|(?<=\s)(?=(?-i:{LETTER})))"
    r"|(?:(?:réponse|respuesta|resposta|risposta) (?:est|es|é|è)|antwort ist|lautet)\b)"
    r"|(?:答案|答え|정답)[是为為选はが은이]?|选(?=[:\s]*[A-J](?![A-Za-z]))|^[#*\s]{1,8}(?:final )?answer[*\s]*$",
    re.IGNORECASE | re.MULTILINE,
)
WEAK = re.compile(
    rf"\b(?:option|choice)(?: is)?[:=]?[ *]*(?=(?-i:{LETTER}))|^\W{{0,8}}result\W{{0,4}}:|"
    rf"^(?=\W{{0,3}}(?-i:[A-J])\W{{0,3}} is (?:the )?(?:correct|right|best))",
    re.IGNORECASE | re.MULTILINE,
)
LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|hence|simply|equal to|about|approximately|option|choice|the (?:final )?answer is)\b"
    r"[\s,:]*)+",
    re.IGNORECASE,
)
REASON = re.compile(  # what may follow an answer in its sentence
    r"\W? is (?:the )?(?:correct|right|best)\b"
    r"|,?\s+(?:because|since|as|which|in|and not|not)\s|,\s+(?:so|it|where|with|thus|but)\b|;\s+(?=[a-z])"
    r"|\s+\((?!mod|if|when|for|where|otherwise)(?=[a-z\d]+ )|\s+[\"}]|,\s*\""
)
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\\)[.!?](?:\s|$)")
CLAUSE = re.compile(r"^.*\b(?:is|are|was|be|equals|it's|that's)\s+(?=\S)", re.IGNORECASE | re.DOTALL)
MATH_WORD = r"and|or|if|mod|pi|sqrt|exp|log|ln|sin|cos|tan|sec|csc|cot|arc(?:sin|cos|tan)|lim|min|max|gcd|lcm|am|pm"
WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{MATH_WORD})\b)(?:[^\W\d_]{{2,}}|[\u3040-\u9fff])")
UNIT_OF = re.compile(r"\d[\d.,:]*[^\W\d_ ]{0,3}(?: [^\W\d_/]+){1,4}")  # "34 apples", "2:30 pm"
MACRO = re.compile(r"\\(?:begin|end|text\w*|mbox|math\w+|operatorname)\s*\{[^{}]*\}")
EDGE = ' \t\n*$,;:`"_'


def stated_answer(text: str) -> str | None:
    """The last `<answer>`, else the last boxes, else the last "the answer is …"; None if there is none."""
    text = fold(text)
    for tagged in reversed(TAG.findall(text)):
        if tagged.strip():
            return stated_answer(tagged) or tagged.strip()
    if boxed := _boxed(text):
        return boxed
    for anchors in (STRONG, WEAK):
        for anchor in islice(reversed(list(anchors.finditer(text))), 20):
            if stated := _pick(_statement(text, anchor.end()), anchored=True):
                return stated
    return None


def last_answer(text: str) -> str | None:
    """A short response as a whole, else the last sentence's formula, number or, in a single line, words."""
    text = fold(text).strip()
    if 0 < len(text) <= 200 and not WORD.search(MACRO.sub("", text)) and r"\boxed" not in text:
        whole = FORMULA.fullmatch(text)
        return (whole[whole.lastgroup] if whole else text).strip(" \t\n*`").rstrip(".") or None
    text = re.sub(r"\\(?:boxed|fbox)\s*\{?", "", text)
    for sentence in reversed(list(_sentences(text[-2000:]))):
        if re.search(r"\d", sentence) or _formulas(sentence):
            return _pick(sentence)
    short = "\n" not in text and len(text) <= 200 and len(text.split()) <= 25
    return _pick(text) if short and "\\" not in text else None


def fold(text: str) -> str:
    """Full-width characters as ASCII, "minus 5" as "-5"; special tokens removed."""
    return re.sub(r"\b(?:minus|negative) (?=\$?\d)", "-", SPECIAL_TOKEN.sub("", text).translate(FOLD))


def _boxed(text: str) -> str | None:
    found: list[str] = []
    start = len(text)
    for box in reversed(list(BOX.finditer(text))):
        content = box["bare"] or _balanced(text, box.end())
        if content is None or PLACEHOLDER.fullmatch(content.strip()):
            continue
        end = box.end() if box["bare"] else box.end() + len(content) + 1
        if found and not (end <= start <= end + 70 and JOINT.fullmatch(text, end, start)):
            break
        if content.strip() not in found[-1:]:
            found.append(content.strip())
        start = box.start()
    return ", ".join(reversed(found)) or None


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; None if none does within 1,000."""
    depth = 1
    for brace in BRACE.finditer(text, start, start + 1000):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _sentences(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        start = 0
        for end in SENTENCE_END.finditer(line):
            yield line[start : end.start()]
            start = end.end()
        yield line[start:]


def _statement(text: str, start: int) -> str:
    """The formula or else the sentence at `start`, of at most 200 characters."""
    start = re.compile(r"[\s:=*_\"]*").match(text, start).end()
    if (formula := FORMULA.match(text, start)) and "\n" in formula[0]:
        return formula[0]
    return next(_sentences(re.sub(r"\\(?:boxed|fbox)\s*\{?", "", text[start : start + 200].split("\n")[0])))


def _formulas(sentence: str) -> list[re.Match]:
    """The formulas in a sentence; not the text between two prices."""
    found = FORMULA.finditer(sentence)
    return [one for one in found if not re.search(r"(?<![\\A-Za-z])[a-z]{2,} +[a-z]{2,}", MACRO.sub("", one[0]))]


def _pick(sentence: str, anchored: bool = False) -> str | None:
    """The answer in a sentence: bold text, formulas joined by "and", a letter, else the last number, else words."""
    bold = re.search(r"\*\*([^*]+?)\*\*(?!.*\*\*)", sentence)
    if bold and (anchored or re.search(r"\d|^[A-J]$", bold[1])):
        sentence = bold[1]
    sentence = LEAD.sub("", sentence.strip(EDGE.replace("$", "")), count=1)
    if anchored:
        if re.match(r"not\b", sentence):
            return None
        sentence = REASON.split(sentence, maxsplit=1)[0].strip()
    if (formulas := _formulas(sentence)) and not re.search(r"\s\$?\d", sentence[formulas[-1].end() :]):
        answer, start = "", len(sentence)
        for formula in reversed(formulas):
            if answer and not re.fullmatch(r"\s*(?:,|;|,?\s*(?:and|or))\s*", sentence[formula.end() : start]):
                break
            answer = formula[formula.lastgroup].strip(" \n,").rstrip(".") + (answer and ", ") + answer
            start = formula.start()
        return answer
    sentence = sentence.strip(EDGE).rstrip(".")
    is_answer = re.match(LETTER + r"(?:$|[).:,])", sentence) or not WORD.search(MACRO.sub("", sentence))
    if 0 < len(sentence) <= 100 and (is_answer or UNIT_OF.fullmatch(sentence)):
        return sentence
    if numbers := list(LAST_NUMBER.finditer(sentence)):
        if anchored and not re.search(r"\b(?:is|are|:|equals)\b|, ", sentence) and not sentence[0].isdigit():
            return sentence if len(sentence) <= 100 else None  # "Room 5", "(B) 3.7 Bq"
        return re.sub(r"\\(?=%)|^\\?\$", "", numbers[-1][0]).strip()
    return CLAUSE.sub("", sentence)[:100] or None
