import sys
import time
from dataclasses import replace

import pytest
from material import write_jsonl

from dream_lightning.batch import Example
from dream_lightning.cli import main
from dream_lightning.data import read_examples
from dream_lightning.errors import UserError
from dream_lightning.evaluation.contamination import Overlap, contamination, without_contamination

LONG = "A train leaves the town at noon and drives sixty miles an hour until the evening comes"  # 17 words


def example(name, *prompt, thinking=None, answer=""):
    roles = ["user"] if len(prompt) == 1 else ["user", "assistant", "user"]
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, prompt, strict=True))
    return Example(name, messages, thinking, answer, None, name)


@pytest.mark.parametrize(
    ("row", "question", "kind"),
    [
        (example("t", "What is  $3 + 4$?"), "what is 3+4", "exact"),
        (example("t", "What is 3 - 4?"), "What is 3 + 4?", None),
        (example("t", "Hello", "Hi", LONG), LONG.upper(), "exact"),
        (example("t", LONG, "Noon", "And then?"), LONG, "exact"),
        (example("t", "Hello", "What is 3+4?", "And?"), "What is 3+4?", None),  # said by the assistant
        (example("t", f"Tell me: {LONG.replace('train', 'bus')}"), LONG, "ngram"),
        (example("t", "x", thinking=f"So {LONG}, he said"), LONG, "ngram"),
        (example("t", "x", answer=r"\text{" + LONG.replace(" ", "\n") + "}"), LONG, "ngram"),
        (example("t", LONG.replace("drives", "goes")), LONG, None),  # 8 and 8 words remain
        (example("t", "x", thinking="a " * 20), "a " * 12, None),  # shorter than n
    ],
)
def test_an_equal_question_and_one_with_13_equal_words_are_found(row, question, kind):
    asked = [example("other", "Why?"), example("few", "What is 1+1?", "2", question)]
    assert contamination([example("s", "2"), row], asked) == ([Overlap("few", "t", kind)] if kind else [])
    kept, dropped = without_contamination([row, row], asked)
    assert (kept, dropped) == (([], [row, row]) if kind else ([row, row], []))


def test_equality_comes_before_shared_words_and_n_changes_what_is_shared():
    rows = [example("words", f"{LONG} Why?"), example("equal", LONG)]
    assert contamination(rows, [example("q", LONG)]) == [Overlap("q", "equal", "exact")]
    changed = [example("t", LONG.replace("drives", "goes"))]
    assert [len(contamination(changed, [example("q", LONG)], n=n)) for n in (2, 8, 9)] == [1, 1, 0]
    with pytest.raises(UserError, match="n is 1, wanted at least 2"):
        contamination([], [], n=1)


def test_three_s1k_questions_are_in_math_500_and_three_more_share_words(shared, tmp_path, monkeypatch, capsys):
    files = shared("data/s1k/s1k_questions_1000.jsonl"), shared("data/math500/test.jsonl")
    training, questions = (read_examples(file, schema="prompt-response") for file in files)
    kinds = [overlap.kind for overlap in contamination(training, questions)]
    assert sorted(kinds) == ["exact"] * 3 + ["ngram"] * 3
    kept, dropped = without_contamination(training, questions)
    assert len(kept) + len(dropped) == 1000 and len(dropped) >= 6 and contamination(kept, questions) == []

    traces = [row.thinking for row in read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))]
    long = [replace(row, thinking=traces[i % len(traces)]) for i, row in enumerate(training)]
    start = time.perf_counter()
    contamination(long, questions)
    words = sum(len(row.thinking.split()) for row in long)
    with capsys.disabled():
        print(f"\n1,000 traces ({words:,} words) × 500 questions: {time.perf_counter() - start:.1f} s")

    rows = [{"prompt": LONG, "response": "x"}, {"prompt": "Why?", "response": LONG}]
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": f"{LONG} Who?"}, {"prompt": "Why"}, {"prompt": "No"}])
    command = ["contamination-report", f"--training={write_jsonl(tmp_path / 'rows.jsonl', rows)}"]
    monkeypatch.setattr(sys, "argv", ["dream-lightning", *command, f"--questions={asked}"])
    main()
    assert "2 of 3 questions are in " in (out := capsys.readouterr().out) and ": 1 equal, 1 more share 13 words" in out
