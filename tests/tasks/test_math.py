import itertools
import json
import runpy
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dream_lightning.errors import UserError
from dream_lightning.tasks import symbolic
from dream_lightning.tasks.math import extract_answer, is_equivalent, reference_answer


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 1. boxes
        (r"so \boxed{1} no, \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"), (r"\fbox{BEDLAM}", "BEDLAM"), (r"we get $\boxed 5$.", "5"),
        (r"\boxed{3} and then \boxed{4", "3"), (r"\boxed{}, the answer is 6", "6"),
        (r"\boxed{2} The final answer is 9.", "2"),
        # 2. stated answers
        ("The answer is 3. No: the final answer is $\\frac{1}{n}$.", r"\frac{1}{n}"),
        ("Final Answer: The final answer is **(C)**", "(C)"), ("**Answer:** BEDLAM", "BEDLAM"),
        ("Therefore, the answer is **BRAVADO** (7 letters).", "BRAVADO"),
        ("The answer is: 3.5. I hope it is correct.", "3.5"), ("so the answer is therefore 72 apples.\n", "72 apples"),
        ("She sold 24.\n#### 1,072", "1,072"), ("#### 1\n#### 2 ", "2"),
        # 3. the last number
        ("it costs $1,234.50 in 2 shops, or -3", "-3"), ("it costs $1,234.50.", "1,234.50"), ("so 5-3", "3"),
        ("about 3/4", "3/4"), (r"about \frac{3}{4}", r"\frac{3}{4}"), ("a rise of 12.5 %", "12.5%"), ("x = −7", "-7"),
        ("10. ", "10"), (r"about \$5", "5"), (r"about 5\%", "5%"),
        # nothing
        ("", None), ("I do not know.", None),
    ],
)  # fmt: skip
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 5000, "\n" * 50_000, "the answer is " * 5000, "the answer is a" + " " * 50_000 + "b",
        "1," * 30_000, "9" * 50_000, "- " * 30_000, "{" * 50_000, "<think>" * 10_000, "#" * 50_000,
        "answer:\n" * 5000, "$" * 50_000,
    ],
)  # fmt: skip
def test_extraction_is_not_quadratic_in_hostile_text(text):
    start = time.process_time()
    extract_answer(text), reference_answer(text)
    assert time.process_time() - start < 10  # a hang, not a timing: the worst takes 0.8 s


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("72", "72.0"), ("1,072", "1072"), ("$18", "18"), (r"\$32,\!348", "32348"), ("057", "57"),
        ("0.5", r"\frac12"),
        ("50%", "50"), (r"50\%", "0.5"), ("3/4", r"\dfrac{3}{4}"), ("1 1/2", r"1\frac{1}{2}"), ("1.5", "1 1/2"),
        (".5", "1/2"),
        (r"90^\circ", "90"), ("90 degrees", r"90^\circ"), (r"15\mbox{ cm}^2", "15"), (r"5.4 \text{ cents}", "5.4"),
        ("5cm", "5"), ("60 km/h", "60"),
        (r"-6 \times 10^{25}", "-6e+25"), ("0.333333", "1/3"), ("-.5", "-1/2"), ("+3", "3"),
        ("(C)", "C"), ("C.", r"\text{(C)}"), ("c", "C"), ("A, B, C", "ABC"), ("(A, B)", "AB"), ("A and B", "AB"),
        ("(B) 3.719 Bq", "B"),
        ("Incident room.", "INCIDENT ROOM"), ("air-tight", "AIRTIGHT"), (r"\text{Evelyn}", "Evelyn"), ("Yes", "True"),
        ("x=5", "5"), ("5", "x=5"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), ("q-p", "-p + q"),
        ("2, 1", "1,2"),
        (r"(b+2)(a+5)", "(a+5)(b+2)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"), (r"(3, 4]", "(3,4]"),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
        ("2^{10}", "1024"),
    ],
)  # fmt: skip
def test_equivalent(prediction, reference):
    assert is_equivalent(prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("", ""), ("", "5"), ("72", "73"), ("-5", "5"), ("1/3", "0.3333"), ("0.000000001", "0.000000002"),
        ("1.234567e-30", "2e-30"),
        ("1 1/2", "11/2"), ("5 million", "5"), ("2 pi", "2"), ("2x", "2"), ("1/0", "1/0.0"), ("0", "1/0"),
        ("167.3", "167.0"),
        ("B", "BD"), ("A", "B"), ("AC", "AB"), ("x-y", "x+y"), ("x - y", "xy"), ("BEDLAM", "BEDROOM"),
        ("No", "True"), ("5", "C"),
        ("C", "5"), ("(1,2)", "(2,1)"), (r"\sqrt{2}", r"\sqrt{3}"), ("(0, 1)", "[0, 1]"), ("a, b", "1, 2"),
        ("}{", "5"), ("\\", "5"),
    ],
)  # fmt: skip
def test_not_equivalent(prediction, reference):
    assert not is_equivalent(prediction, reference)


