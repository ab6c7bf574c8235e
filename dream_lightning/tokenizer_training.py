"""Train a byte-level BPE tokenizer for a new Dream, in one pass over files, in memory that `max_mib` bounds."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dream_lightning.data.sources import read_rows
from dream_lightning.errors import UserError, check_range, reading
from dream_lightning.export import new_folder
from dream_lightning.model.tokenizer import set_pieces, with_dreams_tokens

_RECORDS, _TEXTS = (".jsonl", ".parquet"), (".txt", ".md")
_NO_TEXT = ("id", "unique_id", "role", "from")  # columns and keys
_BLOCK = 2**14  # characters of a text file at once
_HELD_OUT = 50  # every 50th text
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class TrainedTokenizer(NamedTuple):
    """A tokenizer, what it learned from, and texts that it has not seen."""

    tokenizer: PreTrainedTokenizerFast
    texts: int  # learned from
    text_bytes: int
    held_out: list[str]


def train_tokenizer(parser: ArgumentParser, arguments: list[str]) -> None:
    """Train a byte-level BPE tokenizer on files of text.

    Reports compression and exactness of the round trip on held-out text.
    """
    parser.add_argument("sources", nargs="+", type=str, help=".jsonl, .parquet, .txt or .md files, or folders of them")
    parser.add_argument("--folder", type=str, required=True, help="new folder, for --model.tokenizer")
    parser.add_function_arguments(learn, as_positional=False, skip={"sources"})
    options = parser.parse_args(arguments).as_dict()
    with new_folder(options.pop("folder"), size=2**20) as partial_folder:
        trained = learn(**options)
        trained.tokenizer.save_pretrained(partial_folder)
    print(report(trained))


def learn(
    sources: list[str],
    *,
    vocab_size: int = 6400,
    tags: bool = False,
    max_mib: int = 16,
    columns: list[str] | None = None,
) -> TrainedTokenizer:
    """A tokenizer that cuts text as Dream's does, with its special tokens and chat template.

    Args:
        sources: .jsonl, .parquet, .txt or .md files, or folders, of which all such files are read.
        vocab_size: entries, the 256 bytes, the special tokens and the tags included.
        tags: make `<think>`, `</think>`, `<answer>` and `</answer>` single tokens.
        max_mib: MiB of text to learn from. Of larger files every n-th text is taken. Memory grows with it: by 3 MiB for
            each of repetitive English, by up to 140 for each of Chinese, whose phrases hardly repeat.
        columns: columns of records to learn from. Default: every text in a record but ids and roles.

    Raises:
        UserError: an option out of its range; a file that is missing, damaged or of another kind; no text.
    """
    added = 5 + len(TAGS) * tags
    check_range("vocab_size", vocab_size, least=256 + added, most=2**20, whole=True)
    check_range("max_mib", max_mib, least=1, most=2**20, whole=True)
    files = [file for source in sources for file in _files(Path(source).expanduser())]
    size, limit = sum(file.stat().st_size for file in files), max_mib * 2**20
    every, held_out, counts = max(-(-size // limit), 1), [], [0, 0]

    def chosen() -> Iterator[str]:
        for number, text in enumerate(text for file in files for text in _texts(file, columns)):
            if number % (every * _HELD_OUT) == 0 and sum(map(len, held_out)) < 2**20:
                held_out.append(text)
            elif number % every == 0:
                if counts[1] >= limit:  # parquet files are compressed
                    return
                counts[:] = counts[0] + 1, counts[1] + len(text.encode())
                yield text

    tokenizer = Tokenizer(models.BPE())
    set_pieces(tokenizer)
    options = {"vocab_size": vocab_size - added, "min_frequency": 2, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    tokenizer.train_from_iterator(chosen(), trainer)
    if not counts[0]:
        raise UserError(f"{', '.join(sources)} has {len(held_out)} texts, wanted at least 2, one of them held out")
    return TrainedTokenizer(with_dreams_tokens(tokenizer, TAGS if tags else ()), *counts, held_out)


def report(trained: TrainedTokenizer) -> str:
    """Entries, compression and exactness of the round trip on the held-out texts, as lines."""
    tokenizer, texts = trained.tokenizer, trained.held_out
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    normalized = list(map(tokenizer.backend_tokenizer.normalizer.normalize_str, texts))
    exact = sum(text == tokenizer.decode(one) for text, one in zip(normalized, ids, strict=True))
    changed = sum(a != b for a, b in zip(texts, normalized, strict=True))
    held_bytes, tokens = sum(len(text.encode()) for text in normalized), sum(map(len, ids))
    return "\n".join(
        [
            f"learned from   {trained.texts:,} texts, {trained.text_bytes / 2**20:,.1f} MiB",
            f"entries        {len(tokenizer):,}",
            f"compression    {held_bytes / max(tokens, 1):.3f} bytes per token on {len(texts):,} held-out texts",
            f"round trip     exact for {exact:,} of {len(texts):,}; NFC changed {changed:,} of them before",
        ]
    )


def _files(path: Path) -> list[Path]:
    kinds = (*_RECORDS, *_TEXTS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in kinds)
    else:
        files = [path] if path.suffix in kinds and path.exists() else []
    if not files:
        raise UserError(f"{path} is no file or folder of files that end in {', '.join(kinds)}: name one")
    return files


def _texts(file: Path, columns: list[str] | None) -> Iterator[str]:
    if file.suffix in _TEXTS:
        with reading(file, "UTF-8 text"), file.open(encoding="utf-8", newline="") as opened:
            yield from iter(partial(opened.read, _BLOCK), "")
        return
    for row in read_rows(file):
        values = [row.value(name) for name in columns] if columns else row.record
        if text := "\n".join(_strings(values)):
            yield text


def _strings(value: Any) -> Iterator[str]:
    """The texts in a record, messages and lists included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in _NO_TEXT:
                yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
