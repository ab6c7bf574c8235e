"""Train variants of a config, by a list, a grid or Optuna: each is a `fit` in a folder of its own."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from dream_lightning.atomic import WINDOWS, lock, write_texts
from dream_lightning.errors import UserError, check_range, reading
from dream_lightning.experiments.pruning import PruneTrial, import_optuna, open_study
from dream_lightning.experiments.report import report
from dream_lightning.experiments.runs import Run, find_runs


@dataclass(frozen=True)
class Space:
    """What Optuna may choose for an option: a number in a range, or one of `choices`.

    Args:
        low: the least value; whole numbers if `low` and `high` are.
        high: the greatest value.
        log: choose on a logarithmic scale.
        choices: values of any type instead.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise UserError(f"a search space is {asdict(self)}: wanted low and high, or choices")
        if not self.choices:
            check_range("low of a search space", self.low, most=self.high)
            check_range("low of a search space with log", self.low, least=1e-300 if self.log else -1e300)

    def suggest(self, trial: Any, name: str) -> Any:
        if self.choices:  # as text: Optuna stores no lists
            return json.loads(trial.suggest_categorical(name, [json.dumps(choice) for choice in self.choices]))
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (trial.suggest_int if whole else trial.suggest_float)(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Variant:
    """What a variant adds to the base.

    Args:
        base: names or files of overlays.
        options: dotted option → value.
    """

    base: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One run of a sweep: what `fit` is told."""

    name: str
    base: list[str]
    options: dict[str, Any]
    seed: int

    def words(self) -> list[str]:
        """The options of `fit`, but for where it writes."""
        texts = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in self.options.items()}
        seeds = [f"--seed_everything={self.seed}", f"--model.seed={self.seed}"]
        return [*(f"--config={name}" for name in self.base), *(f"--{n}={text}" for n, text in texts.items()), *seeds]


def sweep(
    base: str | list[str],
    *,
    out: str = "sweep",
    options: dict[str, Any] | None = None,
    variants: dict[str, Variant] | None = None,
    grid: dict[str, list[Any]] | None = None,
    search: dict[str, Space] | None = None,
    trials: int = 20,
    startup_trials: int = 5,
    seeds: list[int] = [0],  # noqa: B006 (not changed)
    monitor: str = "val/nll",
    mode: Literal["min", "max"] = "min",
    evaluate: dict[str, Any] | None = None,
    check: Callable[[str, list[str]], None] | None = None,
) -> list[Run]:
    """Train every variant, and write a report of all runs.

    Every run is a `fit` in `out/runs/NAME`, whose command is in its `run.json`. Started again, the sweep resumes: runs
    that are complete are kept, the one that was killed continues from its last checkpoint, and failed ones are tried
    again. A trial of the search is a function of `seeds`, its number and the trials before it.

    Args:
        base: names or files of configs, as of `fit`: a config and overlays.
        out: the folder to write.
        options: dotted option → value, for every run, such as `trainer.max_steps: 500`.
        variants: name → overlays and options. Each is trained with each seed.
        grid: dotted option → values; all combinations of all variants are trained.
        search: dotted option → what Optuna may choose, instead of variants and a grid.
        trials: number of trials of the search.
        startup_trials: so many are never pruned; later ones end where the median of the earlier ones is better.
        seeds: seeds of weights, adapters and noise; the split of the data stays that of `data.seed`. A search has one.
        monitor: the scalar that is minimized, and shown in the table.
        mode: `min` if a lower one is better, else `max`.
        evaluate: options of `evaluate`, such as `tasks: gsm8k`, for the best checkpoint of every run.
        check: called with a command and its options for every run before the first is trained.

    Raises:
        UserError: an option is wrong; another sweep writes `out`, or wrote it with other options; a run failed.
    """
    base = [base] if isinstance(base, str) else base
    check_range("trials", trials, least=1, whole=True)
    check_range("startup_trials", startup_trials, least=0, whole=True)
    if search and (variants or grid or len(seeds) != 1):
        raise UserError("search is set, and so are variants, grid or several seeds: keep one of them")
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    plans = _plans(base, options or {}, variants or {"base": Variant()}, grid or {}, seeds)
    best = {"monitor": monitor, "mode": mode}
    if search:
        ends = [{n: s.choices[i] if s.choices else (s.low, s.high)[i] for n, s in search.items()} for i in (0, -1)]
        checked = [Plan(f"with {end}", base, (options or {}) | end, seeds[0]) for end in ends]
    for number, plan in enumerate((checked if search else plans) if check else ()):
        if plan.seed == seeds[0]:
            _checked(check, plan, None if number else evaluate)
    with lock(folder / "lock", f"another sweep or one of its runs is writing {folder}: wait for it or end it") as held:
        runner = _Runner(folder, best, evaluate, held.fileno())
        if search:
            _search(runner, base, options or {}, search, trials, startup_trials, seeds[0])
        else:
            for number, plan in enumerate(plans, 1):
                runner.run(plan)
                print(f"{number} of {len(plans)}: {plan.name}   {runner.describe(plan)}", flush=True)
    report([folder], out=folder, **best)
    print(f"report: {(folder / 'report.html').resolve()}")
    if runner.failed:
        raise UserError(f"{len(runner.failed)} runs failed, first {runner.failed[0]}; start the sweep again to retry")
    return find_runs(folder)


def _plans(
    base: list[str], options: dict[str, Any], variants: dict[str, Variant], grid: dict[str, list], seeds: Sequence[int]
) -> list[Plan]:
    plans = []
    for name, variant in variants.items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            label = ",".join(
                [
                    name,
                    *(
                        f"{n.rpartition('.')[2]}={v if isinstance(v, str) else json.dumps(v)}"
                        for n, v in chosen.items()
                    ),
                ]
            )
            label = "".join(c if c.isalnum() or c in "-_.=," else "_" for c in label)
            for seed in seeds:
                whole = f"{label},seed={seed}" if len(seeds) > 1 else label
                plans.append(Plan(whole, [*base, *variant.base], options | variant.options | chosen, seed))
    if len({plan.name for plan in plans}) < len(plans):
        raise UserError(f"two runs of the sweep have one name: {', '.join(plan.name for plan in plans)}")
    return plans


def _checked(check: Callable[[str, list[str]], None], plan: Plan, evaluate: dict[str, Any] | None) -> None:
    try:
        check("fit", plan.words())
        if evaluate:
            with TemporaryDirectory() as model:  # one that does not say how it was trained
                Path(model, "config.json").touch()
                check("evaluate", [f"--model={model}", *Plan("", [], evaluate, 0).words()[:-2]])
    except SystemExit:
        print(f"in the run {plan.name} of the sweep; nothing was trained", file=sys.stderr)
        raise


def _search(
    runner: "_Runner",
    base: list[str],
    options: dict[str, Any],
    search: dict[str, Space],
    trials: int,
    startup_trials: int,
    seed: int,
) -> None:
    optuna, states = import_optuna(), import_optuna().trial.TrialState
    file = str(runner.folder / "study.log")
    rule = {"mode": runner.best["mode"], "startup_trials": startup_trials}
    study, _ = open_study(file, **rule)
    for trial in study.get_trials(states=(states.RUNNING,)):  # killed; it is asked for and resumed again below
        study.tell(trial.number, state=states.FAIL)
    while True:
        ended = [t for t in study.get_trials() if t.state != states.FAIL or "error" in t.user_attrs]
        if len(ended) >= trials:
            return
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(ended))  # so that a resumed search asks the same
        trial = study.ask()
        chosen = {name: space.suggest(trial, name) for name, space in search.items()}
        plan = Plan(f"{len(ended):03}", base, options | chosen, seed)
        callback = {"class_path": f"{PruneTrial.__module__}.PruneTrial"}
        callback["init_args"] = {"study": file, "trial": trial.number, "monitor": runner.best["monitor"], **rule}
        state = runner.run(plan, f"--trainer.callbacks+={json.dumps(callback)}")
        value = runner.value(plan)
        if state == "failed" or value is None:
            trial.set_user_attr("error", state)
            study.tell(trial, state=states.FAIL)
        else:
            pruned = state == "pruned" or "pruned" in study.get_trials()[trial.number].user_attrs
            # Of a pruned trial Optuna takes the last value that was reported, and refuses another.
            study.tell(trial, None if pruned else value, state=states.PRUNED if pruned else states.COMPLETE)
            runner.note(plan, state="pruned" if pruned else "complete")
        print(f"{len(ended) + 1} of {trials}: {chosen}   {runner.describe(plan)}", flush=True)


def start(arguments: list[str], output: Path, lock_file: int) -> int:
    """Run a command of this program in a process of its own and return its status. On POSIX, it holds the lock, too."""
    with output.open("ab") as file:
        command = [sys.executable, "-m", "dream_lightning", *arguments]
        held = {} if WINDOWS else {"pass_fds": (lock_file,)}
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **held).returncode


class _Runner:
    """Runs the commands of a sweep and records in each run's `run.json` how far it is."""

    def __init__(self, folder: Path, best: dict[str, str], evaluate: dict[str, Any] | None, lock_file: int) -> None:
        self.folder, self.best, self.evaluate, self.lock_file = folder, best, evaluate, lock_file
        self.failed: list[str] = []

    def run(self, plan: Plan, *more: str) -> str:
        """The state that the run has reached: complete, pruned or failed."""
        folder = self._folder(plan)
        folder.mkdir(parents=True, exist_ok=True)
        saved, asked = self._record(plan), asdict(plan)
        if saved and (changed := [name for name in asked if saved.get(name) != asked[name]]):
            told = "; ".join(f"{name} was {saved.get(name)!r:.160} and is {asked[name]!r:.160}" for name in changed)
            raise UserError(f"{folder} was written with other options: {told}. Move it away, or set out")
        if "state" not in saved:
            saves = [f"--{part}.dirpath={folder / 'checkpoints'}" for part in ("checkpoint", "autosave")]
            logs = {"save_dir": folder.parent, "name": plan.name, "version": ""}
            logged = [f"--trainer.logger.init_args.{name}={value}" for name, value in logs.items()]
            resumed = ["--ckpt_path=last"] if list(folder.glob("checkpoints/last*.ckpt")) else []
            command = ["fit", *plan.words(), *saves, *logged]
            self.note(plan, **asked, command=command)
            if start([*command, *more, *resumed], folder / "output.txt", self.lock_file):
                return self._fail(folder)
            self.note(plan, state="complete")
        if self.evaluate and self._record(plan)["state"] == "complete" and not self._evaluated(folder):
            return self._fail(folder)
        return self._record(plan)["state"]

    def _evaluated(self, folder: Path) -> bool:
        """Evaluate the best checkpoint, unless it is already; whether that succeeded."""
        if (folder / "evaluation" / "card.json").exists():
            return True
        found = [*folder.glob("checkpoints/last*.ckpt"), *folder.glob("checkpoints/best*.ckpt")]
        options = Plan("", [], self.evaluate, 0).words()[:-2]
        words = ["evaluate", f"--model={found[-1]}", f"--out={folder / 'evaluation'}", *options] if found else []
        return bool(words) and start(words, folder / "output.txt", self.lock_file) == 0

    def _fail(self, folder: Path) -> str:
        said = (folder / "output.txt").read_text("utf-8", errors="replace") if (folder / "output.txt").exists() else ""
        errors = [line for line in said.splitlines() if "rror: " in line] or said.splitlines() or ["no output"]
        self.failed.append(f"{folder.name}: {errors[-1]:.300} ({folder / 'output.txt'})")
        return "failed"

    def value(self, plan: Plan) -> float | None:
        """The best value of the monitored scalar."""
        metrics = ("events.out.tfevents.*", "metrics.csv")
        if not any(list(self._folder(plan).glob(name)) for name in metrics):
            return None
        values = find_runs(self._folder(plan))[0].curves.get(self.best["monitor"], {}).values()
        return (min if self.best["mode"] == "min" else max)(values, default=None)

    def describe(self, plan: Plan) -> str:
        value, state = self.value(plan), self._record(plan).get("state", "failed")
        return state if value is None else f"{state}   {self.best['monitor']} {value:.4f}"

    def note(self, plan: Plan, **entries: Any) -> None:
        text = json.dumps(self._record(plan) | entries, indent=2, ensure_ascii=False) + "\n"
        write_texts(self._folder(plan), {"run.json": text})

    def _folder(self, plan: Plan) -> Path:
        return self.folder / "runs" / plan.name

    def _record(self, plan: Plan) -> dict[str, Any]:
        file = self._folder(plan) / "run.json"
        with reading(file, "a JSON object", "move its folder away"):
            return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}
