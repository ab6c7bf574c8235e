"""The LightningDataModule: from a source of records to batches of noise-addressed rows and of questions."""

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Document, Example, PromptBatch, SampleKey
from dream_lightning.data.encoding import Overflow, Style, encode_prompt
from dream_lightning.data.epoch_order import ResumableLoader, Row, RowSampler
from dream_lightning.data.length_bucketing import by_length
from dream_lightning.data.packing import KeyedRow, collate, collate_with_cutoff, pack
from dream_lightning.data.schemas import Schema, Trace, read_examples
from dream_lightning.data.splits import first, fraction_of, split
from dream_lightning.data.tokenization import TokenizedSet, tokenize
from dream_lightning.errors import UserError

# Batches a process among which predict sorts by length. Of the prompts' positions in batches of 8, padding is then 13 %
# for s1K, 5 % for GSM8K and 19 % for MATH-500, instead of 48, 31 and 58 % in the order of the files; with 64 it is 5, 1
# and 7 %, but the file, which keeps that order, stands still longer. Answers of 256 tokens outweigh either.
_WINDOW = 16


class S1KDataModule(L.LightningDataModule):
    """s1K, s1K-1.1, chats or prompt/response records, for training, validation and questioning.

    Args:
        source: training records: a .jsonl, .json, .parquet or .csv file, a folder of them or of `save_to_disk`, a hub
            id such as simplescaling/s1K-1.1, or `bundled` for the package's own arithmetic set.
        tokenizer: of the model; the command line takes it from there.
        validation_source: a source of its own for validation; None splits `validation_fraction` off `source`.
        validation_fraction: share of `source` held out, whole questions, chosen by `seed`.
        predict_source: questions for `predict`; None asks the validation questions.
        subset: of a hub data set that has several, such as `main` of openai/gsm8k; files and folders have none.
        schema: how a record is read; `auto` goes by its columns.
        trace: whose thinking to take from s1K-1.1.
        prompt_column: column of the question in prompt/response records; None finds the usual names.
        response_column: column of the response; None finds the usual names.
        reference_column: column that predictions are scored against; None finds the usual names.
        filters: column → values that a record must have one of, such as {cot_type: [math]}.
        first_n: only the first records of the training set.
        fraction: only a fixed random part of the training set.
        style: `chat` uses the tokenizer's template; `plain` is "Question: … Let's think step by step. …".
        system_prompt: replaces the record's or the template's.
        thinking: False trains on answers alone.
        max_length: of prompt and response in tokens; also the length of a packed row.
        overflow: what happens to longer documents: `truncate_trace` (shorten the thinking, keep answer and eos),
            `truncate_trace_else_drop` (where that is not enough, leave it out), `drop`, `error`, or `truncate_right`
            (cuts the answer off, as others do).
        eos_fill_to: fill shorter responses with eos to this many tokens; teaches the model to stop.
        extra_weight: text → loss weight of its tokens in responses, such as {"</think>": 2.0}.
        batch_size: rows a micro-batch and process; questions a batch in generation.
        packing: put several whole documents into a row.
        batch_cutoff: the authors' collation: cut or fill all responses of a micro-batch to one drawn length.
        validation_draws: how often each validation document is noised, at evenly spread t; more lowers the noise of
            `val/nll`.
        validation_questions: how many validation questions are answered and scored at every validation.
        num_workers: processes that prepare batches.
        cache_dir: where tokenised sets are kept.
        seed: of the split and of the epochs' order.

    Raises:
        UserError: an option out of its range, or two that exclude each other; later, at setup, whatever is wrong with
            the records.
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
        schema: Schema = "auto",
        trace: Trace = "deepseek",
        prompt_column: str | None = None,
        response_column: str | None = None,
        reference_column: str | None = None,
        filters: dict[str, list[str]] | None = None,
        first_n: int | None = None,
        fraction: float | None = None,
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
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("validation_draws", validation_draws, 1),
            ("validation_questions", validation_questions, 0),
            ("max_length", max_length, 1),
            ("eos_fill_to", eos_fill_to, 1),
            ("num_workers", num_workers, 0),
            *((f"extra_weight of {text!r}", weight, 0) for text, weight in (extra_weight or {}).items()),
        ):
            if value is not None and not value >= least:  # nor NaN
                raise UserError(f"{name} is {value}, wanted at least {least}")
        self.source, self.tokenizer = source, tokenizer
        self.validation_source, self.validation_fraction = validation_source, validation_fraction
        self.predict_source, self.first_n, self.fraction = predict_source, first_n, fraction
        self.reading: dict[str, Any] = {
            "subset": subset,
            "schema": schema,
            "trace": trace,
            "prompt_column": prompt_column,
            "response_column": response_column,
            "reference_column": reference_column,
            "filters": filters,
        }
        self.prompting = {"style": style, "system_prompt": system_prompt}
        self.encoding = {
            **self.prompting,
            "thinking": thinking,
            "max_length": max_length,
            "overflow": overflow,
            "eos_fill_to": eos_fill_to,
            "extra_weight": extra_weight,
        }
        self.max_length, self.batch_size, self.packing, self.batch_cutoff = (
            max_length,
            batch_size,
            packing,
            batch_cutoff,
        )
        self.validation_draws, self.validation_questions = validation_draws, validation_questions
        self.num_workers, self.cache_dir, self.seed = num_workers, cache_dir, seed
        self.train_set: TokenizedSet | None = None
        self.validation_set: TokenizedSet | None = None
        self.questions: list[Example] = []
        self._answered: Collection[int] = ()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare_data(self) -> None:
        """Read and tokenise once, on one process of a machine; the others find the result in the cache."""
        if self.trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn != "predict":
            for examples in self.read():
                self.tokenized(examples)

    def read(self) -> tuple[list[Example], list[Example]]:
        """Training and validation examples."""
        examples = read_examples(self.source, split="train", **self.reading)
        if self.validation_source is None:
            training, validation = split(examples, validation_fraction=self.validation_fraction, seed=self.seed)
        else:
            training = examples
            validation = read_examples(self.validation_source, split="validation", **self.reading)
        if self.first_n is not None:
            training = first(training, self.first_n)
        if self.fraction is not None:
            training = fraction_of(training, self.fraction)
        return training, validation

    def tokenized(self, examples: Sequence[Example]) -> TokenizedSet:
        """Documents of the examples, from the cache where they are there."""
        return tokenize(examples, self.tokenizer, cache_dir=self.cache_dir, **self.encoding)

    def setup(self, stage: str) -> None:
        """Read, split and tokenise what the stage needs."""
        if stage == "predict":
            if self.predict_source is not None:
                self.questions = read_examples(self.predict_source, split="test", **self.reading)
            else:
                self.questions = self.read()[1]
            return
        training, validation = self.read()
        self.questions = [e for e in validation if e.reference is not None][: self.validation_questions]
        self.validation_set = self.tokenized(validation)
        rank_zero_info(_summary("validation", self.validation_set))
        if stage == "fit":
            self.train_set = self.tokenized(training)
            rank_zero_info(_summary("training", self.train_set))

    def question_settings(self) -> dict[str, Any]:
        """What the prompts of `predict` depend on, in words and as hashes: filters and columns show in the records."""
        records = [(e.id, e.prompt, e.reference) for e in self.questions]
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        return {
            "questions": self.predict_source or f"validation part of {self.validation_source or self.source}",
            "records": f"{len(records)}, hash {_hash(records)}",
            "prompting": self.prompting,
            "tokenizer": f"hash {_hash(tokenizer)}",
        }

    def question_numbers(self) -> dict[str, int]:
        """The id of every question of `predict` → its number in their order."""
        return {example.id: number for number, example in enumerate(self.questions)}

    def skip_questions(self, numbers: Collection[int]) -> None:
        """Leave these out of `predict`: they are answered already."""
        self._answered = set(numbers)

    # ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the epoch's order, resumable in the middle."""
        sampler = self._sampler(self._rows(self.train_set), shuffle=True, seed=self.seed)
        return ResumableLoader(
            KeyedDocuments(self.train_set),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Documents to score by likelihood, and questions to answer."""
        sampler = self._sampler(self._rows(self.validation_set), shuffle=False, repeats=self.validation_draws)
        likelihood = DataLoader(
            KeyedDocuments(self.validation_set),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate, pad_token_id=self.tokenizer.pad_token_id),
        )
        if not self.questions:
            return [likelihood]
        prompts = KeyedPrompts(self.questions, self.tokenizer, self.prompting)
        return [likelihood, self._question_loader(prompts, range(len(prompts)))]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader | list:
        """The questions that have no answer yet, batched by length; an answer does not depend on its batch."""
        numbers = [n for n in range(len(self.questions)) if n not in self._answered]
        if self._answered:
            rank_zero_info(f"{len(self.questions) - len(numbers)} of {len(self.questions)} are answered already")
        if not numbers:
            return []
        prompts = KeyedPrompts(self.questions, self.tokenizer, self.prompting)
        world_size = self.trainer.world_size if self.trainer else 1
        window = _WINDOW * self.batch_size * world_size
        return self._question_loader(prompts, by_length(numbers, prompts.lengths(numbers), window=window))

    def _rows(self, documents: TokenizedSet) -> list[list[int]]:
        if self.packing:
            return pack(documents.lengths.tolist(), self.max_length)
        return [[i] for i in range(len(documents))]

    def _sampler(self, rows: list[list[int]], **options: Any) -> RowSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return RowSampler(rows, batch_size=self.batch_size, rank=rank, world_size=world_size, **options)

    def _collate(self) -> Any:
        pad = self.tokenizer.pad_token_id
        if self.batch_cutoff:
            eos = self.tokenizer.eos_token_id
            return partial(collate_with_cutoff, pad_token_id=pad, eos_token_id=eos, seed=self.seed)
        return partial(collate, pad_token_id=pad)

    def _question_loader(self, prompts: "KeyedPrompts", numbers: Sequence[int]) -> DataLoader:
        sampler = self._sampler([[n] for n in numbers], shuffle=False)
        return DataLoader(prompts, batch_size=self.batch_size, sampler=sampler, collate_fn=prompts.collate)


class KeyedDocuments(Dataset):
    """Looks rows of draws up: what a worker process holds."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row: Row) -> KeyedRow:
        return [(draw, self.documents[draw.index]) for draw in row]


class KeyedPrompts(Dataset):
    """Questions as ids, without their answers."""

    def __init__(
        self, questions: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompting: dict[str, Any]
    ) -> None:
        self.questions, self.tokenizer, self.prompting = questions, tokenizer, prompting

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, row: Row) -> tuple[SampleKey, Example, list[int]]:
        (draw,) = row
        example = self.questions[draw.index]
        return draw, example, encode_prompt(example, self.tokenizer, **self.prompting)

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Tokens of these prompts: 0.7 ms each."""
        return [len(encode_prompt(self.questions[n], self.tokenizer, **self.prompting)) for n in numbers]

    def collate(self, items: Sequence[tuple[SampleKey, Example, list[int]]]) -> PromptBatch:
        """Pad on the left to the longest prompt."""
        length = max(len(ids) for _, _, ids in items)
        input_ids = torch.full((len(items), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(items), length, dtype=torch.bool)
        for b, (_, _, ids) in enumerate(items):
            input_ids[b, length - len(ids) :] = torch.tensor(ids)
            attention_mask[b, length - len(ids) :] = True
        return PromptBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            sample_ids=torch.tensor([draw.index for draw, _, _ in items]),
            counted=torch.tensor([draw.counted for draw, _, _ in items]),
            examples=[example for _, example, _ in items],
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _summary(name: str, documents: TokenizedSet) -> str:
    shortened = int((documents.cut_tokens > 0).sum())
    return (
        f"{name}: {len(documents):,} documents, {int(documents.lengths.sum()):,} tokens, longest "
        f"{int(documents.lengths.max()):,}; {shortened:,} shortened by {int(documents.cut_tokens.sum()):,} tokens, "
        f"{documents.dropped:,} dropped"
    )