BOMBS = ["9**9**9**9", "9^{9^{9^{9}}}", "10^(10^10)", "((9^9)^9)^9^9", "(10^{10})!", "100000000!"]
LONG = ["9" * 100_000, "a b " * 30_000, "(" * 5000, "\\frac{" * 5000, "+" * 399, "\x00", "\n", "x^" * 150]


def test_hostile_answers_are_different_and_the_next_pair_is_compared(monkeypatch):
    monkeypatch.setattr(symbolic, "CHECK_SECONDS", 0.5)
    assert not any(is_equivalent(text, "7") for text in (*BOMBS, *LONG))
    assert not any(is_equivalent("7", text) for text in LONG)
    monkeypatch.undo()
    assert is_equivalent(r"\frac{2}{\sqrt{2}}", r"\sqrt{2}")  # the subprocess was started again


def test_undecided_pairs_are_logged(caplog, monkeypatch):
    monkeypatch.setattr(symbolic, "CHECK_SECONDS", 0.3)
    assert not is_equivalent("9^{9^{9^{9}}}", "8")
    assert "no verdict after computing 0.3 s" in caplog.text
    assert not is_equivalent("x+" * 300, "8")
    assert "600 characters" in caplog.text


def test_a_busy_machine_changes_no_verdict(monkeypatch):
    """The limit is on CPU time: a stopped subprocess does not use any."""
    monkeypatch.setattr(symbolic, "CHECK_SECONDS", 1.0)
    assert is_equivalent(r"\frac{6}{\sqrt{6}}", r"\sqrt{6}")
    process = symbolic.checker._process
    process.send_signal(signal.SIGSTOP)
    later = threading.Timer(1.5, process.send_signal, [signal.SIGCONT])
    later.start()
    assert is_equivalent(r"\frac{13}{\sqrt{13}}", r"\sqrt{13}")
    later.join()
    assert symbolic.checker._process is process


def test_works_outside_the_main_thread():
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda n: is_equivalent(rf"{n}/\sqrt{{{n}}}", rf"\sqrt{{{n}}}"), (3, 5, 7, 11)))


def test_a_missing_math_verify_is_an_error_only_where_it_is_needed(monkeypatch):
    module = runpy.run_path(symbolic.__file__, run_name="imported")
    assert module["checker"]._process is None and "math_verify" not in sys.modules
    symbolic.checker.stop()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert is_equivalent("3/6", "0.5")
    with pytest.raises(UserError, match="pip install 'math-verify"):
        is_equivalent("a + b + 1", "1 + b + a")


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("128", "128"), (" 167.0 ", "167.0"), ("ABC", "ABC"), ("Ic1ccc2ncccc2c1", "Ic1ccc2ncccc2c1"),
        ("True", "True"), ("", None),
        (r"\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix}", r"\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix}"),
        ("Long text.\n\nTherefore 3.\n\nAnswer: B", "B"),
        ("### Answer: INCIDENT ROOM \n ### Explanation: of 2 words", "INCIDENT ROOM"),
        ("Work.\nThe final answer is \\( \\boxed{ m = 1529 } \\).", "m = 1529"),
        ("a\nso the answer is $8+1=9$.", "9"),
        ("Step 1.\nStep 2: we have 17 points.\n\\(\\blacksquare\\)", None),
        ("First\nwhich means the final answer is exact.", None),
        ("We see that the set has many elements, so there are clearly exactly 12 of them.", None),
    ],
)  # fmt: skip
def test_reference_answer(solution, expected):
    assert reference_answer(solution) == expected


def test_math500_solutions_state_their_answers(shared):
    data = rows(shared("data/math500/test.jsonl"))
    right = sum(is_equivalent(extract_answer(row["solution"]) or "", row["answer"]) for row in data)
    assert len(data) == 500 and right >= 0.99 * len(data)  # measured: 500
    assert all(reference_answer(row["answer"]) == row["answer"] for row in data)


def test_math500_answers_differ_from_their_neighbors(shared):
    found = [row["answer"] for row in rows(shared("data/math500/test.jsonl"))][:200]
    equal = [(a, b) for a, b in itertools.pairwise(found) if is_equivalent(a, b)]
    assert all(a == b or {a, b} == {"5", "x=5"} for a, b in equal), equal


def test_gsm8k_answers_equal_themselves(shared):
    for row in rows(shared("data/gsm8k/test.jsonl")):
        stated = row["answer"].rsplit("####", 1)[1].strip()
        assert extract_answer(row["answer"]) == reference_answer(row["answer"]) == stated
        assert is_equivalent(f"{stated}.00", stated)


def test_s1k_attempts_against_solutions(shared):
    data = rows(shared("data/s1k/s1k_gemini_traces.jsonl"))
    pairs = [(extract_answer(row["attempt"]), reference_answer(row["solution"])) for row in data]
    assert sum(reference is None for _, reference in pairs) == 2  # two proofs
    right = sum(is_equivalent(answer, reference) for answer, reference in pairs if answer and reference)
    assert right >= 38  # measured; the 51 others were read: wrong, cut off, or stated in free prose
