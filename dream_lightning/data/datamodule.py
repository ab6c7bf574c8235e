"""The LightningDataModule: from a source of records to batches of documents and of questions."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example
from dream_lightning.data.document_cache import TokenizedSet, tokenize
from dream_lightning.data.epoch_order import KeyedItems, ResumableLoader, RowSampler, bucket_by_length
from dream_lightning.data.packing import collate, collate_prompts, collate_with_cutoff, pack
from dream_lightning.data.preloaded import PreloadedLoader, PreloadedSet
from dream_lightning.data.prompt_format import Style, encode_prompt, longer_than
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.splits import Filters, keep, mix, split, warn_of_overlap
from dream_lightning.data.streaming import ShardStream, StreamSampler
from dream_lightning.data.tokenization import Overflow, TrainOn, check_encoding, warn_of_responses
from dream_lightning.errors import GuessKeywords, UserError, check_range
from dream_lightning.tasks import load_task, task_of

# Batches per process that predict sorts by length together. In batches of 8, padding is then 13 % of the prompts'
# positions for s1K, 5 % for GSM8K and 19 % for MATH-500, instead of 48, 31 and 58 % in file order.
_WINDOW = 16
_WHOLE = ("short_first", "preload", "first_n", "training_filters", "subset")  # what needs all records at once
_ON_HOST = ("packing", "batch_cutoff", "num_workers")  # how batches are made there


class S1KDataModule(L.LightningDataModule, metaclass=GuessKeywords):
    """s1K, s1K-1.1, chats or prompt/response records, for training, validation and answering.

    Args:
        source: training records: a .jsonl, .json, .parquet or .csv file, a folder of them or of `save_to_disk`, a hub
            id such as simplescaling/s1K-1.1, or `bundled` for the package's own arithmetic set. Of a mixture,
            source → share of the text of an epoch.
        tokenizer: tokenizer of the model; the command line sets it.
        validation_source: a separate source for validation; None splits `validation_fraction` off `source`.
        validation_fraction: share of `source` held out, whole questions, chosen by `seed`.
        predict_source: questions for `predict`; None uses the validation questions.
        subset: subset of a hub data set that has several, such as `main` of openai/gsm8k; files and folders have none.
        schema: how a record is read, see `data.schemas`; `auto` detects it from the columns.
        prompt_column: column of the question in prompt/response records; None finds the usual names.
        response_column: column of the response; None finds the usual names.
        reference_column: column that predictions are scored against; None finds the usual names.
        task: how questions are asked and answers graded: math, countdown, sudoku, choice, exact, or the import path of
            your own, see docs/evaluation.md; None is math. A record's own `task` column takes precedence if it names a
            task.
        filters: column → values that a record must have one of, such as {cot_type: [math]}.
        training_filters: the same for the training set alone: validation stays comparable between runs.
        first_n: only the first records of the training set.
        style: `chat` uses the tokenizer's template; `plain` is "Question: … Let's think step by step. …";
            `bare` the question, a line break and the response.
        system_prompt: replaces the record's or the template's.
        thinking: False trains on answers alone.
        train_on: `last` trains on the last response of a chat; `all` also on each earlier one, as a document of its
            own after everything before it.
        max_length: most tokens of prompt and response; also the length of a packed row.
        overflow: `truncate_trace` shortens the thinking of longer documents; the others: docs/data.md.
        eos_fill_to: fill shorter responses with eos to this many tokens; teaches the model to stop.
        extra_weight: text → loss weight of its tokens in responses, such as {"</think>": 2.0}; also of the eos token.
        trajectories: mask training documents in the order of their column `filled_at`, which write-trajectories writes,
            instead of at random.
        batch_size: rows of a micro-batch on each process.
        question_batch_size: questions that each process answers at once; None is `batch_size`.
        packing: put several whole documents into a row.
        short_first: train on short documents first in every epoch, a curriculum, instead of shuffling them. Packed rows
            go by their longest document.
        preload: keep the training documents, all of one length, as a tensor on the model's device; several times faster
            for small models.
        batch_cutoff: the authors' collation: truncate or fill all responses of a micro-batch to one drawn length.
        validation_draws: how often each validation document is noised, at evenly spread t, for a steadier `val/nll`.
        validation_questions: how many validation questions are answered and scored at every validation.
        too_long: questions that leave the model no room for an answer: `error` names them before the model is loaded;
            `skip` gives them an empty answer, marked `too_long` and wrong if it is scored.
        streaming: read and tokenize the training data while training, in bounded memory: docs/data.md.
        shuffle_mib: with `streaming`, MiB of text that are shuffled and packed together.
        num_workers: processes that prepare batches; with `streaming` also as many that tokenize.
        cache_dir: where tokenized sets are kept.
        seed: seed of the split and of the order in an epoch.

    Raises:
        UserError: an option is out of range, or two exclude each other; in `setup`, a record cannot be read.
    """

    def __init__(
        self,
        source: dict[str, float] | str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        validation_source: str | None = None,
        validation_fraction: float = 0.1,
        predict_source: str | None = None,
        subset: str | None = None,
        schema: str = "auto",
        prompt_column: str | None = None,
        response_column: str | None = None,
        reference_column: str | None = None,
        task: str | None = None,
        filters: Filters | None = None,
        training_filters: Filters | None = None,
        first_n: int | None = None,
        style: Style = "chat",
        system_prompt: str | None = None,
        thinking: bool = True,
        train_on: TrainOn = "last",
        max_length: int = 8192,
        overflow: Overflow = "truncate_trace",
        eos_fill_to: int | None = None,
        extra_weight: dict[str, float] | None = None,
        trajectories: bool = False,
        batch_size: int = 1,
        question_batch_size: int | None = None,
        packing: bool = False,
        preload: bool = False,
        short_first: bool = False,
        batch_cutoff: bool = False,
        validation_draws: int = 1,
        validation_questions: int = 32,
        too_long: Literal["error", "skip"] = "error",
        streaming: bool = False,
        shuffle_mib: float = 16.0,
        num_workers: int = 0,
        cache_dir: str = "~/.cache/dream_lightning",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_options(locals())
        self.save_hyperparameters(ignore="tokenizer", logger=False)
        self.tokenizer, self.cache_dir, self.seed, self.num_workers = tokenizer, cache_dir, seed, num_workers
        self.source, self.validation_source, self.predict_source = source, validation_source, predict_source
        self.sources = source if isinstance(source, dict) else {source: 1.0}  # → weight
        self.validation_fraction, self.first_n, self.short_first = validation_fraction, first_n, short_first
        self.training_filters, self.streaming, self.shuffle_mib = training_filters, streaming, shuffle_mib
        self.reading = {"subset": subset, "schema": schema, "filters": filters, "reference_column": reference_column}
        self.reading |= {"prompt_column": prompt_column, "response_column": response_column}
        self.reading["task"] = None if task is None else load_task(task)
        self.prompting = {"style": style, "system_prompt": system_prompt}
        self.encoding = {**self.prompting, "thinking": thinking, "extra_weight": extra_weight, "train_on": train_on}
        self.encoding |= {"max_length": max_length, "overflow": overflow, "eos_fill_to": eos_fill_to}
        check_encoding(**self.encoding)
        self.training_encoding = self.encoding | {"trajectories": trajectories}
        self.batch_size, self.question_batch_size = batch_size, question_batch_size or batch_size
        self.packing, self.batch_cutoff, self.preload, self.too_long = packing, batch_cutoff, preload, too_long
        self.budget = max_length if packing else None  # of a packed row
        self.validation_draws, self.validation_questions = validation_draws, validation_questions
        self.train_set: TokenizedSet | ShardStream | None = None  # number → document
        self.validation_set: TokenizedSet | None = None
        self.questions: list[Example] = []
        self.several_turns: bool | None = None  # whether a training example has earlier messages; None: not known
        self._prompts: list[list[int]] = []  # ids of the questions' prompts
        self._answered: set[int] = set()
        self._given: list[Example] | None = None

    def prepare_data(self) -> None:
        # On one process of a machine; the others find the result in the cache.
        if self.trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn != "predict":
            training, validation = self.read()
            self.tokenized(validation, self.encoding)
            self._documents(training)

    def setup(self, stage: str) -> None:
        if stage == "predict":
            source, asked = self.predict_source, self._given
            if asked is None:
                asked = read_examples(source, split="test", **self.reading) if source else self.read()[1]
            self._ask(asked, f"{len(asked):,} questions are answered")
            return
        training, validation = self.read()
        asked = _scored(validation)[: self.validation_questions]
        self._ask(validation, f"validation: {len(asked):,} questions are answered and scored", asked)
        self.validation_set = self.tokenized(validation, self.encoding)
        rank_zero_info(f"validation: {self.validation_set.summary()}")
        if stage == "fit":
            warn_of_responses(training, self.tokenizer, self.encoding)
            turns = any(sum(m["role"] != "system" for m in example.prompt) > 1 for example in training)
            self.several_turns = turns or (None if self.streaming else False)
            self.train_set = self._documents(training)
            rank_zero_info(f"training: {self.train_set.summary()}")
            self._warn_of_ends()

    def read(self) -> tuple[list[Example], list[Example]]:
        """Examples to train on, of a stream those of its first shard, and to validate with."""
        if self.validation_source is not None:
            validation = read_examples(self.validation_source, split="validation", **self.reading)
        if self.streaming:
            training, held = self._stream.read()
            return training, held if self.validation_source is None else validation
        parts = [read_examples(source, split="train", **self.reading) for source in self.sources]
        training = list(chain(*parts))
        if self.validation_source is None:
            training, validation = split(training, validation_fraction=self.validation_fraction, seed=self.seed)
        training = keep(training, self.training_filters or {})[: self.first_n]
        if len(parts) > 1:
            kept = set(map(id, training))
            training = mix([[e for e in part if id(e) in kept] for part in parts], self.sources)
        if self.validation_source is not None:
            warn_of_overlap(training, validation)
        return training, validation

    def tokenized(self, examples: Sequence[Example], encoding: dict[str, Any]) -> TokenizedSet:
        return tokenize(examples, self.tokenizer, cache_dir=self.cache_dir, **encoding)

    def _documents(self, training: list[Example]) -> TokenizedSet | ShardStream:
        return self._stream if self.streaming else self.tokenized(training, self.training_encoding)

    @cached_property
    def _stream(self) -> ShardStream:
        return ShardStream(
            self.sources,
            self.tokenizer,
            reading=self.reading,
            encoding=self.training_encoding,
            cache_dir=self.cache_dir,
            shuffle_mib=self.shuffle_mib,
            num_workers=self.num_workers,
            held_fraction=self.validation_fraction if self.validation_source is None else None,
            seed=self.seed,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Batches of a stream, of documents on the model's device (`preload`), or of documents in memory."""
        order = {"seed": self.seed, **self._ranks(self.batch_size)}
        loading = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        if self.streaming:
            # With a number of batches, Lightning knows the length of an epoch, and reads no batch ahead.
            ahead = self.trainer is not None and isinstance(self.trainer.limit_train_batches, float)
            sampler = StreamSampler(self.train_set, budget=self.budget, read_ahead=ahead, **order)
        else:
            lengths = self.train_set.lengths.tolist()
            rows = pack(lengths, self.budget)
            sampler = RowSampler(rows, lengths=lengths if self.short_first else None, **order)
        if self.preload:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            return PreloadedLoader(PreloadedSet(self.train_set, device), sampler=sampler, **loading)
        collation = collate
        if self.batch_cutoff:
            collation = partial(collate_with_cutoff, eos_token_id=self.tokenizer.eos_token_id, seed=self.seed)
        loading |= {"persistent_workers": self.num_workers > 0, "pin_memory": torch.cuda.is_available()}
        return self._loader(self.train_set, sampler, collation, ResumableLoader, **loading)

    def val_dataloader(self) -> list[DataLoader]:
        ranks, rows = self._ranks(self.batch_size), pack(self.validation_set.lengths.tolist(), self.budget)
        sampler = RowSampler(rows, shuffle=False, repeats=self.validation_draws, **ranks)
        likelihood = self._loader(self.validation_set, sampler, collate, batch_size=self.batch_size)
        return [likelihood, self._question_loader(range(len(self.questions)))] if self.questions else [likelihood]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader | list:
        """The questions without an answer."""
        numbers = [n for n in range(len(self.questions)) if n not in self._answered]
        if self._answered:
            rank_zero_info(f"{len(self.questions) - len(numbers)} of {len(self.questions)} are answered already")
        return self._question_loader(numbers) if numbers else []

    def _question_loader(self, numbers: Sequence[int]) -> DataLoader:
        """Bucketed by length; an answer does not depend on its batch."""
        ranks = self._ranks(self.question_batch_size)
        window = _WINDOW * self.question_batch_size * ranks["world_size"]
        numbers = bucket_by_length(numbers, lambda n: len(self._prompts[n]), window=window)
        sampler = RowSampler([[n] for n in numbers], shuffle=False, **ranks)
        items = list(zip(self.questions, self._prompts, strict=True))
        return self._loader(items, sampler, collate_prompts, batch_size=self.question_batch_size)

    def _ranks(self, batch_size: int) -> dict[str, int]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return {"batch_size": batch_size, "rank": rank, "world_size": world_size}

    def _loader(
        self, items: Any, sampler: RowSampler, collation: Callable, kind: type[DataLoader] = DataLoader, **options: Any
    ) -> DataLoader:
        collation = partial(collation, pad_token_id=self.tokenizer.pad_token_id)
        return kind(KeyedItems(items), sampler=sampler, collate_fn=collation, **options)

    def ask(self, examples: list[Example], source: str) -> None:
        """Let `predict` answer these questions, which come from `source`, instead of those of `predict_source`."""
        self._given, self.predict_source = examples, source

    def skip_questions(self, numbers: Collection[int]) -> None:  # in `predict`: they are already answered
        self._answered = set(numbers)

    def prompt_lengths(self) -> list[int]:
        """Tokens of the questions' prompts."""
        return list(map(len, self._prompts))

    def question_settings(self) -> dict[str, Any]:  # what the prompts and grades of `predict` depend on
        records = [(e.id, e.prompt, e.reference, e.task, task_of(e).reference(e)) for e in self.questions]
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        return {
            "questions": self.predict_source or f"validation part of {self.validation_source or self.source}",
            "records": f"{len(records)}, hash {_hash(records)}",
            **self.prompting,
            "tokenizer": f"hash {_hash(tokenizer)}",
        }

    def _ask(self, examples: list[Example], summary: str, asked: list[Example] | None = None) -> None:
        """Set the questions, by default all, and say how many of the examples can be scored.

        A prompt that leaves the model no room for an answer becomes empty, or raises UserError, before the model is
        loaded.
        """
        count = len(_scored(examples))
        rank_zero_info(f"{summary}; {count:,} of {len(examples):,} rows can be scored")
        if not count and (asked is None or self.validation_questions):
            rank_zero_warn("no question can be scored, no row has a reference: set data.reference_column or data.task")
        self.questions = examples if asked is None else asked
        if plain := [example.origin for example in self.questions if not example.prompt]:
            raise UserError(f"{plain[0]} is plain text, wanted a question to answer: set predict_source")
        room = getattr(self.trainer and self.trainer.lightning_module, "max_prompt_length", None)
        self._prompts, too_long = [], []
        for example in self.questions:
            length = longer_than(room, "".join(m["content"] for m in example.prompt), self.tokenizer)
            ids = [] if length else encode_prompt(example, self.tokenizer, **self.prompting)
            if room is not None and (length := length or len(ids)) > room:
                too_long.append(f"{example.origin} ({length:,} tokens)")
                ids = []
            self._prompts.append(ids)
        if too_long:
            problem = (
                f"{len(too_long)} of {len(self.questions)} questions are longer than the {room:,} tokens that the "
                f"model's positions leave next to max_new_tokens, or max_length: {', '.join(too_long[:5])}"
            )
            if self.too_long == "error":
                raise UserError(f"{problem}; shorten or delete them, or set too_long to skip (data.too_long)")
            rank_zero_warn(f"{problem}; they get an empty answer")

    def _warn_of_ends(self) -> None:
        """Warn if rows of answers end elsewhere than training rows that were filled with eos after as long a prompt."""
        fill, most = self.encoding["eos_fill_to"], self.encoding["max_length"]
        answer_length = getattr(self.trainer and self.trainer.lightning_module, "answer_length", lambda _: None)
        if fill is None or self.batch_cutoff or not (self.streaming or self.train_set.filled.any()):
            return
        lengths = [(p, min(fill, most - p), answer_length(p)) for p in self.prompt_lengths() if 0 < p < most]
        if differ := [one for one in lengths if one[2] not in (None, one[1])]:
            prompt, trained, answer = differ[0]
            rank_zero_warn(
                f"{len(differ)} of {len(self.questions)} questions are answered in rows that end elsewhere than in "
                f"training: after a prompt of {prompt:,} tokens, the answer has {answer:,}, and data.eos_fill_to fills "
                f"a response to {trained:,}; a model learns where rows end, and answers worse in others: set "
                f"model.sampling.max_new_tokens to {fill} and model.sampling.max_length to {most}"
            )


