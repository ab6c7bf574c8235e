"""Answer benchmarks with a model and write a folder that can be cited: card.json, items.jsonl, card.html."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.answering import answer_questions
from dream_lightning.atomic import write_texts
from dream_lightning.batch import Answers, Example, Message, PromptBatch
from dream_lightning.data import S1KDataModule, read_examples
from dream_lightning.data.prompt_format import Style, response_text
from dream_lightning.data.splits import without_overlap
from dream_lightning.errors import UserError, check_range
from dream_lightning.evaluation.card import Item, breakdown, scores
from dream_lightning.evaluation.pages import card_page, model_card
from dream_lightning.model import DreamModel
from dream_lightning.predict import PredictionWriter
from dream_lightning.reporting import versions
from dream_lightning.sampling import SamplingParams, release_compiled
from dream_lightning.tasks.registry import TASKS, load_task
from dream_lightning.training import ProgressBar


@dataclass(frozen=True)
class Benchmark:
    """Where the questions of a benchmark are, and the task that grades them."""

    source: str | None  # hub id, folder or file; None: the user names it
    task: str | None  # None: as the records say, else math
    subset: str | None = None
    split: str = "test"


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "math", "main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "math"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "math", split="train"),
    "aime25": Benchmark("math-ai/aime25", "math"),
}
_TEST_ONLY = ("HuggingFaceH4/MATH-500", "math-ai/aime25")


def benchmark(name: str, sources: dict[str, str]) -> tuple[str, Benchmark]:
    """The name for the card, and the benchmark that `name` means: one of BENCHMARKS, a task, or a file.

    Raises:
        UserError: it is none of these, or a task without an entry in `sources`.
    """
    if name not in BENCHMARKS and Path(name).expanduser().exists():
        return Path(name).stem, Benchmark(name, None)
    known = BENCHMARKS.get(name, Benchmark(None, name))
    source = sources.get(name, known.source)
    if source is None:
        raise UserError(
            f"{name} is no file and no benchmark with a source of its own ({', '.join(BENCHMARKS)}): name a file, or "
            f"set --sources '{{{name}: FILE}}'"
        )
    if known.task is not None:
        known = replace(known, task=load_task(known.task))
    if known.task not in (None, *TASKS):
        known = replace(known, task=None)
    local = Path(source).expanduser().exists()
    return name, replace(known, source=source, subset=None if local else known.subset)


def questions_of(
    found: Benchmark, *, count: int | None = None, few_shot: int = 0, shots: str | None = None
) -> list[Example]:
    """The first `count` questions, each after `few_shot` answered ones of `shots` or of the training split.

    Raises:
        UserError: as `read_examples`; an answered question is one of the benchmark's, or there is no training split.
    """
    remedy = "set shots to a file, folder or hub data set of other answered questions"
    test_only = found.split == "train" or found.source in _TEST_ONLY or Path(found.source).expanduser().is_file()
    if few_shot and shots is None and test_only:
        raise UserError(f"few_shot is {few_shot} and {found.source} has no training split: {remedy}")
    examples = read_examples(found.source, split=found.split, subset=found.subset, task=found.task)
    if not few_shot:
        return examples[:count]
    subset = found.subset if shots is None else None
    answered = read_examples(shots or found.source, split="train", subset=subset, task=found.task)[:few_shot]
    if asked := without_overlap(answered, examples)[1]:
        raise UserError(f"few_shot shows {asked[0].origin}, which {found.source} asks too: {remedy}")
    shown: list[Message] = []
    for shot in answered:  # where the response is only the reference column, as in GSM8K, that is the answer shown
        answer = response_text(shot) or shot.reference or ""
        shown += [*shot.prompt, Message(role="assistant", content=answer)]
    return [replace(example, prompt=(*shown, *example.prompt)) for example in examples[:count]]


class _Answerer(L.LightningModule):
    """What PredictionWriter and Trainer.predict need of a model."""

    def __init__(self, model: DreamModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pretrained = model, tokenizer, name
        self.sampling = SamplingParams()

    @property
    def max_prompt_length(self) -> int:
        return self.sampling.longest_prompt(self.model.config.max_position_embeddings)

    def cpu(self) -> "_Answerer":
        """Keep the device: Lightning moves a module to the host after every run. It also frees what CUDA graphs use."""
        release_compiled(self.model)
        return self

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Answers:
        return answer_questions(self.model, self.tokenizer, batch, self.sampling)


def evaluate(
    model: DreamModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    name: str,
    out: str | Path = "evaluation",
    sources: dict[str, str] | None = None,
    sampling: SamplingParams = SamplingParams(forbid_mask=True),  # noqa: B008 (frozen)
    samples: int = 1,
    questions: int | None = None,
    few_shot: int = 0,
    shots: str | None = None,
    style: Style = "chat",
    system_prompt: str | None = None,
    too_long: Literal["error", "skip"] = "error",
    batch_size: int = 16,
    devices: int = 1,
) -> dict[str, Any]:
    """Answer and grade benchmarks; returns the content of `card.json`.

    A killed run resumes where it was when it is started again with the same settings. The same model, data, settings
    and batch size give the same card; what depends on the machine is in `timing.json`.

    Args:
        model: any model of `diffusion_generate`.
        tasks: names of BENCHMARKS, files of questions, or tasks with a file in `sources`.
        name: of the model, for the card.
        out: the folder to write.
        sources: benchmark → file, folder or hub id to use instead of its own.
        sampling: how questions are answered.
        samples: answers to each question, with consecutive seeds, for pass@k and maj@k.
        questions: answer only so many questions of each benchmark, the first ones.
        few_shot: answered examples of the training split before each question.
        shots: file, folder or hub data set to take them from instead.
        style: style of the prompt.
        system_prompt: replaces that of the chat template.
        too_long: questions that leave no room for an answer: `error` names them, `skip` counts them as wrong.
        batch_size: questions answered at once; halved, with a message, when a GPU's memory does not suffice.
        devices: GPUs or processes to share the questions.

    Raises:
        UserError: an unknown benchmark, an option out of range, or `out` holds answers with other settings.
    """
    _check(tasks, sampling, few_shot=few_shot, samples=samples, questions=questions, batch_size=batch_size)
    found, shown = dict(benchmark(task, sources or {}) for task in tasks), {"few_shot": few_shot, "shots": shots}
    asked = {task: questions_of(b, count=questions, **shown) for task, b in found.items()}
    out, answerer = Path(out).expanduser(), _Answerer(model.eval(), tokenizer, name)
    prompting = {"style": style, "system_prompt": system_prompt, "too_long": too_long}
    card = _head(model, name, **prompting, **shown, batch_size=batch_size, sampling=asdict(sampling))
    items, timing = [], {"device": _device_name(), "tasks": {}}
    for task, examples in asked.items():
        runs = []
        for sample in range(samples):
            answerer.sampling = replace(sampling, seed=sampling.seed + sample)
            path = out / task / f"sample-{sample}.jsonl"
            trainer, batch_size = _answer(answerer, examples, found[task].source, path, batch_size, devices, prompting)
            runs.append(_items(path, tokenizer, task=task, sample=sample))
        settings = json.loads(path.with_name(f"{path.name}.settings.json").read_text("utf-8"))
        card["model"] |= {"weights": settings["weights"], "tokenizer": settings["tokenizer"]}
        about = {"source": found[task].source, "task": found[task].task, "records": settings["records"]}
        timing["tasks"][task] = _timing(runs)
        found_scores = scores(runs)
        card["tasks"][task] = about | found_scores | {"groups": breakdown(runs, examples)}
        items += [item for run in runs for item in run]
    if trainer.is_global_zero:
        write_run(out, card, items, timing)
    return card


def _head(model: DreamModel, name: str, **settings: Any) -> dict[str, Any]:
    about = {"name": name, "parameters": sum(p.numel() for p in model.parameters())}
    installed = versions("dream_lightning", "torch", "lightning", "transformers", "math-verify")
    return {"model": about, "settings": settings, "versions": installed, "tasks": {}}


def _check(tasks: Sequence[str], sampling: SamplingParams, **options: int | None) -> None:
    for option, value in options.items():
        check_range(option, value, least=0 if option == "few_shot" else 1, whole=True)
    if options["samples"] > 1 and not sampling.noisy:
        raise UserError(
            f"samples is {options['samples']} and sampling has no noise: set sampling.temperature, such as 0.2"
        )
    if not tasks:
        raise UserError(f"tasks is empty, wanted names such as {', '.join(BENCHMARKS)}, or files of questions")


def write_run(out: Path, card: dict[str, Any], items: Sequence[Item], timing: dict[str, Any]) -> None:
    """Write the files of a run."""
    flat = {f"eval_{task}_accuracy": s["accuracy"] for task, s in card["tasks"].items() if "accuracy" in s}
    files = {
        "items.jsonl": "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items),
        "timing.json": json.dumps(timing, indent=2) + "\n",
        "eval_results.json": json.dumps(flat, indent=2) + "\n",
        "README.md": model_card(card),
        "card.html": card_page(card, items, timing),
        "card.json": json.dumps(card, indent=2, ensure_ascii=False) + "\n",  # last: its presence says that all is there
    }
    write_texts(out, files)


def _answer(answerer, examples, source, path, batch_size, devices, prompting) -> tuple[L.Trainer, int]:
    """One file of predictions; resumes. Returns the batch size, halved where memory does not suffice."""
    while True:
        data = S1KDataModule(source, tokenizer=answerer.tokenizer, batch_size=batch_size, **prompting)
        data.ask(examples, source)
        trainer = L.Trainer(
            accelerator="auto",
            devices=devices,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[ProgressBar(), PredictionWriter(str(path))],
        )
        try:
            trainer.predict(answerer, data, return_predictions=False)
            return trainer, batch_size
        except torch.OutOfMemoryError as error:
            if batch_size == 1 or devices > 1:
                raise UserError(
                    f"out of memory with batch_size {batch_size}: set a smaller one, or fewer sampling.max_new_tokens"
                ) from error
        torch.cuda.empty_cache()
        batch_size //= 2
        print(f"out of memory: continuing with batch_size {batch_size}; answers are kept")


def _timing(runs: Sequence[Sequence[Item]]) -> dict[str, float]:
    """Removes the seconds of the items, which differ from run to run, and sums them."""
    answered = [item for run in runs for item in run]
    seconds, tokens = sum(item.pop("seconds") for item in answered), sum(item["tokens"] for item in answered)
    return {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / max(seconds, 1e-9), 2)}


def _items(path: Path, tokenizer: PreTrainedTokenizerBase, **extra: Any) -> list[Item]:
    """The predictions in a file, with the length of their thinking."""
    with path.open(encoding="utf-8") as file:
        items = [extra | json.loads(line) for line in file]
    for item in items:
        ids = tokenizer(item["thinking"] or "", add_special_tokens=False)["input_ids"]
        item["thinking_tokens"] = len(ids)
    return items


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
