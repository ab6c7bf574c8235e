"""All examples of a set → documents, tokenized in parallel and once: a folder of arrays named by a content hash."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dream_lightning.atomic import atomic_write, check_folder
from dream_lightning.batch import Document, Example
from dream_lightning.data.processes import map_in_processes
from dream_lightning.data.tokenization import encode_documents
from dream_lightning.errors import UserError, reading

_FORMAT = 4  # part of the hash: raise it when encode() gives other documents for the same input
_PARALLEL_FROM = 500  # examples; with fewer, starting processes takes longer than they save
_CHUNK = 64  # examples that a process encodes at once, and returns as arrays: small to send


class TokenizedSet(Sequence[Document]):
    """The documents of a set, memory-mapped from disk if cached, and what happened to every example.

    Arrays have one entry an example, or a trained turn or a document of a plain text: `full_length` before truncation
    and filling, `prompt_length`, and `response_length` as kept, with eos and its filling, 0 for a dropped one.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.full_length, self.prompt_length, self.response_length, self.filled = arrays["counts"]  # [examples]
        self.is_kept = self.response_length > 0  # [examples] bool
        whole = self.prompt_length + self.response_length
        self.cut_tokens = np.where(self.is_kept, self.full_length - (whole - self.filled), 0)  # [examples]
        self.kept = np.flatnonzero(self.is_kept)  # document number → example number
        self.lengths = whole[self.kept]  # [documents]
        self.dropped = len(self.is_kept) - len(self.kept)  # examples without a document
        self._ends = self.lengths.cumsum()

    @classmethod
    def of(cls, parts: Iterable[dict[str, np.ndarray]]) -> "TokenizedSet":
        """One set of what `encode_arrays` made of several parts of it."""
        parts = list(parts)
        arrays = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
        if (arrays["weights"] == 1).all():
            arrays["weights"] = arrays["weights"][:0]
        return cls(arrays)

    @classmethod
    def load(cls, folder: Path) -> "TokenizedSet":
        with reading(folder, "a tokenized set", "delete that folder, or set data.cache_dir to another"):
            return cls({file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")})

    def save(self, folder: Path) -> None:
        """Write a new folder, atomically. Of several processes, the first to finish does."""
        try:
            with atomic_write(folder) as partial_folder:
                partial_folder.mkdir()
                for name, array in self.arrays.items():
                    np.save(partial_folder / f"{name}.npy", array)
                if folder.exists():  # never replace what another process has memory-mapped
                    raise FileExistsError(folder)
        except OSError:
            if not folder.exists():
                raise

    def summary(self) -> str:
        return (
            f"{len(self):,} documents, {self.lengths.sum():,} tokens, longest {self.lengths.max():,}; "
            f"{(self.cut_tokens > 0).sum():,} shortened by {self.cut_tokens.sum():,} tokens, {self.dropped:,} dropped"
        )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Document:
        end, length = self._ends[index], self.lengths[index]
        response = end - length + self.prompt_length[self.kept[index]]
        weights, trajectory = self.arrays["weights"], self.arrays["trajectory"]
        return Document(
            id=str(self.arrays["names"][index]),
            prompt_ids=self.arrays["ids"][end - length : response].tolist(),
            response_ids=self.arrays["ids"][response:end].tolist(),
            response_weight=weights[response:end].tolist() if len(weights) else [1.0] * int(end - response),
            trajectory=trajectory[response:end].tolist() if len(trajectory) else None,
        )


def encode_arrays(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, **encoding: Any
) -> dict[str, np.ndarray]:
    """What `encode_documents` makes of some examples, as the arrays of a TokenizedSet."""
    ids, weights, trajectory, names, counts = array("i"), array("f"), array("f"), [], []
    encoded = chain.from_iterable(encode_documents(example, tokenizer, **encoding) for example in examples)
    for document, prompt_length, full_length, filled in encoded:
        counts.append((full_length, prompt_length, len(document.response_ids) if document else 0, filled))
        if document is not None:
            ids.extend(document.prompt_ids + document.response_ids)
            weights.extend([1.0] * prompt_length + document.response_weight)
            names.append(document.id)
            if document.trajectory is not None:
                trajectory.extend([0.0] * prompt_length + document.trajectory)
    return {
        "ids": np.array(ids, np.int32),  # [tokens]
        "weights": np.array(weights, np.float32),  # [tokens]; of a set [0] if all are 1
        "trajectory": np.array(trajectory, np.float32),  # [tokens], or [0] without
        "names": np.array(names, np.str_),  # [documents]
        "counts": np.array(counts, np.int64).reshape(-1, 4).T,  # [4, examples]
    }


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    **encoding: Any,
) -> TokenizedSet:
    """Documents of all examples.

    Args:
        num_proc: processes; None takes 1 below 500 examples, up to 8 from there if they can be forked.
        cache_dir: a later call with the same arguments reads the result from here; several processes may fill it.
        encoding: options of `tokenization.encode_documents`.

    Raises UserError without examples, if every document is dropped or the disk is full, and as `encode`.
    """
    if not examples:
        raise UserError("no examples to tokenize: check the source, the filters and the split")
    folder = None
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser() / f"documents-{_content_hash(examples, tokenizer, encoding)}"
        if os.path.exists(folder):  # of a folder of another user, too: Path.exists raises PermissionError
            return TokenizedSet.load(folder)
        check_folder("data.cache_dir", folder.parent)
    if num_proc is None:
        # Only Linux tells which cores this process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        forks = get_all_start_methods()[0] == "fork"  # elsewhere, a process imports the program, and a script again
        num_proc = min(8, cores) if forks and len(examples) >= _PARALLEL_FROM else 1
    encode = partial(_encode_chunk, examples=examples, tokenizer=tokenizer, encoding=encoding)
    chunks = range(0, len(examples), _CHUNK)
    arrays = map_in_processes(encode, chunks, num_proc if num_proc > 1 else 0)
    bar = tqdm(arrays, "Tokenizing", len(chunks), unit=f" × {_CHUNK} examples", disable=None)
    documents = TokenizedSet.of(bar)
    if not len(documents):
        raise UserError(
            f"overflow drops all {len(examples)} documents: the shortest has {documents.full_length.min():,} tokens, "
            f"max_length is {encoding['max_length']}; raise it, or truncate"
        )
    if folder is None:
        return documents
    documents.save(folder)
    return TokenizedSet.load(folder)


def _encode_chunk(
    start: int, *, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, encoding: dict[str, Any]
) -> dict[str, np.ndarray]:
    return encode_arrays(examples[start : start + _CHUNK], tokenizer, **encoding)


def settings_hash(tokenizer: PreTrainedTokenizerBase, encoding: dict[str, Any]) -> str:
    settings = [_FORMAT, encoding, tokenizer.chat_template, tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _content_hash(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, encoding: dict[str, Any]) -> str:
    digest = hashlib.sha256(settings_hash(tokenizer, encoding).encode())
    for e in examples:
        texts = [e.id, e.prompt, e.thinking, e.answer, e.reference, e.filled_at, e.tools, e.tool_calls]
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:32]
