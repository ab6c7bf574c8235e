"""Make conversations and read them as a stream: time to the first batch, tokens a second, bytes read, peak memory.

python scripts/benchmark_data.py --gib 2 --workers 2 --folder /tmp/stream
python scripts/benchmark_data.py --gib 2 --workers 2 --folder /tmp/stream --keep 0.02 --parquet
"""

import argparse
import json
import random
import shutil
import threading
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet

from dream_lightning import S1KDataModule, load_tokenizer


def write(path: Path, size: int, keep: float = 1.0, parquet: bool = False) -> None:
    """Chats of random words, 16 MiB of them again and again, in a .jsonl file or .parquet files of 128 MiB."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    lines, left = [], min(size, 2**24)
    while left > 0:
        question, answer = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "kept": "yes" if not lines or rng.random() < keep else "no"}
        lines.append(json.dumps(row) + "\n")
        left -= len(lines[-1])
    if not parquet:
        with path.open("w") as file:
            while file.tell() < size:
                file.writelines(lines)
        return
    path.mkdir()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    for number in range(-(-size // 2**27)):
        with pyarrow.parquet.ParquetWriter(
            path / f"train-{number:05}.parquet", table.schema, use_dictionary=False
        ) as file:
            for _ in range(min(2**27, size - number * 2**27) >> 24 or 1):
                file.write_table(table)


class Memory(threading.Thread):
    """The largest sums over this process and its children, in bytes; RSS counts pages that they share several times."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rss = self.pss = 0

    def run(self) -> None:
        while True:
            rss = pss = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    used = process.memory_full_info()
                except psutil.Error:  # it has just ended
                    continue
                rss, pss = rss + used.rss, pss + used.pss
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--keep", type=float, default=1.0, help="share of the rows that are tokenized; all are read")
    parser.add_argument("--parquet", action="store_true", help="a folder of .parquet files instead of one .jsonl file")
    parser.add_argument("--tokenizer", default="bytes", help="folder, hub id or bytes")
    parser.add_argument("--folder", required=True, help="for the file and the cache, which is deleted first")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    path = folder / f"{options.gib}-{options.keep}{'' if options.parquet else '.jsonl'}"
    if not path.exists():
        write(path, int(options.gib * 2**30), options.keep, options.parquet)
    memory = Memory()
    memory.start()
    data = S1KDataModule(
        str(path),
        tokenizer=load_tokenizer(options.tokenizer),
        validation_source="bundled" if options.keep == 1 else None,  # no row of it is kept
        streaming=True,
        filters={"kept": ["yes"]} if options.keep < 1 else None,
        packing=True,
        max_length=4096,
        batch_size=8,
        num_workers=options.workers,
        cache_dir=str(folder / "cache"),
    )
    began = time.perf_counter()
    data.setup("fit")
    tokens, first = 0, None
    for batch in data.train_dataloader():
        first = first or time.perf_counter() - began
        tokens += int((batch.document_ids >= 0).sum())
        if time.perf_counter() - began > options.seconds:
            break
    seconds = time.perf_counter() - began
    print(f"{tokens:,} tokens in {seconds:,.0f} s, {tokens / seconds:,.0f} tok/s, first batch after {first:.1f} s")
    print(f"peak of all processes: RSS {memory.rss / 2**30:.2f} GiB, PSS {memory.pss / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