def _check_options(o: dict[str, Any]) -> None:
    """Raise UserError for options that are out of range, or exclude each other."""
    for one, other, reason in (
        ("packing", o["batch_cutoff"] and "batch_cutoff", "the cutoff is drawn for one document a row"),
        ("trajectories", o["batch_cutoff"] and "batch_cutoff", "the cutoff changes the length of a response"),
        ("trajectories", o["train_on"] == "all" and "train_on all", "filled_at is of the last response"),
        *(("preload", o[n] and n, "batches are made on the device") for n in _ON_HOST),
        *(("streaming", o[n] not in (None, False) and n, f"{n} needs all records at once") for n in _WHOLE),
    ):
        if o[one] and other:
            raise UserError(f"{one} and {other} exclude each other: {reason}")
    least = dict.fromkeys(("batch_size", "question_batch_size", "first_n", "validation_draws"), 1)
    for name, bound in (least | {"validation_questions": 0, "num_workers": 0}).items():
        check_range(name, o[name], least=bound, whole=True)
    check_range("shuffle_mib", o["shuffle_mib"], least=0)
    check_range("validation_fraction", o["validation_fraction"], least=0, most=1)
    check_range("seed", o["seed"], least=0, most=2**32 - 1, whole=True)
    if isinstance(o["source"], dict):
        if not o["source"] or o["first_n"]:
            raise UserError(f"source is {o['source']!r:.200}, a mixture: name a source at least, and leave first_n out")
        for name, weight in o["source"].items():
            check_range(f"weight of {name}", weight, least=1e-9)


def _scored(examples: list[Example]) -> list[Example]:
    return [example for example in examples if task_of(example).reference(example) is not None]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()[:16]
