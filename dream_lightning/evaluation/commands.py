"""The commands `evaluate`, `evaluate-grid` and `compare`."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dream_lightning.data.prompt_format import encode_prompt
from dream_lightning.errors import UserError
from dream_lightning.evaluation.card import percent
from dream_lightning.evaluation.compare import compare as compare_runs
from dream_lightning.evaluation.evaluate import benchmark, questions_of
from dream_lightning.evaluation.evaluate import evaluate as evaluate_model
from dream_lightning.evaluation.grid import evaluate_grid as answer_grid
from dream_lightning.export import base_of
from dream_lightning.locate import trained
from dream_lightning.model import load_tokenizer
from dream_lightning.viewer.commands import open_model, parse

_GIVEN = {"model", "tokenizer", "tasks", "name"}  # arguments of `evaluate_model` that are no options


def evaluate(parser: ArgumentParser, arguments: list[str]) -> None:
    """Answer benchmarks and write a card: scores, intervals, texts."""
    options, opened, asked = parse_evaluate(parser, arguments)
    tasks = options.tasks.split(",") if isinstance(options.tasks, str) else options.tasks
    tasks = [task.strip() for task in tasks if task.strip()]
    if options.show_prompts:
        return _show_prompts(tasks, options.show_prompts, opened, asked)
    out = Path(asked.pop("out"))
    base = _base(opened) if options.with_base else None
    for name, folder in [(base, out / "base"), (options.model, out / "tuned")] if base else [(options.model, out)]:
        model, tokenizer = open_model(**{**opened, "model": name})
        card = evaluate_model(model, tokenizer, tasks, name=name, out=folder, **asked)
        _print(card, folder)
        del model
    if base:
        _print_comparison(compare_runs(out / "base", out / "tuned", out=out), out)


def parse_evaluate(parser: ArgumentParser, arguments: list[str]) -> list[Any]:
    """All options of `evaluate`, those of `open_model`, and those of `evaluate_model`."""
    parser.add_argument("--tasks", type=str | list[str], required=True, help="benchmarks or files: gsm8k,math500")
    parser.add_argument("--show_prompts", type=int, default=0, help="print so many prompts of each benchmark and end")
    parser.add_argument("--with_base", type=bool, default=False, help="evaluate what was fine-tuned too, and compare")
    return parse(parser, arguments, open_model, evaluate_model, skip=_GIVEN)


def evaluate_grid(parser: ArgumentParser, arguments: list[str]) -> None:
    """Accuracy against speed over sampling options."""
    parser.add_argument("--task", type=str, required=True, help="a benchmark or file")
    parser.add_argument("--grid", type=dict[str, list], required=True, help="'{steps: [64, 128], alg: [entropy]}'")
    parser.add_argument("--out", type=str, default="grid", help="the folder to write")
    options, opened, asked = parse(parser, arguments, open_model, evaluate_model, skip=_GIVEN | {"out"})
    model, tokenizer = open_model(**opened)
    grid = answer_grid(model, tokenizer, options.task, name=options.model, grid=options.grid, out=options.out, **asked)
    for row in grid["rows"]:
        speed = f"{row['tokens_per_forward']:.2f} tokens/forward   {row['tokens_per_second']:,.0f} tokens/s"
        print(f"{row['sampling']:40} {percent(row['accuracy'], row['interval'])}   {speed}")
    print(f"AUP {grid['aup']:.1f}   page: {(Path(options.out) / 'grid.html').resolve()}")


def compare(parser: ArgumentParser, arguments: list[str]) -> None:
    """Compare two folders of `evaluate`: difference, interval, p."""
    parser.add_function_arguments(compare_runs, as_positional=True)
    options = parser.parse_args(arguments)
    _print_comparison(compare_runs(options.a, options.b, out=options.out, seed=options.seed), Path(options.out))


def _base(opened: dict) -> str:
    base = opened["pretrained"] or base_of(opened["model"])
    if base is None:
        raise UserError(f"with_base: {opened['model']} does not say what it was trained from: set --pretrained")
    return base


def _show_prompts(tasks: list[str], count: int, opened: dict, asked: dict) -> None:
    saved = trained(opened["model"]).tokenizer
    tokenizer = load_tokenizer(opened["tokenizer"] or opened["pretrained"] or saved or opened["model"])
    prompting = {name: asked[name] for name in ("style", "system_prompt")}
    for name, found in (benchmark(task, asked["sources"] or {}) for task in tasks):
        for example in questions_of(found, count=count, few_shot=asked["few_shot"], shots=asked["shots"]):
            print(f"── {name} · {example.origin}")
            print(tokenizer.decode(encode_prompt(example, tokenizer, **prompting)))


def _print(card: dict, folder: Path) -> None:
    for task, s in card["tasks"].items():
        score = percent(s["accuracy"], s["interval"]) if "accuracy" in s else "not scored"
        print(f"{task:16} {score}   {s['scored']} of {s['questions']} questions scored")
    print(f"card: {(folder / 'card.html').resolve()}")


def _print_comparison(comparison: dict, out: Path) -> None:
    for task, s in comparison["tasks"].items():
        p = "" if s["p"] is None else f"   p = {s['p']:.3g}"
        shown = f"{percent(s['accuracy_a'])} → {percent(s['accuracy_b'])}"
        print(f"{task:16} {shown}   B − A = {percent(s['difference'], s['interval'])}{p}")
    print(f"comparison: {(out / 'comparison.html').resolve()}")
