"""Make a .jsonl file of conversations and read it as a stream: time to the first batch, tokens a second, peak memory.

python scripts/benchmark_data.py --gib 2 --workers 2 --folder /tmp/stream
"""

import argparse
import json
import random
import shutil
import threading
import time
from pathlib import Path

import psutil

from dream_lightning import S1KDataModule, load_tokenizer


def write(path: Path, size: int) -> None:
    """Chats of random words, 16 MiB of them again and again."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    lines, left = [], min(size, 2**24)
    while left > 0:
        question, answer = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
        left -= len(lines[-1])
    with path.open("w") as file:
        while file.tell() < size:
            file.writelines(lines)


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
    parser.add_argument("--tokenizer", default="bytes", help="folder, hub id or bytes")
    parser.add_argument("--folder", required=True, help="for the file and the cache, which is deleted first")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    path = folder / f"{options.gib}.jsonl"
    if not path.exists():
        write(path, int(options.gib * 2**30))
    memory = Memory()
    memory.start()
    data = S1KDataModule(
        str(path),
        tokenizer=load_tokenizer(options.tokenizer),
        validation_source="bundled",
        streaming=True,
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
