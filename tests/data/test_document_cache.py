"""A tokenized set equals its examples encoded one by one, on any number of processes, and is computed once."""

import itertools
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from kill_points import killed_before

from dream_lightning.batch import Example
from dream_lightning.data import document_cache
from dream_lightning.data.document_cache import tokenize
from dream_lightning.data.tokenization import encode
from dream_lightning.errors import UserError
from dream_lightning.model.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def examples(count=12):
    generator, made = random.Random(0), []
    for i in range(count):
        thinking = "so " * generator.randrange(1, 60) if i % 3 else None
        prompt = ({"role": "user", "content": f"{i}+{i}?"},)
        made.append(Example(f"x-{i}", prompt, thinking, str(2 * i), None, f"train.jsonl, row {i + 1}"))
    return made


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_length": 120}, {"max_length": 120, "overflow": "drop", "extra_weight": {"so": 2.0}},
        {"max_length": 120, "overflow": "truncate_right"},
        {"style": "plain", "system_prompt": "S", "eos_fill_to": 50}, {"thinking": False},
    ],
)  # fmt: skip
def test_set_equals_one_by_one(options, num_proc, monkeypatch):
    monkeypatch.setattr(document_cache, "_CHUNK", 5)
    alone = [encode(example, BYTES, **options) for example in examples()]
    got = tokenize(examples(), BYTES, num_proc=num_proc, **options)
    assert list(got) == [one.document for one in alone if one.document is not None]
    assert list(got) == list(pickle.loads(pickle.dumps(got)))
    assert got.dropped == sum(one.document is None for one in alone)
    assert got.lengths.tolist() == [len(document) for document in got]
    for name in ("full_length", "prompt_length", "filled"):
        assert getattr(got, name).tolist() == [getattr(one, name) for one in alone]
    whole = tokenize(examples(), BYTES, **{**options, "max_length": None, "eos_fill_to": None})
    unfilled = got.lengths.sum() - got.filled.sum()
    assert got.cut_tokens.sum() == whole.lengths[got.is_kept].sum() - unfilled
    assert (got.cut_tokens >= 0).all() and np.array_equal(got.kept, np.flatnonzero(got.is_kept))


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    computed = tokenize(examples(), BYTES, max_length=120, extra_weight={"2": 2.0}, cache_dir=tmp_path)
    monkeypatch.setattr(document_cache, "encode_documents", None)
    read = tokenize(examples(), BYTES, max_length=120, extra_weight={"2": 2.0}, cache_dir=tmp_path, num_proc=4)
    assert list(read) == list(computed)
    assert read.cut_tokens.tolist() == computed.cut_tokens.tolist()
    assert [path.name[:10] for path in tmp_path.iterdir()] == ["documents-"]


def test_whatever_changes_documents_changes_the_cache_key_and_nothing_else_does(tmp_path):
    template = load_tokenizer("bytes")
    template.chat_template += " "
    vocabulary = load_tokenizer("bytes")
    vocabulary.add_tokens(["so"])
    options = [
        *({"style": "plain"}, {"system_prompt": "S"}, {"thinking": False}, {"eos_fill_to": 50}),
        *({"max_length": 200}, {"max_length": 200, "overflow": "drop"}),
        *({"extra_weight": {"so": 2.0}}, {"extra_weight": {"so": 3.0}}),
    ]
    changed = [
        (examples(11), BYTES, {}),
        ([*examples(11), replace(examples()[11], answer="other")], BYTES, {}),
        (examples()[::-1], BYTES, {}),
        *((examples(), tokenizer, {}) for tokenizer in (template, vocabulary)),
        *((examples(), BYTES, option) for option in options),
    ]
    tokenize(examples(), BYTES, cache_dir=tmp_path)
    for number, (given, tokenizer, options) in enumerate(changed):
        tokenize(given, tokenizer, cache_dir=tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == number + 2
    same = [replace(e, origin="moved.jsonl", task="math", record={"column": 1}) for e in examples()]
    tokenize(same, BYTES, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(changed) + 1


def test_a_second_process_does_not_replace_the_first_ones_result(tmp_path):
    first = tokenize(examples(), BYTES, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    inode = folder.stat().st_ino
    first.save(folder)
    assert list(tmp_path.iterdir()) == [folder] and folder.stat().st_ino == inode


def test_a_kill_at_any_moment_leaves_the_whole_folder_or_none(tmp_path):
    wanted = list(tokenize(examples(), BYTES))
    for moment in itertools.count():
        cache = tmp_path / str(moment)
        killed = killed_before(moment, cache.parent, lambda cache=cache: tokenize(examples(), BYTES, cache_dir=cache))
        assert list(tokenize(examples(), BYTES, cache_dir=cache)) == wanted
        assert len([f for f in cache.glob("documents-*") if f.suffix != ".partial"]) == 1
        if not killed:
            break
    assert moment > 5


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_cannot_be_tokenized_is_named(num_proc):
    bad = [*examples(5), replace(examples()[0], answer="", origin="train.jsonl, row 17")]
    with pytest.raises(UserError, match=r"train.jsonl, row 17 has no response"):
        tokenize(bad, BYTES, num_proc=num_proc)
    with pytest.raises(UserError, match=r"overflow drops all 12 documents: .* max_length is 10; raise it"):
        tokenize(examples(), BYTES, max_length=10, overflow="drop", num_proc=num_proc)
    with pytest.raises(UserError, match="no examples"):
        tokenize([], BYTES, num_proc=num_proc)


def test_a_cache_that_cannot_be_written_or_is_damaged_is_named(tmp_path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below", "/proc/cache"):
        with pytest.raises(UserError, match=f"data.cache_dir is {cache}, where no file can be written"):
            tokenize(examples(), BYTES, cache_dir=cache)
    for name in ("ids.npy", "counts.npy"):
        tokenize(examples(), BYTES, cache_dir=tmp_path / name)
        (file,) = (tmp_path / name).glob(f"*/{name}")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=f"{file.parent} is damaged .* delete that folder"):
            tokenize(examples(), BYTES, cache_dir=tmp_path / name)
