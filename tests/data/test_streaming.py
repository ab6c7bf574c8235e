"""Streams: the same documents and batches on any ranks and workers, and after a kill; and plain text."""

import json
import re

import datasets
import pyarrow.parquet
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from material import Recorder, short_trainer, tiny_data, tiny_module, write_jsonl

from dream_lightning.data.schemas import read_examples
from dream_lightning.data.sources import find_shards, read_shard
from dream_lightning.errors import UserError

WINDOW = 1 / 1024  # MiB: a window is a KiB, a shard 64 bytes


def questions(count, name="q"):
    return [{"question": f"{name}{n}?", "response": "x" * (n % 7 + 1)} for n in range(count)]


def stream(folder, source, rank=0, world_size=1, **options):
    few = write_jsonl(folder / "validation.jsonl", questions(5, "v"))
    options = {"validation_source": str(few), "streaming": True, "shuffle_mib": WINDOW, "packing": True} | options
    data = tiny_data(source, folder, **{"max_length": 100, "batch_size": 2, **options})
    data.setup("fit")
    sampler = data.train_dataloader().sampler
    sampler.rank, sampler.num_replicas, sampler.block = rank, world_size, 2 * world_size
    return data, sampler


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", questions(120))


def test_an_epoch_has_every_document_once_on_any_ranks_and_workers(source, tmp_path):
    data, sampler = stream(tmp_path, source)
    whole = list(sampler)
    keys = [key for row in whole for key in row]
    assert sorted(key.order for key in keys) == list(range(120))
    wanted = sorted(bytes(d.response_ids[:-1]) for d in (data.train_set[key.index] for key in keys))
    assert wanted == sorted(row["response"].encode() for row in questions(120))
    assert len(sampler.windows) > 3 and len({key.index for key in keys}) == 120
    assert max(sum(len(data.train_set[key.index]) for key in row) for row in whole) <= 100
    ranks = [list(stream(tmp_path, source, rank, 2, num_workers=rank)[1]) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    interleaved = [row for i in range(0, len(ranks[0]), 2) for rank in ranks for row in rank[i : i + 2]]
    assert [row for row in interleaved if row[0].counted] == whole
    sampler.set_epoch(1)
    assert sorted(key.order for row in sampler for key in row) == list(range(120))
    assert [k.index & 2**40 - 1 for row in sampler for k in row] != [k.index for k in keys]


def test_a_stream_resumes_at_every_batch_without_the_windows_before(source, tmp_path):
    def ids(batches):
        return [(b.input_ids.tolist(), b.document_ids.tolist(), b.sample_ids.tolist()) for b in batches]

    loader = stream(tmp_path, source)[0].train_dataloader
    whole = ids(loader())
    stopped = loader()
    for used, _ in enumerate(stopped, 1):
        resumed = loader()
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert ids(resumed) == whole[used:]
    assert resumed.sampler.start_window[1] > 2
    with pytest.warns(UserWarning, match="sources have changed"):
        stream(tmp_path, source, seed=1)[0].train_dataloader().load_state_dict(stopped.state_dict())


def test_training_that_is_resumed_has_the_losses_of_one_that_was_not(source, tmp_path):
    def losses(*callbacks, step=None, **options):
        options |= {"streaming": True, "shuffle_mib": WINDOW, "packing": True, "max_length": 100, "batch_size": 4}
        data, recorder = tiny_data(source, tmp_path, **options), Recorder()
        trainer = short_trainer(tmp_path, recorder, *callbacks, max_steps=20)
        trainer.fit(tiny_module(), data, ckpt_path=step and tmp_path / "all" / f"step={step}.ckpt")
        return recorder.losses

    saved = ModelCheckpoint(dirpath=tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = losses(saved)
    data, _ = stream(tmp_path, source, validation_source=None, batch_size=4)
    epoch = len(list(data.train_dataloader()))
    assert 4 < epoch < 16  # the last steps are those of the second epoch
    for step, workers in [(3, 1), (epoch - 1, 0), (epoch, 0), (epoch + 3, 0)]:
        assert losses(step=step, num_workers=workers) == whole[step:]


def test_shards_hold_the_rows_of_the_whole_file_once(tmp_path, source):
    datasets.Dataset.from_list(questions(120)).to_parquet(tmp_path / "rows.parquet", batch_size=50)
    (tmp_path / "text.txt").write_text("".join(f"é {n}\n<|endoftext|>\n" for n in range(40)), encoding="utf-8")
    for name in ("rows.jsonl", "rows.parquet", "text.txt"):
        shards = find_shards(tmp_path / name, 100)
        rows = [row.record for shard in shards for row in read_shard(shard)]
        text = "".join(row.get("text", "") for row in rows).replace("\n", "")
        assert len(shards) > 5 and sum(shard.size for shard in shards) > 200
        if name == "text.txt":  # a document is cut where a shard ends
            assert text == "".join(f"é {n}" for n in range(40))
        else:
            assert rows == questions(120)


def test_sources_are_mixed_by_weight_and_what_a_stream_cannot_do_is_refused(tmp_path, source):
    small = write_jsonl(tmp_path / "small.jsonl", questions(20, "z"))
    for name, value in {"first_n": 3, "short_first": True, "training_filters": {"a": ["b"]}, "subset": "main"}.items():
        with pytest.raises(UserError, match=f"{name} needs all records at once"):
            tiny_data(source, tmp_path, streaming=True, **{name: value})
    mixed = tiny_data("x", tmp_path, streaming=True, shuffle_mib=WINDOW, validation_source="bundled")
    mixed.sources = {str(source): 1.0, str(small): 3.0}
    mixed.setup("fit")
    used = [mixed.train_set.shards[shard] for _, shard in mixed.train_set.order(0, 0)]
    share = sum(s.size for s in used if "small" in s.file) / sum(s.size for s in used)
    assert share == pytest.approx(0.75, abs=0.02)
    with pytest.raises(UserError, match="no stream reads a part"):
        (tmp_path / "a.json").write_text("[]")
        find_shards(tmp_path / "a.json", 100)
    twice = pyarrow.Table.from_pylist(questions(2)).rename_columns(["question", "question"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet has 'question' more than once"):
        stream(tmp_path, tmp_path / "twice.parquet")


def test_held_out_shards_validate_and_broken_rows_are_named(tmp_path, source):
    data, sampler = stream(tmp_path, source, validation_source=None, validation_fraction=0.1)
    asked = {e.prompt[0]["content"] for e in data.read()[1]}
    trained = [data.tokenizer.decode(data.train_set[key.index].prompt_ids) for row in sampler for key in row]
    assert asked and len(asked) + len(trained) == 120
    assert not any(f"\n{question}<" in prompt for question in asked for prompt in trained)
    broken = write_jsonl(tmp_path / "broken.jsonl", [*questions(30), {"question": "q", "response": 3}])
    few = write_jsonl(tmp_path / "few.jsonl", [row | {"kind": "ab"[n > 20]} for n, row in enumerate(questions(40))])
    rows = list(stream(tmp_path, few, validation_source=str(few), filters={"kind": ["a"]})[1])
    assert sorted(key.order for row in rows for key in row) == list(range(21))  # some windows have none of them
    for workers in (0, 1):
        with pytest.raises(UserError, match="response is a int") as error:
            list(stream(tmp_path, broken, num_workers=workers)[1])
        byte, row = map(int, re.match(r"broken.jsonl from byte (\d+), row (\d+)", str(error.value)).groups())
        lines = broken.read_bytes()[byte - 1 :].split(b"\n")  # the first one starts before the shard
        assert json.loads(lines[row])["response"] == 3


def test_plain_text_fills_rows_and_only_first_tokens_are_not_maskable(tmp_path):
    lines = [{"text": chr(97 + n % 26) * (37 * n % 230 + 1)} for n in range(200)]
    path = write_jsonl(tmp_path / "text.jsonl", [*lines, {"text": " "}])
    assert [e.answer for e in read_examples(path)][:200] == [line["text"] for line in lines]
    data, sampler = stream(tmp_path, path, validation_source=str(path), shuffle_mib=1.0)
    total = sum(len(line["text"]) + 1 for line in lines)
    rows = list(sampler)
    assert sum(len(data.train_set[key.index]) for row in rows for key in row) == total  # no token is lost
    assert total / (100 * len(rows)) > 0.98
    assert data.validation_set.dropped == 1 and data.validation_set.lengths.sum() == total
    for batch in data.train_dataloader():
        real = batch.document_ids >= 0
        assert (batch.maskable == (real & (batch.position_ids > 0))).all()
