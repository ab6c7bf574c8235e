"""Answered questions → the scores of one benchmark, with intervals."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from dream_lightning.batch import Example
from dream_lightning.errors import UserError
from dream_lightning.evaluation.statistics import majority_correct, mean_interval, pass_at_k
from dream_lightning.tasks import proportion_interval

Item = dict[str, Any]  # a line of items.jsonl: the fields of `Prediction`, number, task, sample and thinking_tokens

GROUPS = ("source_type", "source", "subject", "type", "level", "category", "cot_type")  # columns of a breakdown


def scores(runs: Sequence[Sequence[Item]]) -> dict[str, Any]:
    """Scores of one benchmark.

    Args:
        runs: for each of S samples the items of all questions, in the same order.
    """
    items = [item for run in runs for item in run]
    questions = [q for q in zip(*runs, strict=True) if q[0]["correct"] is not None]
    scored = [item for q in questions for item in q]
    result: dict[str, Any] = {"questions": len(runs[0]), "scored": len(questions), "samples": len(runs)}
    if questions:
        result |= accuracy(questions)
        result["unparsed"] = fmean(item["answer"] is None for item in scored)
    result |= {
        "empty": fmean(not item["prediction"].strip() for item in items),
        "terminated": fmean(item["tokens"] < item["filled"] for item in items),
        "mean_tokens": fmean(item["tokens"] for item in items),
        "median_tokens": median(item["tokens"] for item in items),
        "mean_thinking_tokens": fmean(item["thinking_tokens"] for item in items),
        "tokens_per_forward": sum(i["filled"] for i in items) / max(sum(i["forwards"] for i in items), 1),
    }
    return result


def accuracy(questions: Sequence[Sequence[Item]]) -> dict[str, Any]:
    """Accuracy over questions with S samples each; with several samples also pass@k and maj@S.

    The interval is Wilson's for one sample, otherwise the bootstrap over questions, whose samples are not independent.
    """
    rates = [fmean(item["correct"] for item in q) for q in questions]
    correct, samples = sum(item["correct"] for q in questions for item in q), len(questions[0])
    interval = proportion_interval(correct, len(questions)) if samples == 1 else mean_interval(rates)
    result: dict[str, Any] = {"accuracy": fmean(rates), "interval": list(interval)}
    if samples > 1:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]
        for k in ks:
            result[f"pass@{k}"] = fmean(pass_at_k(samples, sum(i["correct"] for i in q), k) for q in questions)
        votes = [([i["answer"] for i in q], [i["correct"] for i in q]) for q in questions]
        result[f"maj@{samples}"] = fmean(majority_correct(*vote) for vote in votes)
    return result


def breakdown(runs: Sequence[Sequence[Item]], examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Column → value → accuracy of the questions with this value, for the columns of GROUPS that the records have."""
    result: dict[str, dict[str, Any]] = {}
    questions = list(zip(*runs, strict=True))
    for column in GROUPS:
        groups: dict[str, list] = {}
        for example, q in zip(examples, questions, strict=True):
            if (value := example.record.get(column)) is not None and q[0]["correct"] is not None:
                groups.setdefault(str(value), []).append(q)
        if len(groups) > 1:
            result[column] = {v: {"scored": len(g)} | accuracy(g) for v, g in sorted(groups.items())}
    return result


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """`61.2 % [58.5, 63.8]`."""
    bounds = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * value:.1f} %{bounds}"


def check_same_questions(a: dict[str, Any], b: dict[str, Any], task: str) -> None:
    """Raise UserError if two cards answered different questions of a benchmark."""
    for name in ("records", "samples"):
        if (one := a["tasks"][task][name]) != (other := b["tasks"][task][name]):
            raise UserError(
                f"{task} has other {name} in the two runs ({one} and {other}): evaluate both in the same way"
            )
