"""Lengths of a data set in tokens, and what a length limit does to it.

python scripts/data_report.py --source train.jsonl --tokenizer Dream-org/Dream-v0-Instruct-7B --max_length 4096
"""

import rich
from jsonargparse import auto_cli

from dream_lightning.data.encoding import Overflow, Style
from dream_lightning.data.report import as_markdown, as_tables, report
from dream_lightning.data.schemas import Schema, Trace, read_examples
from dream_lightning.data.tokenization import tokenize
from dream_lightning.model.tokenizer import load_tokenizer
from dream_lightning.readable_errors import readable_errors


def main(
    source: str,
    tokenizer: str,
    schema: Schema = "auto",
    trace: Trace = "deepseek",
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
    markdown: bool = False,
) -> None:
    """Print the report.

    Args:
        source: file, folder or hub id of the records.
        tokenizer: folder or hub id, or bytes.
        schema: how a record is read; auto goes by its columns.
        trace: whose thinking to take from s1K-1.1.
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
        markdown: print Markdown.
    """
    examples = read_examples(
        source,
        schema=schema,
        trace=trace,
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
    sections = report(documents, max_length=max_length, overflow=overflow)
    print(as_markdown(sections)) if markdown else rich.print(as_tables(sections))


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
