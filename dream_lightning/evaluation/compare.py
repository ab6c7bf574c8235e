"""Compare two evaluated models question by question."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from dream_lightning.atomic import write_texts
from dream_lightning.errors import UserError, reading
from dream_lightning.evaluation.card import Item, check_same_questions
from dream_lightning.evaluation.pages import comparison_page
from dream_lightning.evaluation.statistics import mcnemar, mean_interval


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[Item]]:
    """Card and items of a folder that `evaluate` wrote.

    Raises:
        UserError: it is no such folder, or its evaluation has not ended.
    """
    folder = Path(folder).expanduser()
    with reading(folder / "card.json", "the card of a complete evaluation", "run dream-lightning evaluate again"):
        card = json.loads((folder / "card.json").read_text("utf-8"))
        names = card["model"]["name"], card["tasks"].keys()
    with reading(folder / "items.jsonl", f"the answers of {names[0]}", "run dream-lightning evaluate again"):
        items = [json.loads(line) for line in (folder / "items.jsonl").open(encoding="utf-8")]
    return card, items


def compare(a: str | Path, b: str | Path, *, out: str | Path = "comparison", seed: int = 0) -> dict[str, Any]:
    """Write `comparison.json` and `comparison.html`, and return the former.

    The difference of accuracies is paired: its interval is the bootstrap over questions. p is that of the exact
    McNemar test, for one sample of each question.

    Args:
        a: folder of the first evaluation, such as that of the base model.
        b: folder of the second.
        out: the folder to write.
        seed: seed of the bootstrap.

    Raises:
        UserError: the two have no benchmark in common, or answered different questions of one.
    """
    (card_a, items_a), (card_b, items_b) = read_run(a), read_run(b)
    common = [task for task in card_a["tasks"] if task in card_b["tasks"]]
    if not common:
        tasks = [", ".join(card["tasks"]) for card in (card_a, card_b)]
        raise UserError(f"{a} answered {tasks[0]} and {b} {tasks[1]}: evaluate both on the same benchmarks")
    result: dict[str, Any] = {"a": card_a["model"]["name"], "b": card_b["model"]["name"], "tasks": {}}
    result["settings"] = {"a": str(a), "b": str(b), "seed": seed, "differ": _differences(card_a, card_b)}
    flips: list[tuple[Item, Item]] = []
    for task in common:
        check_same_questions(card_a, card_b, task)
        pairs = list(zip(_of_task(items_a, task), _of_task(items_b, task), strict=True))
        if pairs:
            result["tasks"][task], flipped = _paired(pairs, seed)
            flips += flipped
    out = Path(out).expanduser()
    files = {"comparison.html": comparison_page(result, flips)}
    files["comparison.json"] = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_texts(out, files)
    return result


def _of_task(items: list[Item], task: str) -> list[Item]:
    kept = [item for item in items if item["task"] == task and item["correct"] is not None]
    return sorted(kept, key=lambda item: (item["number"], item["sample"]))


def _paired(pairs: list[tuple[Item, Item]], seed: int) -> tuple[dict[str, Any], list[tuple[Item, Item]]]:
    """Statistics of one benchmark, and the pairs whose verdict differs."""
    by_question: dict[int, list[int]] = {}
    for one, other in pairs:
        by_question.setdefault(one["number"], []).append(other["correct"] - one["correct"])
    differences = [fmean(values) for values in by_question.values()]
    flips = [(one, other) for one, other in pairs if one["correct"] != other["correct"]]
    only_a = [one["id"] for one, _ in flips if one["correct"]]
    only_b = [other["id"] for _, other in flips if other["correct"]]
    single = len(pairs) == len(by_question)
    statistics = {
        "scored": len(by_question),
        "accuracy_a": fmean(one["correct"] for one, _ in pairs),
        "accuracy_b": fmean(other["correct"] for _, other in pairs),
        "difference": fmean(differences),
        "interval": list(mean_interval(differences, seed=seed)),
        "p": mcnemar(len(only_a), len(only_b)) if single else None,
        "only_a": only_a,
        "only_b": only_b,
    }
    return statistics, flips


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Settings and versions that differ, as [a, b]."""
    flat = [card["settings"]["sampling"] | card["settings"] | card["versions"] for card in (a, b)]
    names = sorted({*flat[0], *flat[1]} - {"sampling"})
    return {n: [flat[0].get(n), flat[1].get(n)] for n in names if flat[0].get(n) != flat[1].get(n)}
