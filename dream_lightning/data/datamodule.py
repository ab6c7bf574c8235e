"""The LightningDataModule: from a source of records to batches of documents and of questions."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example, SampleKey
from dream_lightning.data.document_cache import TokenizedSet, tokenize
from dream_lightning.data.epoch_order import KeyRow, ResumableLoader, RowSampler, bucket_by_length
from dream_lightning.data.packing import collate, collate_prompts, collate_with_cutoff, pack
from dream_lightning.data.prompt_format import Style, encode_prompt
from dream_lightning.data.schemas import read_examples
from dream_lightning.data.splits import split
from dream_lightning.data.tokenization import Overflow
from dream_lightning.errors import UserError
from dream_lightning.tasks import apply_task, load_task, task_of

# Batches per process that predict sorts by length together. In batches of 8, padding is then 13 % of the prompts'
# positions for s1K, 5 % for GSM8K and 19 % for MATH-500, instead of 48, 31 and 58 % in file order.
_WINDOW = 16


class S1KDataModule(L.LightningDataModule):
    """s1K, s1K-1.1, chats or prompt/response records, for training, validation and answering.

    Args:
        source: training records: a .jsonl, .json, .parquet or .csv file, a folder of them or of `save_to_disk`, a hub
            id such as simplescaling/s1K-1.1, or `bundled` for the package's own arithmetic set.
        tokenizer: of the model; the command line sets it.
        validation_source: a separate source for validation; None splits `validation_fraction` off `source`.
        validation_fraction: share of `source` held out, whole questions, chosen by `seed`.
        predict_source: questions for `predict`; None uses the validation questions.
        subset: of a hub data set that has several, such as `main` of openai/gsm8k; files and folders have none.
        schema: how a record is read, see `data.schemas`; `auto` detects it from the columns.
        prompt_column: column of the question in prompt/response records; None finds the usual names.
        response_column: column of the response; None finds the usual names.
        reference_column: column that predictions are scored against; None finds the usual names.
        task: how questions are asked and answers graded: math, countdown, sudoku, choice, exact, or the import path of
            your own, see docs/evaluation.md; None is math. A record's own `task` column takes precedence if it names a
            task.
        filters: column → values that a record must have one of, such as {cot_type: [math]}.
        first_n: only the first records of the training set.
        style: `chat` uses the tokenizer's template; `plain` is "Question: … Let's think step by step. …".
        system_prompt: replaces the record's or the template's.
        thinking: False trains on answers alone.
        max_length: of prompt and response in tokens; also the length of a packed row.
        overflow: `truncate_trace` shortens the thinking of longer documents; the others: docs/data.md.
        eos_fill_to: fill shorter responses with eos to this many tokens; teaches the model to stop.
        extra_weight: text → loss weight of its tokens in responses, such as {"</think>": 2.0}.
        batch_size: rows of a micro-batch on each process; questions of a batch in generation.
        packing: put several whole documents into a row.
        batch_cutoff: the authors' collation: truncate or fill all responses of a micro-batch to one drawn length.
        validation_draws: how often each validation document is noised, at evenly spread t, for a steadier `val/nll`.
        validation_questions: how many validation questions are answered and scored at every validation.
        num_workers: processes that prepare batches.
        cache_dir: where tokenized sets are kept.
        seed: of the split and of the order in an epoch.

    Raises:
        UserError: an option is out of range, or two exclude each other; in `setup`, a record cannot be read.
    """

    def __init__(
        self,
        source: str,
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
        filters: dict[str, list[str]] | None = None,
        first_n: int | None = None,
        style: Style = "chat",
        system_prompt: str | None = None,
        thinking: bool = True,
        max_length: int = 8192,
        overflow: Overflow = "truncate_trace",
        eos_fill_to: int | None = None,
        extra_weight: dict[str, float] | None = None,
        batch_size: int = 1,
        packing: bool = False,
        batch_cutoff: bool = False,
        validation_draws: int = 1,
        validation_questions: int = 32,
        num_workers: int = 0,
        cache_dir: str = "~/.cache/dream_lightning",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if packing and batch_cutoff:
            raise UserError("packing and batch_cutoff exclude each other: the cutoff is drawn for one document a row")
        least = {"batch_size": (1, batch_size), "first_n": (1, first_n), "validation_draws": (1, validation_draws)}
        least |= {"max_length": (1, max_length), "eos_fill_to": (1, eos_fill_to), "num_workers": (0, num_workers)}
        least |= {"validation_questions": (0, validation_questions)}
        least |= {f"extra_weight of {text!r}": (0, weight) for text, weight in (extra_weight or {}).items()}
        for name, (lowest, value) in least.items():
            if value is not None and not value >= lowest:  # written so that NaN is refused
                raise UserError(f"{name} is {value}, wanted at least {lowest}")
        self.tokenizer, self.cache_dir, self.seed = tokenizer, cache_dir, seed
        self.source, self.validation_source, self.predict_source = source, validation_source, predict_source
        self.validation_fraction, self.first_n = validation_fraction, first_n
        self.reading = {"subset": subset, "schema": schema, "filters": filters, "reference_column": reference_column}
        self.reading |= {"prompt_column": prompt_column, "response_column": response_column}
        self.reading["task"] = None if task is None else load_task(task)
        self.prompting = {"style": style, "system_prompt": system_prompt}
        self.encoding = {**self.prompting, "thinking": thinking, "extra_weight": extra_weight}
        self.encoding |= {"max_length": max_length, "overflow": overflow, "eos_fill_to": eos_fill_to}
        self.batch_size, self.packing, self.batch_cutoff = batch_size, packing, batch_cutoff
        self.validation_draws, self.validation_questions = validation_draws, validation_questions
        self.num_workers = num_workers
        self.train_set: TokenizedSet | None = None
        self.validation_set: TokenizedSet | None = None
        self.questions: list[Example] = []
        self._answered: set[int] = set()

    def prepare_data(self) -> None:
        # On one process of a machine; the others find the result in the cache.
        if self.trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn != "predict":
            for examples in self.read():
                self.tokenized(examples)

    def read(self) -> tuple[list[Example], list[Example]]:
        training = self._examples(self.source, "train")
        if self.validation_source is None:
            training, validation = split(training, validation_fraction=self.validation_fraction, seed=self.seed)
        else:
            validation = self._examples(self.validation_source, "validation")
        return training[: self.first_n], validation

    def _examples(self, source: str, part: str) -> list[Example]:
        return [apply_task(e, self.reading["task"]) for e in read_examples(source, split=part, **self.reading)]

    def tokenized(self, examples: Sequence[Example], name: str = "") -> TokenizedSet:
        """Documents of the examples, cached; a `name` prints a summary."""
        documents = tokenize(examples, self.tokenizer, cache_dir=self.cache_dir, **self.encoding)
        if name:
            lengths, cut = documents.lengths, documents.cut_tokens
            rank_zero_info(
                f"{name}: {len(documents):,} documents, {lengths.sum():,} tokens, longest {lengths.max():,}; "
                f"{(cut > 0).sum():,} shortened by {cut.sum():,} tokens, {documents.dropped:,} dropped"
            )
        return documents

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.questions = self._examples(self.predict_source, "test") if self.predict_source else self.read()[1]
            return
        training, validation = self.read()
        gradable = [e for e in validation if e.reference is not None or e.task is not None]
        self.questions = gradable[: self.validation_questions]
        self.validation_set = self.tokenized(validation, "validation")
        if stage == "fit":
            self.train_set = self.tokenized(training, "training")

    def question_settings(self) -> dict[str, Any]:  # what the prompts and grades of `predict` depend on
        records = [(e.id, e.prompt, e.reference, e.task, task_of(e).reference(e)) for e in self.questions]
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        return {
            "questions": self.predict_source or f"validation part of {self.validation_source or self.source}",
            "records": f"{len(records)}, hash {_hash(records)}",
            **self.prompting,
            "tokenizer": f"hash {_hash(tokenizer)}",
        }

    def skip_questions(self, numbers: Collection[int]) -> None:  # in `predict`: they are already answered
        self._answered = set(numbers)

    def train_dataloader(self) -> ResumableLoader:
        collation = collate
        if self.batch_cutoff:
            collation = partial(collate_with_cutoff, eos_token_id=self.tokenizer.eos_token_id, seed=self.seed)
        return ResumableLoader(
            KeyedItems(self.train_set),
            batch_size=self.batch_size,
            sampler=self._sampler(self._rows(self.train_set), shuffle=True, seed=self.seed),
            collate_fn=partial(collation, pad_token_id=self.tokenizer.pad_token_id),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[DataLoader]:
        sampler = self._sampler(self._rows(self.validation_set), shuffle=False, repeats=self.validation_draws)
        likelihood = self._loader(self.validation_set, sampler, collate)
        return [likelihood, self._question_loader(range(len(self.questions)))] if self.questions else [likelihood]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader | list:
        """The questions without an answer, bucketed by length; an answer does not depend on its batch."""
        numbers = [n for n in range(len(self.questions)) if n not in self._answered]
        if self._answered:
            rank_zero_info(f"{len(self.questions) - len(numbers)} of {len(self.questions)} are answered already")
        return self._question_loader(numbers, bucket=True) if numbers else []

    def _rows(self, documents: TokenizedSet) -> list[list[int]]:
        if self.packing:
            return pack(documents.lengths.tolist(), self.encoding["max_length"])
        return [[i] for i in range(len(documents))]

    def _sampler(self, rows: list[list[int]], **options: Any) -> RowSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return RowSampler(rows, batch_size=self.batch_size, rank=rank, world_size=world_size, **options)

    def _loader(self, items: Any, sampler: RowSampler, collation: Callable) -> DataLoader:
        collation = partial(collation, pad_token_id=self.tokenizer.pad_token_id)
        return DataLoader(KeyedItems(items), batch_size=self.batch_size, sampler=sampler, collate_fn=collation)

    def _question_loader(self, numbers: Sequence[int], *, bucket: bool = False) -> DataLoader:
        prompts = {n: encode_prompt(self.questions[n], self.tokenizer, **self.prompting) for n in numbers}
        if bucket:
            window = _WINDOW * self.batch_size * (self.trainer.world_size if self.trainer else 1)
            numbers = bucket_by_length(numbers, [len(prompts[n]) for n in numbers], window=window)
        items = {n: (self.questions[n], ids) for n, ids in prompts.items()}
        return self._loader(items, self._sampler([[n] for n in numbers], shuffle=False), collate_prompts)


class KeyedItems(Dataset):
    """Maps a row of sample keys to pairs of key and item, from a sequence or a dict by number."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: KeyRow) -> list[tuple[SampleKey, Any]]:
        return [(key, self.items[key.index]) for key in row]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()[:16]
