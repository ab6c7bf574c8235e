"""Lengths of a data set in tokens, and what a length limit does to it.

python scripts/data_report.py --source train.jsonl --tokenizer Dream-org/Dream-v0-Instruct-7B --max_length 4096
"""

from jsonargparse import auto_cli

from dream_lightning.data import read_examples, tokenize
from dream_lightning.data.prompt_format import Style
from dream_lightning.data.report import report
from dream_lightning.data.tokenization import Overflow
from dream_lightning.model.tokenizer import load_tokenizer
from dream_lightning.readable_errors import readable_errors


def main(
    source: str,
    tokenizer: str,
    schema: str = "auto",
    prompt_column: str | None = None,
    response_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    filters: dict[str, list[str]] | None = None,
    style: Style = "chat",
    thinking: bool = True,
    max_length: int | None = None,
    overflow: Overflow = "truncate_trace",
    eos_fill_to: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> None:
    """Print the report.

    Args:
        source: file, folder or hub id of the records.
        tokenizer: folder or hub id, or bytes.
        schema: how a record is read; auto goes by its columns.
        prompt_column: of prompt/response records.
        response_column: of prompt/response records.
        split: of a folder or hub data set.
        subset: of a hub data set that has several, such as main of openai/gsm8k.
        filters: column → values that a record must have one of.
        style: chat or plain.
        thinking: false leaves the thinking out.
        max_length: of prompt and response in tokens.
        overflow: what happens to longer documents.
        eos_fill_to: fill shorter responses with eos to this many tokens.
        num_proc: processes.
        cache_dir: keep the documents here.
    """
    examples = read_examples(
        source,
        schema=schema,
        prompt_column=prompt_column,
        response_column=response_column,
        split=split,
        subset=subset,
        filters=filters,
    )
    documents = tokenize(
        examples,
        load_tokenizer(tokenizer),
        style=style,
        thinking=thinking,
        max_length=max_length,
        overflow=overflow,
        eos_fill_to=eos_fill_to,
        num_proc=num_proc,
        cache_dir=cache_dir,
    )
    print(report(documents, max_length=max_length, overflow=overflow))


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
