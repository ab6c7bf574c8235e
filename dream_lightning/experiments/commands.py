"""The commands `sweep` and `report`."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from dream_lightning.experiments.report import report as write_report
from dream_lightning.experiments.sweep import sweep as train_variants


def sweep(parser: ArgumentParser, arguments: list[str], check: Callable[[str, list[str]], None]) -> None:
    parser.add_argument("--config", action="config", help="a file or shipped config with the options below")
    parser.add_function_arguments(train_variants, as_positional=False, skip={"check"})
    options = parser.instantiate(parser.parse_args(arguments))
    options.pop("config")
    train_variants(**vars(options), check=check)


def report(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write a page about runs: what differs, curves, scores, cost."""
    parser.add_argument("runs", type=str, nargs="+", help="folders of fit, sweep and evaluate")
    parser.add_function_arguments(write_report, as_positional=False, skip={"runs"})
    options = parser.parse_args(arguments)
    write_report(**vars(options))
    print(f"report: {(Path(options.out) / 'report.html').resolve()}")
